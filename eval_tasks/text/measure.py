"""Greedy answers and held-out losses of a model and of its base."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from eval_tasks.text.models import TextModel
from evotok_plugin.common.files import user_path
from evotok_plugin.common.foreign_files import reading
from evotok_plugin.errors import UserError

_PROMPTS, _TEXTS = "prompts.txt", "texts.txt"


@dataclass(frozen=True)
class Answer:
    """The greedy answers of both models to a prompt."""

    prompt: str
    base: str
    model: str
    identical: bool


@dataclass(frozen=True)
class TextAbilities:
    """Text abilities of a model and of its base.

    Attributes:
        base_loss, model_loss: mean negative log-likelihood per token of the texts, in nats.
        num_tokens: tokens of the texts that have a loss.
    """

    answers: tuple[Answer, ...]
    base_loss: float
    model_loss: float
    num_tokens: int

    @property
    def num_identical(self) -> int:
        return sum(answer.identical for answer in self.answers)

    @property
    def loss_ratio(self) -> float:
        return self.model_loss / self.base_loss

    def as_table(self) -> str:
        """A Markdown table, followed by the answers that differ."""
        lines = [
            "| text | base | model | change |",
            "|---|---|---|---|",
            f"| identical greedy answers | {len(self.answers)} | {self.num_identical} of {len(self.answers)} | "
            f"{self.num_identical - len(self.answers)} |",
            f"| held-out loss per token ({self.num_tokens} tokens) | {self.base_loss:.4f} | {self.model_loss:.4f} | "
            f"{100 * (self.loss_ratio - 1):+.2f} % |",
        ]
        for answer in self.answers:
            if not answer.identical:
                lines += ["", f"{answer.prompt}", f"  base:  {_one_line(answer.base)}"]
                lines += [f"  model: {_one_line(answer.model)}"]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """All results, for JSON."""
        return {
            "num_prompts": len(self.answers),
            "num_identical": self.num_identical,
            "base_loss": self.base_loss,
            "model_loss": self.model_loss,
            "loss_ratio": self.loss_ratio,
            "num_tokens": self.num_tokens,
            "answers": [asdict(answer) for answer in self.answers],
        }


def _one_line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one per line; by default the 20 of the package.

    Raises:
        UserError: the file cannot be read or has none.
    """
    return _nonempty(_read(path, _PROMPTS).splitlines(), path, "prompt")


def read_texts(path: Path | None) -> list[str]:
    """The paragraphs of a text file, separated by empty lines; by default those of the package.

    Raises:
        UserError: the file cannot be read or has none.
    """
    paragraphs = [" ".join(part.split()) for part in _read(path, _TEXTS).split("\n\n")]
    return _nonempty(paragraphs, path, "paragraph")


def _read(path: Path | None, packaged: str) -> str:
    if path is None:
        return files("eval_tasks.text").joinpath(packaged).read_text(encoding="utf-8")
    with reading(path, "save it as UTF-8 text", "read as text"):
        return user_path(path).read_text(encoding="utf-8-sig")


def _nonempty(parts: Sequence[str], path: Path | None, what: str) -> list[str]:
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise UserError(f"expected at least one {what} in {path}, got none")
    return found


@dataclass(frozen=True)
class EncodedTexts:
    """Prompts and texts as the ids that both models get."""

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]


def encode(opened: TextModel, prompts: Sequence[str], texts: Sequence[str]) -> EncodedTexts:
    """Encode prompts with the chat template and texts without it.

    Raises:
        UserError: a text of fewer than two tokens, which has no loss.
    """
    encoded = [tuple(opened.text_ids(text)) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) < 2:
            raise UserError(f"expected texts of at least two tokens, got {text!r}")
    return EncodedTexts(tuple(tuple(opened.prompt_ids(prompt)) for prompt in prompts), tuple(encoded))


def check_same_tokens(model: EncodedTexts, base: EncodedTexts) -> None:
    """Check that both models encode prompts and texts to the same ids, so that answers and losses can be compared.

    Raises:
        UserError: they do not.
    """
    different = sum(a != b for a, b in zip(model.prompts + model.texts, base.prompts + base.texts, strict=True))
    if different:
        raise UserError(
            f"{different} of {len(model.prompts + model.texts)} prompts and texts have other tokens in the base; "
            "expected a base with the tokenizer and the chat template of the model: the LLM that it was trained from"
        )


def ask(
    opened: TextModel, encoded: EncodedTexts, max_new_tokens: int, batch_size: int
) -> tuple[list[list[int]], float]:
    """The greedy answers (ids), and the summed loss of the texts."""
    answers = opened.answers(encoded.prompts, max_new_tokens, batch_size)
    return answers, sum(opened.loss(ids) for ids in encoded.texts)
