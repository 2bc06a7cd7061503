"""The commands of `evotok-eval`, one module each."""
