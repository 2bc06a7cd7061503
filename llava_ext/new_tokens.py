"""The image delimiters and the placeholder in the backbone's tables: first values, and training their rows alone.

A text backbone has no rows for these tokens, or untrained ones, and stage 1 and LoRA freeze its tables. Yet the model
learns to predict the delimiters. So their rows are trained apart and written into the tables when the model is saved:
all other rows stay as they are.

N new tokens, V rows of a table, D LLM width.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from evotok_plugin.losses.cross_entropy import ReplacedRows

MODULE = "new_token_rows"  # name of the module in a model while it trains
ROWS_FILE = f"{MODULE}.safetensors"  # in a checkpoint: the rows in the dtype they are trained in
_CHUNK = 8192  # rows of a table that are looked at together
_START_SPREAD = 0.1  # of the other rows' spread; enough to tell the new tokens apart, too little to make one likely


@torch.no_grad()
def initialize_new_rows(table: Tensor, new: Sequence[int], seed: int = 0) -> None:
    """Give new rows of a table (V, D) the mean of all others plus a random part, another one for each.

    Rows of one value would share one logit for ever: each delimiter could have at most its share of the probability.
    The random part has the covariance of the other rows, so that it is as large as theirs in every direction.
    """
    new = torch.as_tensor(list(new))
    mixture = torch.randn(len(new), table.shape[0], generator=torch.Generator().manual_seed(seed))
    others = torch.ones(table.shape[0], 1)
    mixture[:, new], others[new] = 0.0, 0.0
    total, mixed = torch.zeros(table.shape[1]), torch.zeros(len(new), table.shape[1])
    for start in range(0, table.shape[0], _CHUNK):  # a table may take gigabytes, and twice as many in float32
        part, rows = slice(start, start + _CHUNK), table[start : start + _CHUNK].float().cpu()
        total += (others[part] * rows).sum(dim=0)
        mixed += mixture[:, part] @ rows
    count = others.sum().clamp(min=1)
    mean = total / count
    random = (mixed - mixture.sum(dim=1, keepdim=True) * mean) / count.sqrt()
    table[new.to(table.device)] = (mean + _START_SPREAD * random).to(table)


class NewTokenRows(nn.Module):
    """Trainable rows of the new tokens, used in place of those in frozen tables.

    Attributes:
        token_ids: ids of the new tokens, (N,).
        inputs: rows of the embedding table, (N, D).
        outputs: rows of the output layer, (N, D); None where embeddings are tied and `inputs` are both.
    """

    def __init__(self, token_ids: Sequence[int], inputs: Tensor, outputs: Tensor | None, input_scale: float = 1.0):
        """`input_scale` is the factor that the backbone's embedding layer applies to its rows."""
        super().__init__()
        self.register_buffer("token_ids", torch.tensor(list(token_ids), device=inputs.device), persistent=False)
        self.inputs = nn.Parameter(inputs)
        self.outputs = None if outputs is None else nn.Parameter(outputs)
        self._input_scale = input_scale

    def forward(self) -> tuple[Tensor, Tensor]:
        """Input and output rows, (N, D) both.

        Copies: ZeRO-3 takes the parameters away again when the call ends.
        """
        inputs = self.inputs.clone()
        return inputs, inputs if self.outputs is None else self.outputs.clone()

    def put_into(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Token embeddings (B, S, D) of ids (B, S), with those of the new tokens."""
        found = ids[..., None] == self.token_ids  # (B, S, N)
        where, which = found.any(dim=-1), found.long().argmax(dim=-1)
        rows = (self()[0] * self._input_scale)[which[where]]
        return embeddings.masked_scatter(where[..., None], rows.to(embeddings.dtype))

    def replaced_rows(self) -> ReplacedRows:
        """The output rows as a loss or `ReplacedRows.put_into` takes them."""
        return ReplacedRows(self.token_ids, self()[1])


def table_names(model: nn.Module) -> tuple[str, str | None]:
    """Names of the embedding layer and of the output layer in an EvoTok-LLaVA model; None for one that is tied."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return name, None if model.config.tie_word_embeddings else "lm_head"


def add_new_token_rows(model: nn.Module) -> None:
    """Let the image tokens' rows of a model train apart from its tables, starting where they are.

    Raises:
        UserError: the backbone's embedding layer is not a table, so that a row of it cannot be replaced.
    """
    embeddings, config = model.get_input_embeddings(), model.config
    scale = getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", None))
    if not isinstance(embeddings, nn.Embedding) or (type(embeddings) is not nn.Embedding and scale is None):
        raise UserError(
            f"the {config.text_config.model_type} backbone embeds tokens through {type(embeddings).__name__}; expected "
            "a table, of which the rows of the image tokens can be trained alone; pass --tune_language_model true"
        )
    ids = [config.image_token_id, config.image_start_token_id, config.image_end_token_id]
    outputs = None if config.tie_word_embeddings else _rows_of(model.lm_head.weight, ids)
    inputs = _rows_of(embeddings.weight, ids)
    model.new_token_rows = NewTokenRows(ids, inputs, outputs, 1.0 if scale is None else float(scale))


def _rows_of(weight: Tensor, ids: list[int]) -> Tensor:
    whole = contextlib.nullcontext()
    if hasattr(weight, "ds_id"):  # spread over the processes by ZeRO-3
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([weight])
    with whole:
        return weight.detach()[ids].clone()


@torch.no_grad()
def put_rows_into_tables(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with its trained rows in their tables, and without the module that trained them."""
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


def merge_new_token_rows(model: nn.Module) -> None:
    """Write the trained rows into the model's own tables; it is then a model like any other."""
    if model.new_token_rows is None:
        return
    state = put_rows_into_tables(model, dict(model.state_dict()))
    for name in filter(None, table_names(model)):
        model.get_submodule(name).weight.data.copy_(state[f"{name}.weight"])
    model.new_token_rows = None


def save_rows(model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the rows as they are trained into a checkpoint, where a table may have a lower precision."""
    if model.new_token_rows is not None:
        rows = {name: weights[f"{MODULE}.{name}"] for name, _ in model.new_token_rows.named_parameters()}
        save_file({name: value.detach().cpu().contiguous() for name, value in rows.items()}, folder / ROWS_FILE)


def load_rows(model: nn.Module, folder: Path) -> None:
    """Read what `save_rows` wrote into a model made in the same way.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    if model.new_token_rows is None:
        return
    try:
        model.new_token_rows.load_state_dict(load_file(folder / ROWS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / ROWS_FILE} cannot be read: {error}; pass --overwrite true to start anew") from error
