"""The commands of `evotok-llava`, one per module: `add(commands, shared)` adds the parser, `run(arguments)` runs it."""
