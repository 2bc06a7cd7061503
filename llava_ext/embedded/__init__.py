"""The embedded default: scenes and small models of every kind, generated and trained without a download."""
