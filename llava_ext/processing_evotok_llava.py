"""The processor: conversations and images to the model's flat token sequence, and ids back to text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import MultiModalData

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import side_of
from llava_ext.chat_template import ConversationTemplate, RenderedPrompt, Span
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.prompts.batching import BatchOptions
from llava_ext.prompts.call_arguments import as_texts, assign_images, images_without_text, text_and_images
from llava_ext.prompts.call_options import CallOptions
from llava_ext.prompts.encoding import EncodedText, EncodingMixin
from llava_ext.prompts.image_tokens import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKENS,
    check_residual_range,
    collapse_images,
    image_token_ids,
)
from llava_ext.prompts.messages import IMAGE_TOKEN, Message, check_pictures, checked_picture, read_messages
from llava_ext.prompts.placeholders import LLAVA_IMAGE, split_at_images
from llava_ext.prompts.text_encoder import TextEncoder
from llava_ext.sequence_layout import ConversationLayout, EncodedConversation, TooLong

__all__ = [
    "IMAGE_END_TOKEN",
    "IMAGE_START_TOKEN",
    "IMAGE_TOKEN",
    "IMAGE_TOKENS",
    "LLAVA_IMAGE",
    "ConversationLayout",
    "EncodedConversation",
    "EvoTokLlavaProcessor",
    "TooLong",
]


class EvoTokLlavaProcessor(EncodingMixin, ProcessorMixin):
    """Image processor, tokenizer and the layout of images in a sequence.

    An image that is read becomes `<|image_start|>`, one `<|image_pad|>` per position, `<|image_end|>`; a drawn image
    has its residual tokens instead of the placeholders.
    """

    def __init__(
        self,
        image_processor: EvoTokImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        num_positions: int = 256,
        residual_token_offset: int = 0,
        num_levels: int = 4,
        codebook_size: int = 32768,
        image_head: str = "depth",
        chat_template: str | dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that the tokenizer matches the ids of the image tokens and of the residual range.

        Raises:
            UserError: the tokenizer lacks the image tokens, or has tokens in the residual range.
        """
        self.num_positions = num_positions
        self.residual_token_offset = residual_token_offset
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.image_head = image_head
        self._templates: dict[object, ConversationTemplate] = {}
        self._encoders: dict[object, TextEncoder] = {}
        self._checked: object = None
        super().__init__(image_processor, tokenizer)
        if "padding_side" not in self.tokenizer.init_kwargs:
            self.tokenizer.padding_side = "left"  # as generation needs it; most tokenizers of text models set none
        if chat_template is not None:
            self.chat_template = chat_template
        self.image_token_id, self.image_start_id, self.image_end_id = image_token_ids(self.tokenizer)
        self.check_tokenizer()

    @classmethod
    def from_parts(
        cls,
        image_processor: EvoTokImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        vision_config: EvoTokConfig,
        text_vocab_size: int,
        image_head: str = "depth",
    ) -> "EvoTokLlavaProcessor":
        """Build the processor for a text backbone: add the image tokens, and reserve the residual range after both
        the tokenizer's ids and the backbone's embedding rows (`text_vocab_size`)."""
        tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
        tokenizer.padding_side = "left"
        return cls(
            image_processor,
            tokenizer,
            num_positions=vision_config.num_positions,
            residual_token_offset=max(text_vocab_size, len(tokenizer)),
            num_levels=vision_config.pixel_depth,
            codebook_size=vision_config.codebook_size,
            image_head=image_head,
        )

    def check_tokenizer(self) -> None:
        """Check that the ids of the tokenizer have not changed since the processor was built.

        Raises:
            UserError: the tokenizer has tokens in the residual range, or the image tokens have different ids.
        """
        state = (id(self.tokenizer), len(self.tokenizer), self.vocabulary)
        if state == self._checked:
            return
        check_residual_range(self.tokenizer, self.vocabulary)
        ids = tuple(self.tokenizer.convert_tokens_to_ids(token) for token in IMAGE_TOKENS)
        if ids != (self.image_token_id, self.image_start_id, self.image_end_id):
            raise UserError(
                f"the tokenizer assigns the ids {ids} to the image tokens, the processor was built with "
                f"{(self.image_token_id, self.image_start_id, self.image_end_id)}; build a new processor"
            )
        self._checked = state

    @property
    def chat_template(self) -> str | dict | None:
        """Chat template of the tokenizer, which processor and tokenizer share."""
        tokenizer = self.__dict__.get("tokenizer")
        return None if tokenizer is None else tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, value: str | dict | None) -> None:
        if "tokenizer" in self.__dict__:  # ProcessorMixin sets it before the tokenizer exists
            self.tokenizer.chat_template = value

    @property
    def template(self) -> ConversationTemplate:
        """Renderer of conversations with the current chat template."""
        return self._template_of(None, {})

    def encoder(self, template_text: str) -> TextEncoder:
        """Encoder for a template with the given text around turns."""
        key = (id(self.tokenizer), template_text)
        if key not in self._encoders:
            self._encoders = {key: TextEncoder(self.tokenizer, template_text)}
        return self._encoders[key]

    def _template_of(self, chat_template: str | None, variables: dict) -> ConversationTemplate:
        if variables:
            return ConversationTemplate(self.tokenizer, chat_template, variables)
        key = (id(self.tokenizer), str(self.tokenizer.chat_template), chat_template)
        if key not in self._templates:
            self._templates = {key: ConversationTemplate(self.tokenizer, chat_template)}
        return self._templates[key]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Return the constructor's arguments, for saving."""
        kept = self._templates, self._encoders
        self._templates, self._encoders = {}, {}  # not worth copying
        try:
            values = super().to_dict(*args, **kwargs)
        finally:
            self._templates, self._encoders = kept
        for derived in ("_templates", "_encoders", "_checked", "image_token_id", "image_start_id", "image_end_id"):
            values.pop(derived, None)
        return values

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does.

        Raises:
            UserError: added tokens overlap the residual range, so the saved folder could not be loaded.
        """
        self.check_tokenizer()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def image_token(self) -> str:
        """Text of an image in rendered prompts, one per image; in ids, one per position of the image."""
        return IMAGE_TOKEN

    @property
    def unused_input_names(self) -> list[str]:
        """Inputs that some tokenizers name but this processor never returns."""
        return ["token_type_ids"]

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs: Any) -> MultiModalData:
        """Number of placeholders of images with the given sizes, as serving engines ask for it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_positions] * count, num_image_patches=[1] * count)

    # Inference -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]  # defaults differ, see the docstring
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = True,
        sanitize_control_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Convert Hugging Face messages (one conversation or a list of them) to padded model inputs.

        Contents have the form that `llava_ext.prompts.messages.read_messages` accepts. Unlike in transformers, the
        defaults give what `generate` takes: a dictionary of padded tensors.

        Args:
            chat_template: replaces the tokenizer's, or names one of several.
            tools, documents: variables of the chat template.
            continue_final_message: end with the last message's content, for the model to continue it.
            return_assistant_tokens_mask: add `assistant_masks` (B, T), 1 on the assistant's answers: where the template
                has `{% generation %}`, or without it on contents and end-of-turn tokens, as training learns them.
            return_tensors: "pt" (also as "auto"), "np", or None for lists.
            return_dict: False returns `input_ids` alone.
            sanitize_control_tokens: only False has an effect: the text of control tokens in contents becomes these
                tokens. By default contents are plain text.
            kwargs: those of `CallOptions`, also nested in `processor_kwargs`; `images` for `{"type": "image"}` parts
                without a picture; and variables of the chat template (`enable_thinking`, ...).

        Returns:
            a `BatchFeature` with `input_ids`, `attention_mask` (B, T) and, with images, `pixel_values` (I, 3, H, W);
            with `tokenize=False` the rendered text(s). The processor converts these, called with the same images, to
            the same ids.

        Raises:
            UserError: an unknown content type, an image without a picture, or a variable that the template does not
                use.
            ValueError: an unknown or conflicting keyword.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt starts a new answer and continue_final_message continues one; give one of them"
            )
        if continue_final_message not in (True, False, None, "content"):
            raise ValueError(f"continue_final_message: expected True or False, got {continue_final_message!r}")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        kwargs |= {"tools": tools, "documents": documents, **(kwargs.pop("processor_kwargs", None) or {})}
        images = kwargs.pop("images", None)
        batched = (
            bool(conversation)
            and isinstance(conversation, (list, tuple))
            and isinstance(conversation[0], (list, tuple))
        )
        template, keywords = self._split_keywords(chat_template, kwargs)
        options = CallOptions.of({"return_tensors": "pt" if return_tensors == "auto" else return_tensors, **keywords})
        if keywords and not tokenize:
            raise ValueError(f"{', '.join(keywords)} have no effect without tokenize=True")
        pictures: list = []
        prompts = []
        answers: list[tuple[Span, ...]] = []
        for messages in conversation if batched else [conversation]:
            read, found = read_messages(messages)
            pictures += found
            needs_end = return_assistant_tokens_mask and not template.marks_answers
            prompt = self._render(read, template, add_generation_prompt, bool(continue_final_message), needs_end)
            if sanitize_control_tokens is False:
                prompt = RenderedPrompt(prompt, (), prompt.assistant_spans, prompt.template_text)
            prompts.append(prompt)
            if return_assistant_tokens_mask and template.marks_answers:
                contents = [{"role": message.role, "content": message.text} for message in read]
                answers.append(template.marked_answers(contents, prompt, add_generation_prompt))
        if not tokenize:
            return prompts if batched else prompts[0]
        if images is None:
            check_pictures(pictures)
        encoded = [self._encode(prompt) for prompt in prompts]
        masks = None
        if return_assistant_tokens_mask:
            masks = [one.learned for one in encoded]
            if answers:
                masks = [one.overlapping(spans) for one, spans in zip(encoded, answers, strict=True)]
        batch = self._model_inputs(encoded, pictures if images is None else images, options, masks)
        return batch if return_dict else batch["input_ids"]

    def _split_keywords(self, chat_template: str | None, keywords: Mapping) -> tuple[ConversationTemplate, dict]:
        """Split keywords into variables of the template, returned as part of it, and keywords of the processor.

        `tools` and `documents` always belong to the template, which rejects variables that it does not use.
        """
        own, always = CallOptions.names(), ("tools", "documents")
        given = {n: v for n, v in keywords.items() if v is not None and not (n in always and not v)}
        source = self.tokenizer.get_chat_template(chat_template, given.get("tools"))
        names = set(re.findall(r"\w+", source))
        variables = {n: v for n, v in given.items() if n in always or (n not in own and n in names)}
        template = self._template_of(chat_template, variables)
        return template, {name: value for name, value in given.items() if name not in variables}

    def __call__(self, *inputs: Any, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Convert text with images to padded model inputs. The text is encoded as it is, without the chat template.

        Render conversations with `apply_chat_template`, or bare user turns with `user_turns`. An image is written
        `<|image_pad|>`, as rendered prompts have it, or `<image>` (a literal one `\\<image>`) in texts without
        `<|image_pad|>`. Unlike in transformers, the defaults give what `generate` takes: padded tensors.

        Args:
            inputs: images and text, in transformers' order or text first; or text alone.
            text: a string or a list of them.
            images: one image, a list in the order of the placeholders, or one list per text. An image is a PIL image,
                an array, a tensor, a local path or anything else that the image processor accepts.
            kwargs: those of `CallOptions`, also nested in `text_kwargs` and `images_kwargs`.

        Raises:
            UserError: the numbers of images and of placeholders differ, in total or in a row.
            ValueError: an unknown keyword, or neither text nor images.
        """
        text, images = text_and_images(inputs, text, images)
        options = CallOptions.of(kwargs)
        if text is None:
            if images is None:
                raise ValueError("expected text, images or both, got neither")
            return BatchFeature({"pixel_values": self._pixels(images_without_text(images), options)})
        return self._model_inputs([self._encode(_as_rendered(one)) for one in as_texts(text)], images, options)

    def user_turns(self, text: Any, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Convert bare texts, each the only user turn of a conversation, to padded inputs that end where the answer
        begins.

        Args:
            text: a string or a list of them, with one `<image>` per image and `\\<image>` for a literal one. The text
                of control tokens stays text.
            images, kwargs: those of a call of the processor.

        Raises:
            UserError: the numbers of images and of placeholders differ, in total or in a row.
            ValueError: a rendered text, or an unknown keyword.
        """
        texts = as_texts(text)
        if any(isinstance(one, RenderedPrompt) for one in texts):
            raise ValueError("user_turns renders bare texts, got a rendered one; call the processor with it")
        turns = [[{"role": "user", "content": _parts_of(one)}] for one in texts]
        prompts = [self._render(read_messages(turn)[0], self.template, True, needs_end=False) for turn in turns]
        return self._model_inputs([self._encode(prompt) for prompt in prompts], images, CallOptions.of(kwargs))

    def _model_inputs(
        self, texts: Sequence[EncodedText], images: Any, options: CallOptions, masks: Sequence[list[bool]] | None = None
    ) -> BatchFeature:
        """Insert images and batch the rows; `masks` become `assistant_masks`."""
        pictures = assign_images([sum(text.is_image) for text in texts], images)
        rows = []
        for number, text in enumerate(texts):
            encoded = self.put_images(
                text.layout(None if masks is None else masks[number]), [None] * sum(text.is_image)
            )
            row = {"input_ids": encoded.input_ids}
            if masks is not None:
                row["assistant_masks"] = (encoded.labels != -100).long()
            if options.return_mm_token_type_ids:
                row["mm_token_type_ids"] = (encoded.input_ids == self.image_token_id).long()
            rows.append(row)
        image_ids = (self.image_token_id, self.image_start_id, self.image_end_id)
        fills = {name: self.pad_id if name == "input_ids" else 0 for name in rows[0]}
        batch = BatchFeature(options.batch.batch(rows, fills, self.tokenizer, image_ids))
        if pictures:
            batch["pixel_values"] = self._pixels(pictures, options)
        else:
            self._check_image_keywords(options)
        return batch

    def _check_image_keywords(self, options: CallOptions) -> None:
        self.image_processor.check_keywords(options.images)
        size = options.images.get("size")
        if size is not None and side_of(size) != self.image_processor.size:
            raise UserError(
                f"size={size!r} is not supported: the model reads images of {self.image_processor.size} pixels; leave "
                "it out"
            )

    def _pixels(self, pictures: Sequence, options: CallOptions) -> Any:
        self._check_image_keywords(options)
        pictures = [checked_picture(picture) for picture in pictures]
        tensors = options.batch.return_tensors
        pixels = self.image_processor(pictures, **options.images, return_tensors=tensors).pixel_values
        side = self.image_processor.size
        if wrong := [tuple(one.shape[1:]) for one in pixels if tuple(one.shape[1:]) != (side, side)]:
            raise UserError(f"the model reads images of {side} x {side} pixels, got {wrong[0]} with do_resize=False")
        return pixels

    def drawing_prompts(self, prompts: Sequence[str | None]) -> BatchFeature:
        """Convert prompts to left-padded ids that end with `<|image_start|>`; the next step draws the first position.

        An empty prompt or None makes the unconditional row of classifier-free guidance. Prompts are plain text,
        including any `<image>` in them.

        Raises:
            UserError: a prompt that is not a string.
        """
        prompts = [prompts] if isinstance(prompts, str) or prompts is None else list(prompts)
        rows = []
        for prompt in prompts:
            if not (prompt is None or isinstance(prompt, str)):
                raise UserError(f"expected a prompt as a string, got {type(prompt).__name__}: {str(prompt)[:80]}")
            message = Message("user", prompt or "")
            encoded = self._encode(self._render([message], self.template, True))
            rows.append({"input_ids": torch.tensor([*encoded.tokens, self.image_start_id])})
        return BatchFeature(
            BatchOptions(padding_side="left").batch(rows, {"input_ids": self.pad_id}, self.tokenizer, ())
        )


def _as_rendered(text: str) -> RenderedPrompt:
    """Return plain text as a rendered prompt, with `<|image_pad|>` for each image."""
    if isinstance(text, RenderedPrompt):
        return text
    text = collapse_images(text)
    # Rendered text marks its images with <|image_pad|>; <image> in it is what a user wrote.
    return RenderedPrompt(text if IMAGE_TOKEN in text else IMAGE_TOKEN.join(split_at_images(text)))


def _parts_of(text: str) -> list[dict]:
    """Parts of a bare user turn; line breaks after `<image>` are left out, as parts are joined by them."""
    pieces = split_at_images(text)
    parts = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece.lstrip("\n")}]
    return parts


AutoProcessor.register(EvoTokLlavaConfig, EvoTokLlavaProcessor, exist_ok=True)
