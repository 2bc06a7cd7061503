"""Conversations and images to the model's flat token sequence, and ids back to text."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from llava_ext.conversation import ConversationTemplate
from llava_ext.vocabulary import ResidualVocabulary

IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<|image_pad|>", "<|image_start|>", "<|image_end|>"
IMAGE_TOKENS = (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
LLAVA_IMAGE = "<image>"


@dataclass
class EncodedConversation:
    """One conversation as ids and labels, both (T,); -100 marks what is not learned."""

    input_ids: Tensor
    labels: Tensor


class TooLong(ValueError):
    """A conversation that cannot be cut to the length that is wanted."""


@dataclass(frozen=True)
class ConversationLayout:
    """A conversation before its images are put in: one token a text token and one an image.

    Attributes:
        tokens: ids.
        learned: which of them are learned.
        is_image: which of them stand for an image.
        image_steps: LLM steps that each image takes, its delimiters included.
    """

    tokens: list[int]
    learned: list[bool]
    is_image: list[bool]
    image_steps: list[int]

    @property
    def num_steps(self) -> int:
        """LLM steps: one a text token, and those of the images."""
        return len(self.tokens) - len(self.image_steps) + sum(self.image_steps)

    def cut_to(self, num_steps: int) -> "ConversationLayout":
        """Leave out from the end what exceeds `num_steps` LLM steps; images are kept, and whole.

        Raises:
            TooLong: an image, or all that would be learned, lies beyond.
        """
        if self.num_steps <= num_steps:
            return self
        steps = np.ones(len(self.tokens), np.int64)
        steps[self.is_image] = self.image_steps
        kept = int(np.searchsorted(steps.cumsum(), num_steps, side="right"))
        if any(self.is_image[kept:]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} do not hold all images whole")
        if not any(self.learned[:kept]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} hold nothing to learn")
        return ConversationLayout(self.tokens[:kept], self.learned[:kept], self.is_image[:kept], self.image_steps)


class EvoTokLlavaProcessor(ProcessorMixin):
    """Image processor, tokenizer and the layout of images in a sequence.

    An image that is read becomes `<|image_start|>`, one `<|image_pad|>` a position, `<|image_end|>`; an image that
    is drawn has its residual tokens instead of the placeholders.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_positions: int = 256,
        residual_token_offset: int = 0,
        num_levels: int = 4,
        codebook_size: int = 32768,
        image_head: str = "depth",
        chat_template=None,
        **kwargs,
    ) -> None:
        self.num_positions = num_positions
        self.residual_token_offset = residual_token_offset
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.image_head = image_head
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in IMAGE_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}; build the processor with EvoTokLlavaProcessor.from_parts"
            )
        self.image_token_id, self.image_start_id, self.image_end_id = (vocabulary[token] for token in IMAGE_TOKENS)
        self.vocabulary = ResidualVocabulary(residual_token_offset, num_levels, codebook_size)
        self._template: ConversationTemplate | None = None

    @classmethod
    def from_parts(
        cls, image_processor, tokenizer, vision_config, text_vocab_size: int, image_head: str = "depth"
    ) -> "EvoTokLlavaProcessor":
        """Build the processor for a text backbone: adds the image tokens, reserves the residual range behind both
        the tokenizer's ids and the backbone's embedding rows (`text_vocab_size`)."""
        tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
        return cls(
            image_processor,
            tokenizer,
            num_positions=vision_config.num_positions,
            residual_token_offset=max(text_vocab_size, len(tokenizer)),
            num_levels=vision_config.pixel_depth,
            codebook_size=vision_config.codebook_size,
            image_head=image_head,
        )

    @property
    def template(self) -> ConversationTemplate:
        if self._template is None:
            self._template = ConversationTemplate(self.tokenizer)
        return self._template

    def to_dict(self, *args, **kwargs) -> dict:
        """What is saved: the constructor's arguments alone."""
        values = super().to_dict(*args, **kwargs)
        for derived in ("_template", "vocabulary", "image_token_id", "image_start_id", "image_end_id"):
            values.pop(derived, None)
        return values

    # Sequences -----------------------------------------------------------------------------------------------

    def image_steps(self, drawn: bool) -> int:
        """LLM steps of an image, its delimiters included: one a position, but one a residual token where the flat head
        draws it."""
        return 2 + self.num_positions * (self.num_levels if drawn and self.image_head == "flat" else 1)

    def encode_conversation(
        self, messages: Sequence[dict], drawn_codes: Sequence[Tensor | None], add_generation_prompt: bool = False
    ) -> EncodedConversation:
        """Messages `{"role", "content": str}` whose contents hold one `<image>` per image, to ids and labels.

        Args:
            drawn_codes: for every image in order its codes (N, l >= num_levels) when it is drawn, None when it is
                read.

        Raises:
            ValueError: the number of `<image>` and of images differ, or codes have another number of positions.
        """
        layout = self.lay_out(messages, add_generation_prompt, [codes is not None for codes in drawn_codes])
        return self.put_images(layout, drawn_codes)

    def lay_out(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, drawn: Sequence[bool] | None = None
    ) -> ConversationLayout:
        """Messages as `encode_conversation` takes them, without the images: how long they are and what is learned.

        Args:
            drawn: of every image whether it is drawn; by default those in assistant turns are.

        Raises:
            ValueError: a chat template that cannot render them, text that holds an image token, or another number of
                images than `drawn` tells of.
        """
        contents = [str(message["content"]) for message in messages]
        for token in IMAGE_TOKENS:
            if any(token in content for content in contents):
                raise ValueError(f"the text holds {token}, which stands for images alone; write {LLAVA_IMAGE}")
        rendered = self.template.render(
            [
                {"role": message["role"], "content": content.replace(LLAVA_IMAGE, IMAGE_TOKEN)}
                for message, content in zip(messages, contents, strict=True)
            ],
            add_generation_prompt,
        )
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        learned = [False] * len(tokens)
        for span in rendered.assistant_spans:
            first, end = (bisect_left(starts, edge) for edge in span)
            learned[first:end] = [True] * (end - first)
        is_image = [token == self.image_token_id for token in tokens]
        if drawn is None:
            drawn = [by_assistant for by_assistant, image in zip(learned, is_image, strict=True) if image]
        _check_count(is_image, drawn)
        return ConversationLayout(tokens, learned, is_image, [self.image_steps(bool(one)) for one in drawn])

    def put_images(self, layout: ConversationLayout, drawn_codes: Sequence[Tensor | None]) -> EncodedConversation:
        """A layout with its images, for which `encode_conversation` says what is given."""
        _check_count(layout.is_image, drawn_codes)
        ids, labels, images = [], [], iter(drawn_codes)
        for token, learned, is_image in zip(layout.tokens, layout.learned, layout.is_image, strict=True):
            piece = self._image_ids(next(images)) if is_image else [token]
            ids += piece
            labels += piece if learned else [-100] * len(piece)
        labels = [-100 if label == self.image_token_id else label for label in labels]  # read, so not to be written
        return EncodedConversation(torch.tensor(ids), torch.tensor(labels))

    def _image_ids(self, codes: Tensor | None) -> list[int]:
        if codes is None:
            inside = [self.image_token_id] * self.num_positions
        else:
            if codes.shape[0] != self.num_positions:
                raise ValueError(f"expected codes of {self.num_positions} positions, got {codes.shape[0]}")
            inside = self.vocabulary.to_ids(codes[:, : self.num_levels].long()).flatten().tolist()
        return [self.image_start_id, *inside, self.image_end_id]

    def pad(self, sequences: Sequence[Tensor], value: int, side: str = "left") -> Tensor:
        """Stack sequences (T_i,) to (B, T) with `value` on the given side."""
        return torch.nn.utils.rnn.pad_sequence(list(sequences), True, value, padding_side=side)

    @property
    def pad_id(self) -> int:
        """What stands where nothing does."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    # Inference -----------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool = True,
        **kwargs,
    ):
        """Hugging Face messages (one conversation or a list of them) to left-padded model inputs.

        Contents are strings or lists of `{"type": "text", "text"}` and `{"type": "image", "image": PIL image}`.

        Returns:
            a `BatchFeature` with `input_ids`, `attention_mask` (B, T) and, with images, `pixel_values`
            (I, 3, H, W); with `tokenize=False` the rendered text(s).

        Raises:
            ValueError: an unknown content type or an image without a picture.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        images, rows = [], []
        for messages in conversations:
            plain, found = _flatten_messages(messages)
            images += found
            rows.append(plain)
        if not tokenize:
            texts = [self.template.render(messages, add_generation_prompt).text for messages in rows]
            return texts if batched else texts[0]
        counts = [sum(m["content"].count(LLAVA_IMAGE) for m in messages) for messages in rows]
        if sum(counts) != len(images):
            raise ValueError(f"{sum(counts)} {LLAVA_IMAGE} in the text but {len(images)} images were given")
        encoded = [
            self.encode_conversation(messages, [None] * count, add_generation_prompt).input_ids
            for messages, count in zip(rows, counts, strict=True)
        ]
        batch = self._batch(encoded)
        if images:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt").pixel_values
        return batch

    def __call__(self, text: str | Sequence[str], images: Sequence | None = None, **kwargs) -> BatchFeature:
        """User turns (with one `<image>` an image) to left-padded model inputs that wait for the answer."""
        texts = [text] if isinstance(text, str) else list(text)
        images = list(images or [])
        conversations = []
        for turn in texts:
            pieces = turn.split(LLAVA_IMAGE)
            content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                if not images:
                    raise ValueError(f"more {LLAVA_IMAGE} in the text than images given")
                content += [{"type": "image", "image": images.pop(0)}, {"type": "text", "text": piece.lstrip("\n")}]
            conversations.append([{"role": "user", "content": content}])
        if images:
            raise ValueError(f"{len(images)} more images than {LLAVA_IMAGE} in the text")
        return self.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True)

    def drawing_prompts(self, prompts: Sequence[str]) -> BatchFeature:
        """Prompts to left-padded ids that end with `<|image_start|>`: the next step is the image's first position.

        An empty prompt gives the unconditional row of classifier-free guidance.
        """
        start = torch.tensor([self.image_start_id])
        rows = [
            torch.cat(
                [
                    self.encode_conversation(
                        [{"role": "user", "content": p}], [], add_generation_prompt=True
                    ).input_ids,
                    start,
                ]
            )
            for p in prompts
        ]
        return self._batch(rows)

    def _batch(self, rows: list[Tensor]) -> BatchFeature:
        mask = self.pad([torch.ones_like(row) for row in rows], 0)
        return BatchFeature({"input_ids": self.pad(rows, self.pad_id), "attention_mask": mask})

    # Back to text --------------------------------------------------------------------------------------------

    def decode(self, token_ids, skip_special_tokens: bool = False, images_from=None, **kwargs) -> str | list[dict]:
        """Ids to text; residual tokens appear as `<|evo:LEVEL:CODE|>`, or not at all with `skip_special_tokens`.

        Args:
            images_from: an EvoTok tokenizer (`model.vision_tower`). The answer is then taken apart into a list of
                `{"type": "text", "text": str}` and `{"type": "image", "image": PIL image}`, without special tokens,
                which may be a message's content: so a conversation goes on.

        Raises:
            ValueError: with `images_from`, an image that is not whole.
        """
        ids = torch.as_tensor(token_ids).flatten()
        runs = self._runs(ids)
        if images_from is not None:
            parts = [self._image_part(run, images_from) if r else self._text_part(run, **kwargs) for r, run in runs]
            return [part for part in parts if part.get("text") != ""]
        words = {"skip_special_tokens": skip_special_tokens, **kwargs}
        return "".join(
            ("" if skip_special_tokens else "".join(map(self.vocabulary.to_text, run)))
            if residual
            else self.tokenizer.decode(run, **words)
            for residual, run in runs
        )

    def _runs(self, ids: Tensor) -> list[tuple[bool, list[int]]]:
        """Ids in runs of residual tokens and of others."""
        residual = self.vocabulary.is_residual(ids).tolist()
        pairs = zip(residual, ids.tolist(), strict=True)
        return [(kind, [token for _, token in run]) for kind, run in groupby(pairs, key=lambda pair: pair[0])]

    def _text_part(self, run: list[int], **kwargs) -> dict:
        return {"type": "text", "text": self.tokenizer.decode(run, skip_special_tokens=True, **kwargs).strip()}

    def _image_part(self, run: list[int], tokenizer) -> dict:
        ids, expected = torch.tensor(run), torch.arange(self.num_levels).repeat(self.num_positions)
        if len(ids) != len(expected) or not torch.equal(self.vocabulary.levels(ids), expected):
            raise ValueError(
                f"expected an image of {self.num_positions} positions with levels 0 to {self.num_levels - 1} each, got "
                f"{len(ids)} residual tokens; was it cut?"
            )
        codes = self.vocabulary.codes(ids).view(1, self.num_positions, self.num_levels)
        with torch.no_grad():
            pixels = tokenizer.decode_pixels(codes.to(tokenizer.device))
        return {"type": "image", "image": self.image_processor.to_pil(pixels)[0]}

    def batch_decode(self, sequences, **kwargs) -> list[str]:
        return [self.decode(sequence, **kwargs) for sequence in sequences]


def _check_count(is_image: Sequence[bool], images: Sequence) -> None:
    if sum(is_image) != len(images):
        raise ValueError(f"{sum(is_image)} {LLAVA_IMAGE} in the conversation but {len(images)} images were given")


def _flatten_messages(messages: Sequence[dict]) -> tuple[list[dict], list]:
    """Messages with part lists to messages with strings (`<image>` where an image stood), and the images."""
    plain, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            plain.append({"role": message["role"], "content": content})
            continue
        lines = []
        for part in content:
            if part["type"] == "text":
                lines.append(part["text"])
            elif part["type"] == "image":
                picture = part.get("image", part.get("url"))
                if picture is None:
                    raise ValueError('an {"type": "image"} part needs its picture under "image"')
                images.append(picture)
                lines.append(LLAVA_IMAGE)
            else:
                raise ValueError(f"unknown content type {part['type']!r}; expected 'text' or 'image'")
        plain.append({"role": message["role"], "content": "\n".join(lines)})
    return plain, images
