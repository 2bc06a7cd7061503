"""Prompts: from messages to text with image placeholders, to ids, to batches, and back."""
