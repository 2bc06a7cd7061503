"""Encoding of text to ids in which text written by users never becomes a control token.

A tokenizer replaces the text of an added token by that token everywhere, even if a user wrote it. Here only the chat
template may write control tokens; in message contents their text is encoded like any other text.

T tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from evotok_plugin.errors import UserError

_STAND_IN = "\ue002control\ue003"  # private-use characters: replaces the template's control tokens
_ENCODE = getattr(PreTrainedTokenizerFast, "_encode_plus", None)  # tokenizers with their own are called


class TextEncoder:
    """Encoder of rendered conversations of one chat template.

    Control tokens are the special tokens of the tokenizer, and other added tokens that the template writes around
    turns. Further added tokens (`<think>`, `<loc1>`) are words of the text and remain tokens everywhere.

    Text without control tokens is encoded exactly as by the tokenizer itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template_text: str) -> None:
        """`template_text` is the text that the template writes around turns."""
        self._tokenizer, self._template_text = tokenizer, template_text
        self._state: object = None
        self._control: dict[int, str] = {}
        self._plain: Tokenizer | None = None

    @property
    def control_tokens(self) -> dict[int, str]:
        """Texts of the control tokens by id."""
        specials = tuple(self._tokenizer.all_special_tokens)
        state = (len(self._tokenizer), specials)
        if state != self._state:  # tokens may be added at any time
            self._control = {
                number: token.content
                for number, token in self._tokenizer.added_tokens_decoder.items()
                if token.special or token.content in specials or self._marks_turns(token.content)
            }
            self._state, self._plain = state, None
        return self._control

    def _marks_turns(self, token: str) -> bool:
        is_word = token.isspace() or token.isalnum()
        return token in self._template_text and not is_word

    def encode(self, text: str, user_spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Encode `text`; nothing within `user_spans` (start, end; sorted) becomes a control token.

        Returns:
            ids and the indices of their first characters, both (T,).

        Raises:
            UserError: the text is not valid Unicode, or the tokenizer's model itself, without added tokens, turns user
                text into a control token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the tokenizer would raise a TypeError about its own types
            raise UserError(f"the text is not valid Unicode at character {error.start}; encode it in UTF-8") from error
        ids, offsets = self._encode_all(text)
        control = self.control_tokens
        found = [
            (start, end, token)
            for token, (start, end) in zip(ids, offsets, strict=True)
            if token in control and self._is_written_out(token, text, (start, end))
        ]
        by_template = [(start, end, token) for start, end, token in found if not _overlap(text, start, end, user_spans)]
        if len(by_template) == len(found):
            return ids, [start for start, _ in offsets]
        return self._encode_apart(text, by_template)

    def _encode_all(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans as the tokenizer's own call gives them, which takes several times as long for a short text."""
        tokenizer, backend = self._tokenizer, self._tokenizer.backend_tokenizer
        as_in_call = (
            backend.truncation is None
            and backend.padding is None
            and backend.encode_special_tokens == tokenizer.split_special_tokens
        )
        if as_in_call and getattr(type(tokenizer), "_encode_plus", None) is _ENCODE is not None:
            encoding = backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _is_written_out(self, token: int, text: str, span: tuple[int, int]) -> bool:
        """Whether the token represents its own text; the unknown token represents any word."""
        return token != self._tokenizer.unk_token_id or text[slice(*span)].strip() == self.control_tokens[token]

    def _encode_apart(self, text: str, by_template: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
        """Encode with control tokens only at the given (start, end, id)."""
        parts: list[str] = []
        starts_in, starts_out, end = [0], [0], 0
        for start, stop, _ in by_template:
            parts += [text[end:start], _STAND_IN]
            starts_in += [starts_in[-1] + len(parts[-2]), starts_in[-1] + len(parts[-2]) + len(_STAND_IN)]
            starts_out += [start, stop]
            end = stop
        encoded = self._plain_tokenizer().encode("".join([*parts, text[end:]]), add_special_tokens=False)
        stand_in = self._plain_tokenizer().token_to_id(_STAND_IN)
        assert stand_in is not None
        if encoded.ids.count(stand_in) != len(by_template):
            raise UserError(f"the text contains {_STAND_IN!r}, which is reserved; remove it")
        ids: list[int] = []
        starts: list[int] = []
        written = iter(by_template)
        for token, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            part = bisect_right(starts_in, start) - 1
            ids.append(next(written)[2] if token == stand_in else token)
            starts.append(starts_out[part] + start - starts_in[part])
            span = (starts[-1], starts[-1] + stop - start)
            if token in self.control_tokens and self._is_written_out(token, text, span):
                raise UserError(
                    f"the tokenizer encodes plain text to the control token {self.control_tokens[token]!r}; change the "
                    "wording of the text"
                )
        return ids, starts

    def _plain_tokenizer(self) -> Tokenizer:
        """Return a copy of the tokenizer that encodes control tokens as plain text, except `_STAND_IN`."""
        if self._plain is None:
            plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
            plain.no_padding()
            plain.no_truncation()
            plain.add_special_tokens([AddedToken(text, special=True) for text in self.control_tokens.values()])
            plain.add_tokens([AddedToken(_STAND_IN, normalized=False, special=False)])
            plain.encode_special_tokens = True  # special tokens are then encoded as text
            self._plain = plain
        return self._plain


def _overlap(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether text[start:end], without the white space that belongs to the token, overlaps one of the spans."""
    token = text[start:end]
    start, end = start + len(token) - len(token.lstrip()), end - len(token) + len(token.rstrip())
    return any(first < end and start < last for first, last in spans)
