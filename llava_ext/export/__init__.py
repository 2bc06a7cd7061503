"""Export: models for others to load."""
