"""Rendering of conversations with the tokenizer's chat template, with the spans of contents and of learned text."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from evotok_plugin.errors import UserError
from llava_ext.prompts.messages import UnsupportedMessage
from llava_ext.prompts.text_encoder import TextEncoder

_MARK = "\ue000{}\ue001"  # private-use characters, which neither templates nor texts use
_MARKS = re.compile("\ue000(\\d+)\ue001")
_PAIR = ("user", "assistant")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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

    The processor encodes it to the same ids as the conversation itself. In a plain string with the same characters, the
    text of a control token always becomes that token, whoever wrote it.

    Attributes:
        user_spans: spans of the text that users wrote.
        assistant_spans: spans of the answers.
        template_text: text of the template around turns, see `TextEncoder`.
    """

    user_spans: tuple[Span, ...]
    assistant_spans: tuple[Span, ...]
    template_text: str

    def __new__(
        cls,
        text: str,
        user_spans: Sequence[Span] = (),
        assistant_spans: Sequence[Span] = (),
        template_text: str = "",
    ) -> "RenderedPrompt":
        prompt = super().__new__(cls, text)
        prompt.user_spans, prompt.assistant_spans = tuple(user_spans), tuple(assistant_spans)
        prompt.template_text = template_text
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
            UserError: no template, a variable that the template does not use, or one that contains a control token
                and is not itself one, such as `bos_token`.
        """
        if not (chat_template or tokenizer.chat_template):
            raise UserError(
                "this tokenizer has no chat_template, so the format of conversations is unknown; use an instruct "
                "model's tokenizer or set tokenizer.chat_template"
            )
        self._tokenizer, self._variables = tokenizer, dict(variables or {})
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._settings = dict(self._variables) | ({"chat_template": chat_template} if chat_template else {})
        self._source: str = tokenizer.get_chat_template(chat_template, self._variables.get("tools"))
        self._check_variables()

    def _check_variables(self) -> None:
        if not self._variables:
            return
        encoder = TextEncoder(self._tokenizer, self.text)
        for name, value in self._variables.items():
            if not re.search(rf"\b{re.escape(name)}\b", self._source):
                raise UserError(f"the chat template does not use {name!r}; leave it out")
            found = [token for token in encoder.control_tokens.values() if token in str(value)]
            if found and not (name.endswith("_token") and value in found):
                raise UserError(
                    f"{name!r} contains the control token {found[0]!r}; only the chat template may write it"
                )

    def render(
        self,
        messages: Sequence[dict],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        needs_end: bool = True,
    ) -> RenderedConversation:
        """Render messages `{"role", "content": str}`.

        An assistant's span consists of its content, any leading space that the model generates, and the end-of-turn
        token that the template writes after it. With `add_generation_prompt` the text ends where the span of the next
        answer would begin: prompts match training exactly, even if the template's own generation prompt differs from
        its finished turns (as with an empty block of thoughts).

        With `continue_final_message` the text ends with the last content, for the model to continue it.

        If the template drops white space around contents, all contents are trimmed.

        Without `needs_end`, the template need not end answers with a token; it then cannot be used for training.

        Raises:
            UserError: the template does not accept these roles, or does not reproduce the contents unchanged.
        """
        if not messages:
            raise UserError("the conversation has no messages")
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        if add_generation_prompt:
            full = self._fill((*roles, "assistant"), [*contents, _MARK.format("")], needs_end)
            text = full.text[: full.assistant_spans[-1][0]]
            return RenderedConversation(text, full.assistant_spans[:-1], full.content_spans[:-1])
        full = self._fill(roles, contents, needs_end)
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
    def text(self) -> str:
        """Text that the template writes around turns."""
        return "".join(literal for skeleton in self._usual_skeletons for literal in skeleton.literals)

    @property
    def _usual_skeletons(self) -> list[_Skeleton]:
        """Two questions with answers, one after a system message, or one; those that the template accepts."""
        found: list[_Skeleton] = []
        for roles in (_PAIR * 2, ("system", *_PAIR), _PAIR):
            try:
                found.append(self._skeleton(roles))
            except UserError:
                continue
        return found

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with `{% generation %}`."""
        return bool(_GENERATION.search(self._source))

    def marked_answers(
        self, messages: Sequence[dict], rendered: str, add_generation_prompt: bool = False
    ) -> tuple[Span, ...]:
        """Spans of the answers that the template marks with `{% generation %}`.

        Args:
            messages: those of `render`.
            rendered: the text that `render` returned for them, to which the spans refer.
        """
        variables = {name: value for name, value in self._variables.items() if name not in ("tools", "documents")}
        result: Any = render_jinja_template(  # annotated as a string
            [self._messages([m["role"] for m in messages], [m["content"] for m in messages])],
            tools=self._variables.get("tools"),
            documents=self._variables.get("documents"),
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **{**self._tokenizer.special_tokens_map, **variables},
        )
        (text,), (spans,) = result
        shared = len(os.path.commonprefix([text, rendered]))
        return tuple((start, min(end, shared)) for start, end in spans if start < shared)

    def _fill(self, roles: tuple[str, ...], contents: list[str], needs_end: bool) -> RenderedConversation:
        filled, plain = self._put_in(roles, contents, needs_end), self._apply(roles, contents)
        if filled.text == plain:
            return filled
        del self._skeletons[roles]  # the template may write the date, which has changed
        for candidate in (contents, [content.strip() for content in contents]):
            filled = self._put_in(roles, candidate, needs_end)
            if filled.text == self._apply(roles, candidate):
                return filled
        raise UserError(
            "the chat template changes message contents (it rewrites or drops parts of them), so the learned parts "
            f"cannot be located: expected {filled.text[:200]!r}, the template writes {plain[:200]!r}"
        )

    def _put_in(self, roles: tuple[str, ...], contents: Sequence[str], needs_end: bool) -> RenderedConversation:
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
                end = self._end_of_turn
                if needs_end and not end:
                    raise UserError(
                        "the chat template ends answers without an end-of-turn token: a model would never learn to "
                        "stop; use a template that ends every turn"
                    )
                learned_end = len(end) if following.startswith(end) else 0
                spans.append((start, len(text) + learned_end))
            text += following
        return RenderedConversation(text, tuple(spans), tuple(content_spans[n] for n in range(len(roles))))

    # Text of the template ----------------------------------------------------------------------------------------

    def _apply(self, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                self._messages(roles, contents),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._settings,
            )
        except Exception as error:  # templates come with models, and may raise anything
            raise UnsupportedMessage(
                f"the chat template does not accept messages of roles {tuple(roles)}: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    def _messages(self, roles: Sequence[str], contents: Sequence[str]) -> list[dict]:
        """Messages as the template reads them: with strings, or each with one part of text."""
        values: Sequence[Any] = contents
        if self._reads_parts:
            values = [[{"type": "text", "text": content}] for content in contents]
        return [{"role": role, "content": value} for role, value in zip(roles, values, strict=True)]

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads lists of parts but not strings, as those of many vision-language models."""
        mark = _MARK.format(0)
        for content, is_parts in ((mark, False), ([{"type": "text", "text": mark}], True)):
            messages: Any = [{"role": "user", "content": content}]
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, **self._settings)
            except Exception:  # templates come with models, and may raise anything
                continue
            if str(text).count(mark) == 1:
                return is_parts
        return False

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
    def _lead(self) -> str:
        """White space between the generation prompt and an answer, which the model generates."""
        before, asked = self._skeleton(_PAIR).before(1), self._asked
        extra = before.removeprefix(asked)
        return extra if extra != before and extra.isspace() else ""

    @cached_property
    def _end_of_turn(self) -> str:
        """Text that the template writes after every answer, whether or not it is the last one; "" if there is none."""
        last, inner = self._skeleton(_PAIR).after(1), self._skeleton(_PAIR * 2).after(1)
        encoded = self._tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)
        others = self._tokenizer(inner, add_special_tokens=False)["input_ids"]
        shared = len(os.path.commonprefix([encoded["input_ids"], others]))
        return last[: encoded["offset_mapping"][shared - 1][1]].rstrip() if shared else ""
