"""Multiple-choice questions about drawn scenes in MMBench's format."""
