"""DPG-Bench: questions about images drawn for dense prompts."""
