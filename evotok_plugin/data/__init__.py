"""Reading images: sources, formats, batches, training streams and the code cache."""
