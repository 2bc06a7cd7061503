"""Text to ids in which the text that users write never becomes a control token.

A tokenizer replaces the text of an added token by that token wherever it stands, also where a user wrote it. Here only
the chat template may write control tokens; in contents their text is encoded like any other text.

T tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from evotok_plugin.errors import UserError

_STAND_IN = "\ue002control\ue003"  # private-use characters, in place of the template's own control tokens


class TextEncoder:
    """Encodes rendered conversations of one chat template.

    Control tokens are the special tokens of the tokenizer, and those of its other added tokens that the template writes
    around turns. Further added tokens (`<think>`, `<loc1>`) are words of the text and stay tokens everywhere.

    Text without control tokens is encoded exactly as by the tokenizer itself.
    """

    def __init__(self, tokenizer, template_text: str) -> None:
        """`template_text` is what the template writes around turns."""
        self._tokenizer, self._template_text = tokenizer, template_text
        self._state: object = None
        self._control: dict[int, str] = {}
        self._plain: Tokenizer | None = None

    @property
    def control_tokens(self) -> dict[int, str]:
        """Text of the control tokens by id."""
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
        """Encode `text`, in whose `user_spans` (start, end; sorted) nothing becomes a control token.

        Returns:
            ids and the characters where they start, both (T,).

        Raises:
            UserError: a tokenizer whose model itself, without added tokens, makes a control token of user text.
        """
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        found = [(n, token) for n, token in enumerate(ids) if token in self.control_tokens]
        found = [(*offsets[n], token) for n, token in found if self._is_written_out(token, text, offsets[n])]
        by_template = [(start, end, token) for start, end, token in found if not _overlap(text, start, end, user_spans)]
        if len(by_template) == len(found):
            return ids, [start for start, _ in offsets]
        return self._encode_apart(text, by_template)

    def _is_written_out(self, token: int, text: str, span: tuple[int, int]) -> bool:
        """Whether the token stands for its own text; the unknown token stands for any word."""
        return token != self._tokenizer.unk_token_id or text[slice(*span)].strip() == self.control_tokens[token]

    def _encode_apart(self, text: str, by_template: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
        """Encode with control tokens at the given (start, end, id) alone."""
        parts, starts_in, starts_out, end = [], [0], [0], 0
        for start, stop, _ in by_template:
            parts += [text[end:start], _STAND_IN]
            starts_in += [starts_in[-1] + len(parts[-2]), starts_in[-1] + len(parts[-2]) + len(_STAND_IN)]
            starts_out += [start, stop]
            end = stop
        encoded = self._plain_tokenizer().encode("".join([*parts, text[end:]]), add_special_tokens=False)
        stand_in = self._plain_tokenizer().token_to_id(_STAND_IN)
        if encoded.ids.count(stand_in) != len(by_template):
            raise UserError(f"the text holds {_STAND_IN!r}, which is reserved; remove it")
        written, ids, starts = iter(by_template), [], []
        for token, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            part = bisect_right(starts_in, start) - 1
            ids.append(next(written)[2] if token == stand_in else token)
            starts.append(starts_out[part] + start - starts_in[part])
            span = (starts[-1], starts[-1] + stop - start)
            if token in self.control_tokens and self._is_written_out(token, text, span):
                raise UserError(
                    f"the tokenizer makes the control token {self.control_tokens[token]!r} of plain text; write the "
                    "text in another way"
                )
        return ids, starts

    def _plain_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer that takes no control token out of text, only `_STAND_IN`."""
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
    """Whether text[start:end], without the white space that the token took with it, touches one of the spans."""
    token = text[start:end]
    start, end = start + len(token) - len(token.lstrip()), end - len(token) + len(token.rstrip())
    return any(first < end and start < last for first, last in spans)
