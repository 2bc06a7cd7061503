"""A conversation with the model, turn by turn: what the terminal and the web page have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.generation import Event, ImageDrawn, TextDelta
from llava_ext.generation.interleaved import AnswerOptions
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


@dataclass
class ChatSession:
    """What was said, as Hugging Face messages; images as the model sees them, cropped to its size."""

    messages: list[dict] = field(default_factory=list)

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
        seed: int,
    ) -> Iterator[Event]:
        """Ask, and give the answer as it comes.

        Question and answer join the conversation when the answer ends; one that is not heard to its end joins as far
        as it came. After an error the conversation is what it was before.

        Raises:
            UserError: nothing is asked, or what was said leaves no room for an answer.
        """
        content = [{"type": "image", "image": processor.image_processor.crop(image)} for image in images]
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
        if not content:
            raise UserError("the message is empty; ask something, or give an image")
        asked = [*self.messages, {"role": "user", "content": content}]
        inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
        parts: list[dict] = []
        try:
            for event in model.stream(inputs, processor, options, seed):
                _collect(parts, event)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            self.messages = [*asked, {"role": "assistant", "content": parts}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": parts}]


def _collect(parts: list[dict], event: Event) -> None:
    """Let an event join the parts of an answer."""
    if isinstance(event, ImageDrawn):
        parts.append({"type": "image", "image": event.image})
    elif isinstance(event, TextDelta) and parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += event.text
    elif isinstance(event, TextDelta):
        parts.append({"type": "text", "text": event.text})
