"""The report card: lmms-eval results of several runs as one table and one plot, next to published figures."""
