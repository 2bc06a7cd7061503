"""Tools that every part of the project uses: files, processes, signals, recipes, progress, pictures."""
