"""Former path of `llava_ext.serving`, kept for programs written for version 0.1."""
