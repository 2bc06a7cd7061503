"""Conversations through the tokenizer's own chat template, with the spans of contents and of what is learned."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError

from evotok_plugin.errors import UserError
from llava_ext.prompts.text_encoder import TextEncoder

_MARK = "\ue000{}\ue001"  # private-use characters: no template or text holds them
_MARKS = re.compile("\ue000(\\d+)\ue001")
_PAIR = ("user", "assistant")


Span = tuple[int, int]  # first character, end


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as one string.

    Attributes:
        text: contents and what the template writes around them.
        assistant_spans: the characters that are learned.
        content_spans: for each message the characters of its content, which is trimmed where `text` demands it.
    """

    text: str
    assistant_spans: tuple[Span, ...]
    content_spans: tuple[Span, ...] = ()


class RenderedPrompt(str):
    """The text of a rendered conversation that knows which of its characters users wrote.

    Given to the processor, it is encoded to the same ids as the conversation itself. As a plain string it is still
    recognized as rendered, but then a control token counts as one wherever it stands.
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

    def __init__(self, tokenizer, chat_template: str | None = None, variables: dict | None = None) -> None:
        """Args:
            chat_template: used instead of the tokenizer's.
            variables: what the template gets beside the messages, as `tools`, `documents` or `enable_thinking`.

        Raises:
            UserError: no template, a variable that the template does not use, or one that holds a control token.
        """
        if not (chat_template or tokenizer.chat_template):
            raise UserError(
                "this tokenizer has no chat_template, so it is not known how a conversation looks; use an instruct "
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
                raise UserError(f"{name!r} holds the control token {found[0]!r}; only the chat template may write it")

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> RenderedConversation:
        """Render messages `{"role", "content": str}`.

        An assistant's span is its content, any space before it that generation begins with, and the end-of-turn token
        that the template puts behind it. With `add_generation_prompt` the text ends where the span of the next answer
        would begin: a model is asked exactly as it was trained, also where a template's own generation prompt and its
        finished turns differ (as around an empty block of thoughts).

        With `continue_final_message` the text ends with the last content, for the model to continue it.

        Where the template does not put white space around a content through, contents are trimmed.

        Raises:
            UserError: the template does not take these roles, or does not put the contents through unchanged.
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
                    "the chat template writes another message behind the last one, so it cannot be continued"
                )
            learned = tuple((start, min(stop, end)) for start, stop in full.assistant_spans)
            return RenderedConversation(full.text[:end], learned, full.content_spans)
        return full

    @cached_property
    def encoder(self) -> TextEncoder:
        """Encodes what `render` gives."""
        literals = [literal for skeleton in self._usual_skeletons for literal in skeleton.literals]
        return TextEncoder(self._tokenizer, "".join(literals))

    @cached_property
    def _usual_skeletons(self) -> list[_Skeleton]:
        """Two questions with answers, and one behind a system message where the template takes one."""
        try:
            return [self._skeleton(_PAIR * 2), self._skeleton(("system", *_PAIR))]
        except ValueError:
            return [self._skeleton(_PAIR * 2)]

    def is_rendered(self, text: str) -> bool:
        """Whether a plain string is a conversation that this template rendered, or one written in its format.

        It begins like one (with a control token with which the template begins, or with the whole opening where that
        has none), and holds what the template writes between a question and its answer.
        """
        around = self._before_answer
        return bool(around) and around in text and text.lstrip().startswith(self._openings)

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """With which a rendered conversation may begin."""
        found = []
        for skeleton in self._usual_skeletons:
            opening = rest = skeleton.literals[0].strip()
            leading = []
            while first := [token for token in self.encoder.control_tokens.values() if rest.startswith(token)]:
                leading.append(max(first, key=len))
                rest = rest.removeprefix(leading[-1]).lstrip()
            found += leading or [opening]
        return tuple(filter(None, found))

    def _fill(self, roles: tuple[str, ...], contents: list[str]) -> RenderedConversation:
        filled, plain = self._put_in(roles, contents), self._apply(roles, contents)
        if filled.text == plain:
            return filled
        del self._skeletons[roles]  # a template may write today's date, and it was yesterday
        for candidate in (contents, [content.strip() for content in contents]):
            filled = self._put_in(roles, candidate)
            if filled.text == self._apply(roles, candidate):
                return filled
        raise UserError(
            "the chat template changes message contents (it rewrites or drops parts of them), so the learned parts "
            f"cannot be located: expected {filled.text[:200]!r}, the template gives {plain[:200]!r}"
        )

    def _put_in(self, roles: tuple[str, ...], contents: Sequence[str]) -> RenderedConversation:
        skeleton = self._skeleton(roles)
        text, spans, places = skeleton.literals[0], [], {}
        for message, following in zip(skeleton.order, skeleton.literals[1:], strict=True):
            start = len(text)
            text += contents[message]
            places[message] = (start, len(text))
            if roles[message] == "assistant":
                if skeleton.before(message).endswith(self._lead):
                    start -= len(self._lead)
                learned_end = len(self._end_of_turn) if following.startswith(self._end_of_turn) else 0
                spans.append((start, len(text) + learned_end))
            text += following
        return RenderedConversation(text, tuple(spans), tuple(places[n] for n in range(len(roles))))

    # What the template writes ----------------------------------------------------------------------------------

    def _apply(self, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._settings
            )
        except TemplateError as error:
            raise UserError(f"the chat template does not take messages of roles {tuple(roles)}: {error}") from error

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
        """The text between a question and its answer, as the template writes it for generation."""
        return _MARKS.split(self._apply(["user"], [_MARK.format(0)], add_generation_prompt=True))[-1]

    @cached_property
    def _before_answer(self) -> str:
        """The text between a question and its answer, in prompts and in finished conversations alike."""
        return os.path.commonprefix([self._skeleton(_PAIR).before(1), self._asked]).strip()

    @cached_property
    def _lead(self) -> str:
        """White space that stands between the generation prompt and an answer: the model writes it."""
        before, asked = self._skeleton(_PAIR).before(1), self._asked
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
            raise UserError(
                f"the chat template ends answers with {last!r} or {inner!r}, which have no end-of-turn token in "
                "common: a model would never learn to stop; use a template that ends every turn"
            )
        return end
