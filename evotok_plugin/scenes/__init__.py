"""Scenes, the embedded data set: colored shapes on a plain background with captions, questions and records."""
