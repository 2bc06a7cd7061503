"""Metrics as pure functions of tensors, and the networks that some of them need."""
