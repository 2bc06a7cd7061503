"""Answers: text, images drawn through the image head, and both in one document."""

from llava_ext.generation.events import Event, Finished, ImageDrawn, ImagePreview, ImageStarted, TextDelta
from llava_ext.generation.images import ImageGenerationMixin, SamplingOptions, sample

__all__ = [
    "Event",
    "Finished",
    "ImageDrawn",
    "ImageGenerationMixin",
    "ImagePreview",
    "ImageStarted",
    "SamplingOptions",
    "TextDelta",
    "sample",
]
