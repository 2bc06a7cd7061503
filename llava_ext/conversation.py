"""Conversations through the tokenizer's own chat template, with the spans that the assistant says."""

from collections.abc import Sequence
from dataclasses import dataclass

_SENTINEL = "\ue000{}\ue001"  # private-use characters: no template or text holds them


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as one string; `assistant_spans` are the (start, end) characters that are learned."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]


class ConversationTemplate:
    """Renders role/content messages and knows where each content went.

    The template is rendered once a sequence of roles, with sentinels for contents; every further conversation with
    the same roles only fills them in. Each conversation is checked against a plain rendering by the template.
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat_template, so it is not known how a conversation looks; use an instruct "
                "model's tokenizer or set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        self._literals: dict[tuple[tuple[str, ...], bool], list[str]] = {}

    def _apply(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[str]:
        """The literal text before, between and after the contents."""
        key = (roles, add_generation_prompt)
        if key not in self._literals:
            marks = [_SENTINEL.format(i) for i in range(len(roles))]
            rest = self._apply(
                [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], add_generation_prompt
            )
            literals = []
            for index, mark in enumerate(marks):
                before, found, rest = rest.partition(mark)
                if not found:
                    raise ValueError(
                        f"the chat template drops or reorders message {index} ({roles[index]}) of roles {roles}; "
                        "it cannot be used for training"
                    )
                literals.append(before)
            self._literals[key] = [*literals, rest]
        return self._literals[key]

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> RenderedConversation:
        """Render messages `{"role", "content": str}`.

        An assistant's span is its content and the end-of-turn token that the template puts behind it.

        Raises:
            ValueError: the template does not put the contents through unchanged.
        """
        roles = tuple(message["role"] for message in messages)
        literals = self._skeleton(roles, add_generation_prompt)
        end_of_turn = self._skeleton(("user", "assistant"), False)[-1].rstrip()
        text, spans = "", []
        for literal, following, message in zip(literals, literals[1:], messages, strict=False):
            text += literal
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                learned_end = len(end_of_turn) if following.startswith(end_of_turn) else 0
                spans.append((start, len(text) + learned_end))
        text += literals[-1]
        plain = self._apply(messages, add_generation_prompt)
        if plain != text:
            raise ValueError(
                "the chat template changes message contents (it strips or rewrites them), so the learned parts "
                f"cannot be located: expected {text[:200]!r}, the template gives {plain[:200]!r}"
            )
        return RenderedConversation(text, tuple(spans))
