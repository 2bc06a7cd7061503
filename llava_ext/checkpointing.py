"""Former path of `llava_ext.model_folder`, kept for programs written for version 0.1."""

from llava_ext.model_folder import INCLUDED_MODEL, default_model_folder, load_model, save_model

__all__ = ["INCLUDED_MODEL", "default_model_folder", "load_model", "save_model"]
