"""Tasks of lmms-eval: one folder per task, and what several tasks share."""
