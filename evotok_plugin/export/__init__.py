"""Export: folders that other programs open without this package."""
