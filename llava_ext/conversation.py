"""Conversations through the tokenizer's own chat template, with the spans that the assistant says."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError

_MARK = "\ue000{}\ue001"  # private-use characters: no template or text holds them
_MARKS = re.compile("\ue000(\\d+)\ue001")
_PAIR = ("user", "assistant")


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as one string; `assistant_spans` are the (start, end) characters that are learned."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes around contents: literal 0, content `order[0]`, literal 1, content `order[1]`, ..."""

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def before(self, message: int) -> str:
        return self.literals[self.order.index(message)]

    def after(self, message: int) -> str:
        return self.literals[self.order.index(message) + 1]


class ConversationTemplate:
    """Renders role/content messages and knows where each content went.

    The template is rendered once a sequence of roles, with marks for contents; every further conversation with the
    same roles only fills them in. Each conversation is checked against a plain rendering by the template.
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat_template, so it is not known how a conversation looks; use an instruct "
                "model's tokenizer or set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> RenderedConversation:
        """Render messages `{"role", "content": str}`.

        An assistant's span is its content, any space before it that generation begins with, and the end-of-turn token
        that the template puts behind it. With `add_generation_prompt` the text ends where the span of the next answer
        would begin: a model is asked exactly as it was trained, also where a template's own generation prompt and its
        finished turns differ (as around an empty block of thoughts).

        Where the template does not put white space around a content through, contents are trimmed.

        Raises:
            ValueError: the template does not take these roles, or does not put the contents through unchanged.
        """
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        if add_generation_prompt:
            full = self._fill((*roles, "assistant"), [*contents, _MARK.format("")])
            return RenderedConversation(full.text[: full.assistant_spans[-1][0]], full.assistant_spans[:-1])
        return self._fill(roles, contents)

    def _fill(self, roles: tuple[str, ...], contents: list[str]) -> RenderedConversation:
        filled, plain = self._put_in(roles, contents), self._apply(roles, contents)
        if filled.text == plain:
            return filled
        del self._skeletons[roles]  # a template may write today's date, and it was yesterday
        for candidate in (contents, [content.strip() for content in contents]):
            filled = self._put_in(roles, candidate)
            if filled.text == self._apply(roles, candidate):
                return filled
        raise ValueError(
            "the chat template changes message contents (it rewrites or drops parts of them), so the learned parts "
            f"cannot be located: expected {filled.text[:200]!r}, the template gives {plain[:200]!r}"
        )

    def _put_in(self, roles: tuple[str, ...], contents: Sequence[str]) -> RenderedConversation:
        skeleton = self._skeleton(roles)
        text, spans = skeleton.literals[0], []
        for message, following in zip(skeleton.order, skeleton.literals[1:], strict=True):
            start = len(text)
            text += contents[message]
            if roles[message] == "assistant":
                if skeleton.before(message).endswith(self._lead):
                    start -= len(self._lead)
                learned_end = len(self._end_of_turn) if following.startswith(self._end_of_turn) else 0
                spans.append((start, len(text) + learned_end))
            text += following
        return RenderedConversation(text, tuple(spans))

    # What the template writes ----------------------------------------------------------------------------------

    def _apply(self, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template does not take messages of roles {tuple(roles)}: {error}") from error

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        if roles not in self._skeletons:
            pieces = _MARKS.split(self._apply(roles, [_MARK.format(i) for i in range(len(roles))]))
            skeleton = _Skeleton(tuple(pieces[::2]), tuple(map(int, pieces[1::2])))
            for message, role in enumerate(roles):
                if skeleton.order.count(message) != 1:
                    raise ValueError(
                        f"the chat template writes message {message} ({role}) of roles {roles} "
                        f"{skeleton.order.count(message)} times, expected once; it cannot be used for training"
                    )
            self._skeletons[roles] = skeleton
        return self._skeletons[roles]

    @cached_property
    def _lead(self) -> str:
        """White space that stands between the generation prompt and an answer: the model writes it."""
        before = self._skeleton(_PAIR).before(1)
        asked = _MARKS.split(self._apply(["user"], [_MARK.format(0)], add_generation_prompt=True))[-1]
        extra = before.removeprefix(asked)
        return extra if extra != before and extra.isspace() else ""

    @cached_property
    def _end_of_turn(self) -> str:
        """What the template puts behind every answer, be it the last one or not."""
        last, inner = self._skeleton(_PAIR).after(1), self._skeleton(_PAIR * 2).after(1)
        encoded = self._tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)
        others = self._tokenizer(inner, add_special_tokens=False)["input_ids"]
        shared = len(os.path.commonprefix([encoded["input_ids"], others]))
        end = last[: encoded["offset_mapping"][shared - 1][1]].rstrip() if shared else ""
        if not end:
            raise ValueError(
                f"the chat template ends answers with {last!r} or {inner!r}, which have no end-of-turn token in "
                "common: a model would never learn to stop; use a template that ends every turn"
            )
        return end
