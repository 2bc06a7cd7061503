"""The text abilities of a model, compared with those of the LLM that it was trained from."""
