"""GenEval on drawn scenes, judged by an exact detector."""
