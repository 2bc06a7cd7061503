"""GenEval: objects, counts, colors and positions in drawn images."""
