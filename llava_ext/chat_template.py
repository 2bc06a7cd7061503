"""Rendering of conversations with the tokenizer's chat template, with the spans of contents and of learned text."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from evotok_plugin.errors import UserError
from llava_ext.prompts.text_encoder import TextEncoder

_MARK = "\ue000{}\ue001"  # private-use characters, which neither templates nor texts use
_MARKS = re.compile("\ue000(\\d+)\ue001")
_PAIR = ("user", "assistant")


Span = tuple[int, int]  # first character, end


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as one string.

    Attributes:
        text: contents and the text that the template writes around them.
        assistant_spans: spans of the learned characters.
        content_spans: span of each message's content, which may be trimmed.
    """

    text: str
    assistant_spans: tuple[Span, ...]
    content_spans: tuple[Span, ...] = ()


class RenderedPrompt(str):
    """Text of a rendered conversation with the spans that users wrote.

    The processor encodes it to the same ids as the conversation itself. A plain string is still recognized as rendered,
    but then the text of a control token always becomes that token.
    """

    user_spans: tuple[Span, ...]
    assistant_spans: tuple[Span, ...]

    def __new__(
        cls, text: str, user_spans: Sequence[Span] = (), assistant_spans: Sequence[Span] = ()
    ) -> "RenderedPrompt":
        prompt = super().__new__(cls, text)
        prompt.user_spans, prompt.assistant_spans = tuple(user_spans), tuple(assistant_spans)
        return prompt


@dataclass(frozen=True)
class _Skeleton:
    """Text of a template around contents: literal 0, content `order[0]`, literal 1, content `order[1]`, ..."""

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def before(self, message: int) -> str:
        return self.literals[self.order.index(message)]

    def after(self, message: int) -> str:
        return self.literals[self.order.index(message) + 1]


class ConversationTemplate:
    """Renderer of role/content messages that tracks the span of each content.

    The template is rendered once per sequence of roles, with marks for contents; further conversations with the same
    roles only fill in their contents. Each conversation is checked against a plain rendering by the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> None:
        """Prepare a template.

        Args:
            chat_template: replaces the tokenizer's.
            variables: variables of the template in addition to the messages, such as `tools`, `documents` or
                `enable_thinking`.

        Raises:
            UserError: no template, a variable that the template does not use, or one that contains a control token.
        """
        if not (chat_template or tokenizer.chat_template):
            raise UserError(
                "this tokenizer has no chat_template, so the format of conversations is unknown; use an instruct "
                "model's tokenizer or set tokenizer.chat_template"
            )
        self._tokenizer, self._variables = tokenizer, dict(variables or {})
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._settings = dict(self._variables) | ({"chat_template": chat_template} if chat_template else {})
        if self._variables:
            self._check_variables(tokenizer.get_chat_template(chat_template, self._variables.get("tools")))

    def _check_variables(self, template: str) -> None:
        for name, value in self._variables.items():
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(f"the chat template does not use {name!r}; leave it out")
            found = [token for token in self.encoder.control_tokens.values() if token in str(value)]
            if found:
                raise UserError(
                    f"{name!r} contains the control token {found[0]!r}; only the chat template may write it"
                )

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> RenderedConversation:
        """Render messages `{"role", "content": str}`.

        An assistant's span consists of its content, any leading space that the model generates, and the end-of-turn
        token that the template writes after it. With `add_generation_prompt` the text ends where the span of the next
        answer would begin: prompts match training exactly, even if the template's own generation prompt differs from
        its finished turns (as with an empty block of thoughts).

        With `continue_final_message` the text ends with the last content, for the model to continue it.

        If the template drops white space around contents, all contents are trimmed.

        Raises:
            UserError: the template does not accept these roles, or does not reproduce the contents unchanged.
        """
        if not messages:
            raise UserError("the conversation has no messages")
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        if add_generation_prompt:
            full = self._fill((*roles, "assistant"), [*contents, _MARK.format("")])
            text = full.text[: full.assistant_spans[-1][0]]
            return RenderedConversation(text, full.assistant_spans[:-1], full.content_spans[:-1])
        full = self._fill(roles, contents)
        if continue_final_message:
            end = full.content_spans[-1][1]
            if end != max(span[1] for span in full.content_spans):
                raise UserError(
                    "the chat template writes another message after the last one, so it cannot be continued"
                )
            learned = tuple((start, min(stop, end)) for start, stop in full.assistant_spans)
            return RenderedConversation(full.text[:end], learned, full.content_spans)
        return full

    @cached_property
    def encoder(self) -> TextEncoder:
        """Encoder of the texts that `render` returns."""
        literals = [literal for skeleton in self._usual_skeletons for literal in skeleton.literals]
        return TextEncoder(self._tokenizer, "".join(literals))

    @cached_property
    def _usual_skeletons(self) -> list[_Skeleton]:
        """Two questions with answers, and one after a system message if the template accepts system messages."""
        try:
            return [self._skeleton(_PAIR * 2), self._skeleton(("system", *_PAIR))]
        except UserError:
            return [self._skeleton(_PAIR * 2)]

    def is_rendered(self, text: str) -> bool:
        """Whether a plain string is a conversation in this template's format, rendered by it or not.

        Such a string starts with a control token that begins a conversation (or with the full opening text if that has
        no control token), and contains the text between a question and its answer.
        """
        around = self._before_answer
        return bool(around) and around in text and text.lstrip().startswith(self._openings)

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """Texts with which a rendered conversation may begin."""
        found: list[str] = []
        for skeleton in self._usual_skeletons:
            opening = rest = skeleton.literals[0].strip()
            leading: list[str] = []
            while first := [token for token in self.encoder.control_tokens.values() if rest.startswith(token)]:
                leading.append(max(first, key=len))
                rest = rest.removeprefix(leading[-1]).lstrip()
            found += leading or [opening]
        return tuple(filter(None, found))

    def _fill(self, roles: tuple[str, ...], contents: list[str]) -> RenderedConversation:
        filled, plain = self._put_in(roles, contents), self._apply(roles, contents)
        if filled.text == plain:
            return filled
        del self._skeletons[roles]  # the template may write the date, which has changed
        for candidate in (contents, [content.strip() for content in contents]):
            filled = self._put_in(roles, candidate)
            if filled.text == self._apply(roles, candidate):
                return filled
        raise UserError(
            "the chat template changes message contents (it rewrites or drops parts of them), so the learned parts "
            f"cannot be located: expected {filled.text[:200]!r}, the template writes {plain[:200]!r}"
        )

    def _put_in(self, roles: tuple[str, ...], contents: Sequence[str]) -> RenderedConversation:
        skeleton = self._skeleton(roles)
        text = skeleton.literals[0]
        spans: list[Span] = []
        content_spans: dict[int, Span] = {}
        for message, following in zip(skeleton.order, skeleton.literals[1:], strict=True):
            start = len(text)
            text += contents[message]
            content_spans[message] = (start, len(text))
            if roles[message] == "assistant":
                if skeleton.before(message).endswith(self._lead):
                    start -= len(self._lead)
                learned_end = len(self._end_of_turn) if following.startswith(self._end_of_turn) else 0
                spans.append((start, len(text) + learned_end))
            text += following
        return RenderedConversation(text, tuple(spans), tuple(content_spans[n] for n in range(len(roles))))

    # Text of the template ----------------------------------------------------------------------------------------

    def _apply(self, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._settings
            )
        except Exception as error:  # templates come with models, and may raise anything
            raise UserError(f"the chat template does not accept messages of roles {tuple(roles)}: {error}") from error
        assert isinstance(text, str)
        return text

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        if roles not in self._skeletons:
            pieces = _MARKS.split(self._apply(roles, [_MARK.format(i) for i in range(len(roles))]))
            skeleton = _Skeleton(tuple(pieces[::2]), tuple(map(int, pieces[1::2])))
            for message, role in enumerate(roles):
                if skeleton.order.count(message) != 1:
                    raise UserError(
                        f"the chat template writes message {message} ({role}) of roles {roles} "
                        f"{skeleton.order.count(message)} times, expected once; it cannot be used for training"
                    )
            self._skeletons[roles] = skeleton
        return self._skeletons[roles]

    @cached_property
    def _asked(self) -> str:
        """Text between a question and its answer in the template's generation prompt."""
        return _MARKS.split(self._apply(["user"], [_MARK.format(0)], add_generation_prompt=True))[-1]

    @cached_property
    def _before_answer(self) -> str:
        """Text between a question and its answer that prompts and finished conversations have in common."""
        return os.path.commonprefix([self._skeleton(_PAIR).before(1), self._asked]).strip()

    @cached_property
    def _lead(self) -> str:
        """White space between the generation prompt and an answer, which the model generates."""
        before, asked = self._skeleton(_PAIR).before(1), self._asked
        extra = before.removeprefix(asked)
        return extra if extra != before and extra.isspace() else ""

    @cached_property
    def _end_of_turn(self) -> str:
        """Text that the template writes after every answer, whether or not it is the last one."""
        last, inner = self._skeleton(_PAIR).after(1), self._skeleton(_PAIR * 2).after(1)
        encoded = self._tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)
        others = self._tokenizer(inner, add_special_tokens=False)["input_ids"]
        shared = len(os.path.commonprefix([encoded["input_ids"], others]))
        end = last[: encoded["offset_mapping"][shared - 1][1]].rstrip() if shared else ""
        if not end:
            raise UserError(
                f"the chat template ends answers with {last!r} or {inner!r}, which have no end-of-turn token in "
                "common: a model would never learn to stop; use a template that ends every turn"
            )
        return end
