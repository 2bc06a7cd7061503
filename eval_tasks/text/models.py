"""Models that are asked in text: an EvoTok-LLaVA folder, or a causal LM in a folder, a GGUF file or on the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evotok_plugin.common.recipes import read_recipe
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from evotok_plugin.training.resume import RECIPE
from llava_ext.backbone import is_gguf, open_backbone
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.model_folder import load_model
from llava_ext.training.config import StageConfig

_LONGEST_TEXT = 1024  # tokens; the rest of a text is not evaluated


@dataclass(frozen=True)
class TextModel:
    """A model with its text tokenizer.

    Attributes:
        processor: of an EvoTok-LLaVA model; None for a causal LM.
    """

    model: Any
    tokenizer: Any
    processor: Any = None

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a conversation with one user turn, up to where the answer begins."""
        if self.processor is not None:
            return self.processor.user_turns([prompt])["input_ids"][0].tolist()
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"][:_LONGEST_TEXT]

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> list[list[int]]:
        """Greedy answers to prompts (ids), without end tokens."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        pad = next(iter(sorted(end for end in ends if end is not None)), 0)
        found = []
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            new = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )[:, width:].tolist()
            found += [_until(row, ends) for row in new]
        return found

    @torch.no_grad()
    def loss(self, ids: Sequence[int]) -> float:
        """Sum of the negative log-likelihoods (nats) of the tokens of a text after the first one."""
        row = torch.tensor([list(ids)], device=self.model.device)
        logits: Tensor = self.model(input_ids=row).logits[0, :-1].float()
        return float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first one of `ends`."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def open_text_model(source: str | Path, device: torch.device, dtype: torch.dtype | str) -> TextModel:
    """Open a model for text.

    Raises:
        UserError: neither a complete EvoTok-LLaVA folder nor a causal LM, or it has no chat template.
    """
    if Path(source).is_dir() and _is_ours(source):
        model, processor = load_model(source, dtype)
        return TextModel(model.to(device).eval(), processor.tokenizer, processor)  # type: ignore[arg-type]
    opened = open_backbone(source, dtype)
    if not opened.tokenizer.chat_template:
        raise UserError(f"{str(source)!r} has no chat template, without which it cannot be asked; pass another --base")
    return TextModel(opened.model.to(device).eval(), opened.tokenizer)


def _is_ours(folder: str | Path) -> bool:
    return (Path(folder) / "config.json").is_file() and model_type_of(folder) == EvoTokLlavaConfig.model_type


def recorded_base(folder: str | Path) -> str:
    """The LLM that a model was trained from, as the recipes of its stages record it.

    Raises:
        UserError: a folder without a recipe, or a recorded model that no longer exists.
    """
    remedy = "pass --base with the LLM that the model was trained from"
    current, seen = Path(folder), set[Path]()
    while True:
        recipe = current / RECIPE
        if not recipe.is_file():
            raise UserError(f"{str(current)!r} has no {RECIPE} that records what it was trained from; {remedy}")
        settings = read_recipe(recipe)
        name = settings.get("model_name_or_path")
        if not isinstance(name, str) or not name:
            raise UserError(f"{recipe} does not record a model_name_or_path; {remedy}")
        name = name.replace("{workspace}", str(settings.get("workspace", StageConfig.workspace)))
        source = Path(name)
        if is_gguf(source) and source.is_file():
            return name
        if not source.is_dir():
            if source.is_absolute() or len(source.parts) != 2 or source.parts[0] in (".", "..", "outputs"):
                raise UserError(f"{str(current)!r} was trained from {name!r}, which does not exist here; {remedy}")
            return name  # a hub id
        if not _is_ours(source):
            return name
        if source.resolve() in seen:
            raise UserError(f"{recipe}: the recorded models are trained from each other; {remedy}")
        seen.add(source.resolve())
        current = source
