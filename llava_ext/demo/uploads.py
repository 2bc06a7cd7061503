"""Former path of `llava_ext.serving.uploads`, kept for programs written for version 0.1."""

from llava_ext.serving.uploads import UploadLimits, open_upload

__all__ = ["UploadLimits", "open_upload"]
