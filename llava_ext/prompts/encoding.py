"""Encoding of conversations and rendered text to ids, with images as placeholders or as residual tokens.

T tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.chat_template import ConversationTemplate, RenderedPrompt, Span
from llava_ext.prompts.call_arguments import check_count
from llava_ext.prompts.decoding import DecodingMixin
from llava_ext.prompts.messages import Message, read_messages
from llava_ext.prompts.text_encoder import TextEncoder
from llava_ext.sequence_layout import ConversationLayout, EncodedConversation


@dataclass(frozen=True)
class EncodedText:
    """Tokens of rendered text with one placeholder per image; all fields have one entry per token.

    Attributes:
        tokens: ids.
        starts: index of the first character.
        learned: whether the token belongs to an answer.
        is_image: whether the token is the placeholder of an image.
    """

    tokens: list[int]
    starts: list[int]
    learned: list[bool]
    is_image: list[bool]

    def overlapping(self, spans: Sequence[Span]) -> list[bool]:
        """Mark the tokens that share a character with one of the spans."""
        marked = [False] * len(self.tokens)
        for start, end in spans:
            first, stop = bisect_left(self.starts, start), bisect_left(self.starts, end)
            if start < end and 0 < first <= len(self.starts) and self.starts[first : first + 1] != [start]:
                first -= 1  # this token begins before the span and reaches into it
            marked[first:stop] = [True] * (stop - first)
        return marked

    def layout(self, learned: Sequence[bool] | None = None, image_steps: Sequence[int] = ()) -> ConversationLayout:
        """Return the layout with these tokens; `learned` replaces the tokens' own."""
        return ConversationLayout(
            self.tokens, list(self.learned if learned is None else learned), self.is_image, list(image_steps)
        )


class EncodingMixin(DecodingMixin):
    """Methods of `EvoTokLlavaProcessor` that encode conversations, and the length of images in a sequence.

    Attributes:
        image_head: "depth" or "flat".
        image_token_id, image_start_id, image_end_id: ids of the placeholder and of the delimiters.
    """

    image_head: str
    image_token_id: int
    image_start_id: int
    image_end_id: int

    @property
    def template(self) -> ConversationTemplate:
        """Renderer of conversations; the processor implements it."""
        raise NotImplementedError

    def encoder(self, template_text: str) -> TextEncoder:
        """Encoder for a template with the given text around turns; the processor implements it."""
        raise NotImplementedError

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
        encoded = self._encode(prompt)
        if drawn is None:
            drawn = [learned for learned, image in zip(encoded.learned, encoded.is_image, strict=True) if image]
        check_count(sum(encoded.is_image), len(drawn), "the conversation")
        return encoded.layout(image_steps=[self.image_steps(bool(one)) for one in drawn])

    def _render(
        self,
        messages: Sequence[Message],
        template: ConversationTemplate,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        needs_end: bool = True,
    ) -> RenderedPrompt:
        contents = [{"role": message.role, "content": message.text} for message in messages]
        rendered = template.render(contents, add_generation_prompt, continue_final_message, needs_end)
        spans = [
            span
            for message, content in zip(messages, rendered.content_spans, strict=True)
            for span in message.user_spans(*content)
        ]
        return RenderedPrompt(rendered.text, sorted(spans), rendered.assistant_spans, template.text)

    def _encode(self, prompt: RenderedPrompt) -> EncodedText:
        self.check_tokenizer()
        tokens, starts = self.encoder(prompt.template_text).encode(prompt, prompt.user_spans)
        learned = [False] * len(tokens)
        for span in prompt.assistant_spans:
            first, end = (bisect_left(starts, edge) for edge in span)
            learned[first:end] = [True] * (end - first)
        return EncodedText(tokens, starts, learned, [token == self.image_token_id for token in tokens])

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
        return EncodedConversation(torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long))

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
