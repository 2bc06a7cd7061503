"""The report card: result files of lmms-eval to one table and one plot, beside published figures."""
