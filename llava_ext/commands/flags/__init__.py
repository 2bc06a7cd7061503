"""Flags of the commands of `evotok-llava`. Parsing them imports nothing that a command needs only for its work."""
