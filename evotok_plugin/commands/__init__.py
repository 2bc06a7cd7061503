"""The commands of `evotok`, one per module: `add(commands, shared)` adds the parser, `run(arguments)` does the work."""
