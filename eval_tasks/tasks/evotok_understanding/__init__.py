"""A suite of image understanding benchmarks of lmms-eval."""
