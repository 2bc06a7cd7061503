"""The commands of `evotok-llava`, one a module: `add(commands, shared)` puts a parser in place, `run(arguments)` does
it."""
