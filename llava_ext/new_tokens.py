"""Rows of the image tokens (placeholder and delimiters) in the backbone's tables: initial values and training.

A text backbone has no rows for these tokens, or untrained ones, and stage 1 and LoRA freeze its tables. Yet the model
must learn to predict the delimiters. Their rows are therefore trained separately and merged into the tables when the
model is saved; all other rows stay unchanged.

N new tokens, V rows of a table, D LLM width.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_token_rows import NewTokenRows

MODULE = "new_token_rows"  # name of the module in a model during training
ROWS_FILE = f"{MODULE}.safetensors"  # in a checkpoint: the rows in the dtype in which they are trained
_CHUNK = 8192  # rows of a table that are processed at a time
_INITIAL_SPREAD = 0.1  # relative to the other rows: enough to distinguish the new tokens, too little to favor one


@torch.no_grad()
def initialize_new_rows(table: Tensor, new: Sequence[int], seed: int = 0) -> None:
    """Set new rows of a table (V, D) to the mean of all other rows plus a random part that differs between them.

    Identical rows would always have identical logits, so that the new tokens would share their probability. The random
    part has the covariance of the other rows, scaled down equally in every direction.
    """
    ids = torch.as_tensor(list(new))
    mixture = torch.randn(len(ids), table.shape[0], generator=torch.Generator().manual_seed(seed))
    others = torch.ones(table.shape[0], 1)
    mixture[:, ids], others[ids] = 0.0, 0.0
    total, mixed = torch.zeros(table.shape[1]), torch.zeros(len(ids), table.shape[1])
    for start in range(0, table.shape[0], _CHUNK):  # a table may take gigabytes, in float32 twice as many
        part, rows = slice(start, start + _CHUNK), table[start : start + _CHUNK].float().cpu()
        total += (others[part] * rows).sum(dim=0)
        mixed += mixture[:, part] @ rows
    count = others.sum().clamp(min=1)
    mean = total / count
    random = (mixed - mixture.sum(dim=1, keepdim=True) * mean) / count.sqrt()
    table[ids.to(table.device)] = (mean + _INITIAL_SPREAD * random).to(table)


def table_names(model: EvoTokLlavaForConditionalGeneration) -> tuple[str, str | None]:
    """Names of the embedding layer and of the output layer in a model; None for a tied output layer."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return name, None if model.config.tie_word_embeddings else "lm_head"


def add_new_token_rows(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Make the rows of a model's image tokens trainable separately from its tables, starting from their values there.

    Raises:
        UserError: the backbone's embedding layer is not a table, so single rows cannot be replaced.
    """
    embeddings, config = model.get_input_embeddings(), model.config
    scale = getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", None))
    if not isinstance(embeddings, nn.Embedding) or (type(embeddings) is not nn.Embedding and scale is None):
        raise UserError(
            f"the {config.text_config.model_type} backbone embeds tokens through {type(embeddings).__name__}; expected "
            "a table, in which the rows of the image tokens can be trained separately; pass --tune_language_model true"
        )
    ids = [config.image_token_id, config.image_start_token_id, config.image_end_token_id]
    outputs = None if config.tie_word_embeddings else _rows_of(model.lm_head.weight, ids)
    inputs = _rows_of(embeddings.weight, ids)
    model.new_token_rows = NewTokenRows(ids, inputs, outputs, 1.0 if scale is None else float(scale))


def _rows_of(weight: Tensor, ids: list[int]) -> Tensor:
    gathered: AbstractContextManager[Any] = contextlib.nullcontext()
    if hasattr(weight, "ds_id"):  # partitioned across processes by ZeRO-3
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([weight])
    with gathered:
        return weight.detach()[ids].clone()


@torch.no_grad()
def put_rows_into_tables(model: EvoTokLlavaForConditionalGeneration, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model with the trained rows in its tables, without the weights of `NewTokenRows`."""
    if model.new_token_rows is None:
        return weights
    rows = {name: weights[name] for name in weights if name.startswith(f"{MODULE}.")}
    whole = {name: value for name, value in weights.items() if name not in rows}
    for name, of_table in zip(table_names(model), ("inputs", "outputs"), strict=True):
        if name is not None:
            table = whole[f"{name}.weight"].clone()
            table[model.new_token_rows.token_ids.to(table.device)] = rows[f"{MODULE}.{of_table}"].to(table)
            whole[f"{name}.weight"] = table
    return whole


@torch.no_grad()
def show_rows_in_table(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Copy the trained input rows to the frozen embedding table, which generation reads during training."""
    rows = model.new_token_rows
    if rows is not None:
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        weight[rows.token_ids] = rows.inputs.to(weight.dtype)


def merge_new_token_rows(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Write the trained rows into the model's tables and remove `model.new_token_rows`."""
    if model.new_token_rows is None:
        return
    state = put_rows_into_tables(model, dict(model.state_dict()))
    for name in filter(None, table_names(model)):
        model.get_parameter(f"{name}.weight").data.copy_(state[f"{name}.weight"])
    model.new_token_rows = None


def save_rows(model: EvoTokLlavaForConditionalGeneration, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the rows to a checkpoint in their training precision; the tables may have a lower one."""
    if model.new_token_rows is not None:
        rows = {name: weights[f"{MODULE}.{name}"] for name, _ in model.new_token_rows.named_parameters()}
        save_file({name: value.detach().cpu().contiguous() for name, value in rows.items()}, folder / ROWS_FILE)


def load_rows(model: EvoTokLlavaForConditionalGeneration, folder: Path) -> None:
    """Load the rows that `save_rows` wrote, into a model of the same configuration.

    Raises:
        UserError: the file cannot be read or does not match the model.
    """
    if model.new_token_rows is None:
        return
    try:
        model.new_token_rows.load_state_dict(load_file(folder / ROWS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / ROWS_FILE} cannot be read: {error}; pass --overwrite true to start over") from error
