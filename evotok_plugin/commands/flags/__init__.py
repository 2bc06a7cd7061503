"""Flags of the commands of `evotok`. Parsing them imports nothing that a command needs only for its work."""
