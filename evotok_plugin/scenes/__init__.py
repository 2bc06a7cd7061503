"""Drawn scenes, the embedded data set: simple shapes on a plain background, their captions, questions and records."""
