"""A multi-turn conversation with the model, shared by the terminal and the web page."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.generation import AnswerOptions, Event, ImageDrawn, TextDelta
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

# Yields the events of the answers to a conversation, from its messages, its last text, the options and the seeds.
Streamer = Callable[[list[dict[str, Any]], str, AnswerOptions, int | Sequence[int]], Iterator[Event]]


@dataclass
class ChatSession:
    """The conversation so far as Hugging Face messages; images are cropped to the size that the model reads."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_turns(self) -> int:
        return len(self.messages) // 2

    def ask(
        self,
        model: EvoTokLlavaForConditionalGeneration,
        processor: EvoTokLlavaProcessor,
        text: str,
        images: Sequence[Image.Image],
        options: AnswerOptions,
        seed: int | Sequence[int],
        stream: Streamer | None = None,
    ) -> Generator[Event, None, None]:
        """Ask a question and stream the answer; with `options.best_of`, candidates are scored for `text`.

        Args:
            seed: of the answer. With several seeds there is one answer per seed, whose number is `row` of its events;
                the parts of all of them, in this order, are one message of the conversation.
            stream: generates the answer; by default the model, with this conversation alone and one seed.

        Question and answer are added to the conversation when the answer ends. If the caller stops early (closes the
        generator), they are added with the part of the answer so far. After an error the conversation is unchanged.

        Raises:
            UserError: the message is empty, or the conversation leaves no room for an answer.
        """
        content: list[dict[str, Any]] = [
            {"type": "image", "image": processor.image_processor.crop(image)} for image in images
        ]
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
        if not content:
            raise UserError("the message is empty; ask something, or give an image")
        question = {"role": "user", "content": content}
        yield from self.answer(model, processor, self.messages, question, text, options, seed, stream)

    def answer(
        self,
        model: EvoTokLlavaForConditionalGeneration,
        processor: EvoTokLlavaProcessor,
        context: Sequence[dict[str, Any]],
        question: dict[str, Any],
        text: str,
        options: AnswerOptions,
        seed: int | Sequence[int],
        stream: Streamer | None = None,
    ) -> Generator[Event, None, None]:
        """Stream the answer to a user message, as `ask`.

        Args:
            context: messages before the question that the answer depends on. They need not be this conversation, to
                the end of which question and answer are added.
            question: the user message.
            text: what candidates are scored for.
        """
        asked = [*context, question]
        parts: dict[int, list[dict[str, Any]]] = {}  # by rows
        if stream is not None:
            events = stream(asked, text, options, seed)
        else:
            assert isinstance(seed, int)
            inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
            events = model.stream(inputs, processor, options, seed, [text])
        try:
            for event in events:
                _append(parts.setdefault(event.row, []), event)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            self._add(question, parts)
            raise
        self._add(question, parts)

    def _add(self, question: dict[str, Any], parts: dict[int, list[dict[str, Any]]]) -> None:
        content = [part for row in sorted(parts) for part in parts[row]]
        self.messages = [*self.messages, question, {"role": "assistant", "content": content}]


def _append(parts: list[dict[str, Any]], event: Event) -> None:
    """Append the text or image of an event to the parts of an answer."""
    if isinstance(event, ImageDrawn):
        parts.append({"type": "image", "image": event.image})
    elif isinstance(event, TextDelta) and parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += event.text
    elif isinstance(event, TextDelta):
        parts.append({"type": "text", "text": event.text})
