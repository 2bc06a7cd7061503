"""Training of the tokenizer and of teachers."""
