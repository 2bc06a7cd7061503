"""Shared helpers for files and folders on disk."""
