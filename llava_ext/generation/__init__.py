"""Answers: text, images drawn through the image head, and both in one document."""

from typing import TYPE_CHECKING

from evotok_plugin.common.lazy import lazy_package

if TYPE_CHECKING:
    from llava_ext.generation.answer_options import AnswerOptions
    from llava_ext.generation.events import (
        CandidateDrawn,
        Event,
        Finished,
        ImageDrawn,
        ImagePreview,
        ImageStarted,
        TextDelta,
    )
    from llava_ext.generation.images import ImageGenerationMixin
    from llava_ext.generation.interleaved import InterleavedGenerationMixin
    from llava_ext.generation.many_answers import AnswerRequest, ManyAnswersMixin
    from llava_ext.generation.options import DrawingOptions
    from llava_ext.generation.reading_score import PromptReader, ReadingJudge, ReadingScores
    from llava_ext.generation.selection import Candidate, Choice
    from llava_ext.generation.selection_options import SelectionOptions
    from llava_ext.generation.text import TextGenerationMixin

__all__ = [
    "AnswerOptions",
    "AnswerRequest",
    "Candidate",
    "CandidateDrawn",
    "Choice",
    "DrawingOptions",
    "Event",
    "Finished",
    "ImageDrawn",
    "ImageGenerationMixin",
    "ImagePreview",
    "ImageStarted",
    "InterleavedGenerationMixin",
    "ManyAnswersMixin",
    "PromptReader",
    "ReadingJudge",
    "ReadingScores",
    "SelectionOptions",
    "TextDelta",
    "TextGenerationMixin",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    {
        "AnswerOptions": "answer_options",
        "AnswerRequest": "many_answers",
        "Candidate": "selection",
        "CandidateDrawn": "events",
        "Choice": "selection",
        "DrawingOptions": "options",
        "Event": "events",
        "Finished": "events",
        "ImageDrawn": "events",
        "ImageGenerationMixin": "images",
        "ImagePreview": "events",
        "ImageStarted": "events",
        "InterleavedGenerationMixin": "interleaved",
        "ManyAnswersMixin": "many_answers",
        "PromptReader": "reading_score",
        "ReadingJudge": "reading_score",
        "ReadingScores": "reading_score",
        "SelectionOptions": "selection_options",
        "TextDelta": "events",
        "TextGenerationMixin": "text",
    },
    registering=[],
)
