"""What every part of the project uses: files and folders on disk."""
