"""Interactive use of a model: chat sessions, drawn image files, and the web page."""
