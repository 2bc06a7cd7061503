"""An HTTP server with the interface of OpenAI's API: chat with images in and out, and images for prompts."""
