"""The commands of `evotok`, one a module: `add(commands, shared)` puts a parser in place, `run(arguments)` does it."""
