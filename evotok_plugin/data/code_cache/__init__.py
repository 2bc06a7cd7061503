"""Code cache: the codes of images on disk, so that training does not encode them in every epoch."""

from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.encode import encode_images
from evotok_plugin.data.encoding_options import EncodingOptions

__all__ = ["CodeCache", "EncodingOptions", "encode_images"]
