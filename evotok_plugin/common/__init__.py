"""Tools for every part of the project: files, folders, processes, signals, recipes, progress, pictures."""
