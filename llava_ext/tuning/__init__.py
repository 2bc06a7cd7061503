"""Search for the settings of drawing: candidates are drawn, judged and compared by successive halving."""
