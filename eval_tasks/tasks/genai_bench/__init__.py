"""GenAI-Bench: drawn images scored by VQAScore."""
