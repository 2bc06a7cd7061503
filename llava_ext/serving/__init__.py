"""The web page: chat that reads and draws, and the evolution of an image over the levels."""
