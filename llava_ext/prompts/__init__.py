"""Prompts: messages of users and libraries to text with image placeholders, to ids, to batches, and back."""
