"""Export: model folders to share, for this package or for transformers alone."""
