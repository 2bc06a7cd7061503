"""The embedded default: scenes, a small text backbone and the settings of its stages, made without a download."""
