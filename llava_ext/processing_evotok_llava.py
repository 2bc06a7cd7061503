"""The processor: conversations and images to the model's flat token sequence, and ids back to text."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.errors import UserError
from llava_ext.chat_template import ConversationTemplate, RenderedPrompt
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.prompts.batching import BatchOptions
from llava_ext.prompts.call_arguments import assign_images, check_count, images_without_text, text_and_images
from llava_ext.prompts.decoding import DecodingMixin
from llava_ext.prompts.image_tokens import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKENS,
    check_residual_range,
    image_token_ids,
)
from llava_ext.prompts.messages import IMAGE_TOKEN, Message, check_pictures, checked_picture, read_messages
from llava_ext.prompts.placeholders import LLAVA_IMAGE, split_at_images
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

_OTHER_INPUTS = {"videos", "audio"}  # inputs of other processors; transformers passes them as None


class EvoTokLlavaProcessor(DecodingMixin, ProcessorMixin):
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
        self._checked: object = None
        super().__init__(image_processor, tokenizer)
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

    def _template_of(self, chat_template: str | None, variables: dict) -> ConversationTemplate:
        if variables:
            return ConversationTemplate(self.tokenizer, chat_template, variables)
        key = (id(self.tokenizer), str(self.tokenizer.chat_template), chat_template)
        if key not in self._templates:
            self._templates = {key: ConversationTemplate(self.tokenizer, chat_template)}
        return self._templates[key]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Return the constructor's arguments, for saving."""
        templates, self._templates = self._templates, {}  # not worth copying
        try:
            values = super().to_dict(*args, **kwargs)
        finally:
            self._templates = templates
        for derived in ("_templates", "_checked", "image_token_id", "image_start_id", "image_end_id"):
            values.pop(derived, None)
        return values

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does.

        Raises:
            UserError: added tokens overlap the residual range, so the saved folder could not be loaded.
        """
        self.check_tokenizer()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # Sequences -----------------------------------------------------------------------------------------------

    def image_steps(self, drawn: bool) -> int:
        """Number of LLM steps of an image including its delimiters: one per position, or one per residual token if the
        flat head draws it."""
        return 2 + self.num_positions * (self.num_levels if drawn and self.image_head == "flat" else 1)

    def encode_conversation(
        self, messages: Sequence[dict], drawn_codes: Sequence[Tensor | None], add_generation_prompt: bool = False
    ) -> EncodedConversation:
        """Encode messages `{"role", "content"}` and their images to ids and labels.

        Contents have the form that `apply_chat_template` accepts, without pictures, and refer to one image per entry of
        `drawn_codes`.

        Args:
            drawn_codes: for each image in order its codes (N, l >= num_levels) if it is drawn, None if it is read.

        Raises:
            UserError: the numbers of `<image>` and of images differ, or codes have another number of positions.
        """
        layout = self.lay_out(messages, add_generation_prompt, [codes is not None for codes in drawn_codes])
        return self.put_images(layout, drawn_codes)

    def lay_out(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, drawn: Sequence[bool] | None = None
    ) -> ConversationLayout:
        """Encode messages as `encode_conversation` does, but leave the images out: their length and learned parts.

        Args:
            drawn: for each image, whether it is drawn; by default the images in assistant turns.

        Raises:
            UserError: the chat template cannot render the messages, or their number of images is not that of `drawn`.
        """
        prompt = self._render(read_messages(messages)[0], self.template, add_generation_prompt)
        tokens, learned, is_image = self._encode(prompt, self.template)
        if drawn is None:
            drawn = [by_assistant for by_assistant, image in zip(learned, is_image, strict=True) if image]
        check_count(sum(is_image), len(drawn), "the conversation")
        return ConversationLayout(tokens, learned, is_image, [self.image_steps(bool(one)) for one in drawn])

    def _render(
        self,
        messages: Sequence[Message],
        template: ConversationTemplate,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> RenderedPrompt:
        contents = [{"role": message.role, "content": message.text} for message in messages]
        rendered = template.render(contents, add_generation_prompt, continue_final_message)
        spans = [
            span
            for message, content in zip(messages, rendered.content_spans, strict=True)
            for span in message.user_spans(*content)
        ]
        return RenderedPrompt(rendered.text, sorted(spans), rendered.assistant_spans)

    def _encode(
        self, prompt: RenderedPrompt, template: ConversationTemplate
    ) -> tuple[list[int], list[bool], list[bool]]:
        """Return tokens with one placeholder per image, a mask of the learned ones, and a mask of the placeholders."""
        self.check_tokenizer()
        tokens, starts = template.encoder.encode(prompt, prompt.user_spans)
        learned = [False] * len(tokens)
        for span in prompt.assistant_spans:
            first, end = (bisect_left(starts, edge) for edge in span)
            learned[first:end] = [True] * (end - first)
        return tokens, learned, [token == self.image_token_id for token in tokens]

    def put_images(self, layout: ConversationLayout, drawn_codes: Sequence[Tensor | None]) -> EncodedConversation:
        """Insert the images into a layout; `drawn_codes` is that of `encode_conversation`."""
        check_count(sum(layout.is_image), len(drawn_codes), "the conversation")
        ids: list[int] = []
        labels: list[int] = []
        images = iter(drawn_codes)
        for token, learned, is_image in zip(layout.tokens, layout.learned, layout.is_image, strict=True):
            piece = self._image_ids(next(images)) if is_image else [token]
            ids += piece
            labels += piece if learned else [-100] * len(piece)
        # Images that are read are not learned.
        labels = [-100 if label == self.image_token_id else label for label in labels]
        return EncodedConversation(torch.tensor(ids), torch.tensor(labels))

    def _image_ids(self, codes: Tensor | None) -> list[int]:
        if codes is None:
            inside = [self.image_token_id] * self.num_positions
        else:
            if codes.shape[0] != self.num_positions:
                raise UserError(f"expected codes of {self.num_positions} positions, got {codes.shape[0]}")
            inside = self.vocabulary.to_ids(codes[:, : self.num_levels].long()).flatten().tolist()
        return [self.image_start_id, *inside, self.image_end_id]

    def pad(self, sequences: Sequence[Tensor], value: int, side: str = "left") -> Tensor:
        """Stack sequences (T_i,) to (B, T) with `value` on the given side."""
        return torch.nn.utils.rnn.pad_sequence(list(sequences), True, value, padding_side=side)

    @property
    def pad_id(self) -> int:
        """Id of padding: the pad token, or the end-of-sequence token of a tokenizer without one."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    # Inference -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]  # the template's own variables are keywords only
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        sanitize_control_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Convert Hugging Face messages (one conversation or a list of them) to left-padded model inputs.

        Contents have the form that `llava_ext.prompts.messages.read_messages` accepts. Text never becomes a control
        token, so `sanitize_control_tokens` is not needed.

        Args:
            chat_template: replaces the tokenizer's.
            continue_final_message: end with the last message's content, for the model to continue it.
            return_assistant_tokens_mask: add `assistant_masks` (B, T), 1 on the assistant's answers.
            return_dict: False returns `input_ids` alone.
            kwargs: those of `BatchOptions`, also nested in `processor_kwargs`, and variables of the chat template
                (`tools`, `documents`, `enable_thinking`, ...).

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
        if continue_final_message not in (True, False, "content"):
            raise ValueError(f"continue_final_message: expected True or False, got {continue_final_message!r}")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if sanitize_control_tokens is False:
            raise ValueError("sanitize_control_tokens=False is not supported: contents are always plain text")
        batched = (
            bool(conversation)
            and isinstance(conversation, (list, tuple))
            and isinstance(conversation[0], (list, tuple))
        )
        template, keywords = self._split_keywords(chat_template, kwargs)
        if keywords and not tokenize:
            raise ValueError(f"{', '.join(keywords)} have no effect without tokenize=True")
        pictures: list = []
        prompts = []
        for messages in conversation if batched else [conversation]:
            read, found = read_messages(messages)
            pictures += found
            prompts.append(self._render(read, template, add_generation_prompt, bool(continue_final_message)))
        if not tokenize:
            return prompts if batched else prompts[0]
        check_pictures(pictures)
        options = BatchOptions.of({"return_tensors": return_tensors, **keywords})
        batch = self._model_inputs(prompts, template, pictures, options, return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def _split_keywords(self, chat_template: str | None, keywords: Mapping) -> tuple[ConversationTemplate, dict]:
        """Split keywords into variables of the template, returned as part of it, and keywords of the processor.

        `tools` and `documents` always belong to the template, which rejects variables that it does not use.
        """
        given = {name: value for name, value in keywords.items() if value is not None}
        own = BatchOptions.names()
        source = self.tokenizer.get_chat_template(chat_template, given.get("tools"))
        variables = {n: v for n, v in given.items() if n in ("tools", "documents") or (n not in own and n in source)}
        template = self._template_of(chat_template, variables)
        return template, {name: value for name, value in given.items() if name not in variables}

    def __call__(self, *inputs: Any, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Convert text with images to left-padded model inputs that end where the answer begins.

        A text is a user's turn with one `<image>` per image, which is rendered with the chat template; it may contain a
        literal `\\<image>`. Text from `apply_chat_template(tokenize=False)`, or written in the format of the chat
        template, is encoded unchanged.

        Args:
            inputs: images and text, in transformers' order or text first; or text alone.
            text: a string or a list of them.
            images: one image, a list in the order of the `<image>`, or one list per text. An image is a PIL image, an
                array, a tensor, a local path or anything else that the image processor accepts.
            kwargs: those of `BatchOptions`, also nested in `text_kwargs`.

        Raises:
            UserError: the numbers of images and of `<image>` differ, in total or in a row.
            ValueError: an unknown keyword, or neither text nor images.
        """
        text, images = text_and_images(inputs, text, images)
        given = {name: value for name, value in kwargs.items() if name not in _OTHER_INPUTS or value is not None}
        options = BatchOptions.of(given)
        if text is None:
            if images is None:
                raise ValueError("expected text, images or both, got neither")
            return BatchFeature({"pixel_values": self._pixels(images_without_text(images), options)})
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("expected text as a string or a list of strings; pass messages to apply_chat_template")
        return self._model_inputs([self._prompt_of(one) for one in texts], self.template, images, options)

    def _prompt_of(self, text: str) -> RenderedPrompt:
        """Render a user's turn with the chat template; return a rendered conversation unchanged."""
        if isinstance(text, RenderedPrompt):
            return text
        if self.template.is_rendered(text):
            return RenderedPrompt(IMAGE_TOKEN.join(split_at_images(text)))
        pieces = split_at_images(text)
        parts = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece.lstrip("\n")}]
        messages, _ = read_messages([{"role": "user", "content": parts}])
        return self._render(messages, self.template, add_generation_prompt=True)

    def _model_inputs(
        self,
        prompts: Sequence[RenderedPrompt],
        template: ConversationTemplate,
        images: Any,
        options: BatchOptions,
        with_mask: bool = False,
    ) -> BatchFeature:
        layouts, rows = [self._encode(prompt, template) for prompt in prompts], []
        pictures = assign_images([sum(is_image) for *_, is_image in layouts], images)
        for tokens, learned, is_image in layouts:
            count = sum(is_image)
            encoded = self.put_images(ConversationLayout(tokens, learned, is_image, [0] * count), [None] * count)
            row = {"input_ids": encoded.input_ids}
            if with_mask:
                row["assistant_masks"] = (encoded.labels != -100).long()
            rows.append(row)
        fills = {"input_ids": self.pad_id} | ({"assistant_masks": 0} if with_mask else {})
        image_ids = (self.image_token_id, self.image_start_id, self.image_end_id)
        batch = BatchFeature(options.batch(rows, fills, self.tokenizer, image_ids))
        if pictures:
            batch["pixel_values"] = self._pixels(pictures, options)
        return batch

    def _pixels(self, pictures: Sequence, options: BatchOptions) -> Any:
        pictures = [checked_picture(picture) for picture in pictures]
        return self.image_processor(pictures, return_tensors=options.return_tensors or "pt").pixel_values

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
            tokens, _, _ = self._encode(self._render([message], self.template, True), self.template)
            rows.append({"input_ids": torch.tensor([*tokens, self.image_start_id])})
        return BatchFeature(BatchOptions().batch(rows, {"input_ids": self.pad_id}, self.tokenizer, ()))


AutoProcessor.register(EvoTokLlavaConfig, EvoTokLlavaProcessor, exist_ok=True)
