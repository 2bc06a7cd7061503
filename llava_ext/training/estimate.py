"""What a training run will need, before anyone rents a machine for it: no weight is read, made or downloaded.

The model is built on the meta device, where tensors have shapes and no numbers; activations are those that autograd
would keep of a forward pass there.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evotok_plugin import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.losses.cross_entropy import MAX_LOGITS
from evotok_plugin.model_folder import model_type_of, open_config
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.model_folder import set_tower_aside
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import add_new_token_rows
from llava_ext.training.adapters import add_lora
from llava_ext.training.config import StageConfig, check_head, new_head_settings, read_deepspeed_config
from llava_ext.training.parameter_groups import GROUPS, choose_trainable, freezes_tables, group_of
from llava_ext.training.settings import stage_values

GIB = 2**30
_ADAM = 8  # bytes a trained parameter: two float32 averages
_MASTER = 4  # and DeepSpeed's float32 copy
_NF4 = {True: 0.516, False: 0.5625}  # bytes a 4-bit weight with its scales, by double_quant (QLoRA, arXiv 2305.14314)


@dataclass
class Estimate:
    """What a run needs. Parameters are counts by part, (all, trained); memory is in bytes a GPU."""

    engine: str
    parameters: dict[str, tuple[int, int]]
    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_without_checkpointing: float
    transient: float
    on_host: float
    samples_a_step: int
    steps_a_sample: int
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Memory a GPU at its highest, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient

    def __str__(self) -> str:
        lines = [f"{'parameters':<22}{'all':>12}{'trained':>12}"]
        sums = [sum(counts) for counts in zip(*self.parameters.values(), strict=True)]
        for name, (every, trained) in [*self.parameters.items(), ("in all", sums)]:
            lines.append(f"  {name:<20}{every / 1e6:>10.2f} M{trained / 1e6:>10.2f} M")
        lines += ["", f"memory a GPU, {self.engine}"]
        for name in ("weights", "gradients", "optimizer", "activations", "transient", "total"):
            lines.append(f"  {name:<20}{getattr(self, name) / GIB:>10.3f} GiB")
        lines.append(f"  (activations without checkpointing {self.activations_without_checkpointing / GIB:.3f} GiB)")
        if self.on_host:
            lines.append(f"  (in the host's memory {self.on_host / GIB:.3f} GiB a GPU)")
        tokens = self.samples_a_step * self.steps_a_sample
        lines += ["", f"a step: {self.samples_a_step} samples, at most {tokens} LLM steps (tokens, image positions)"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def estimate_run(recipe: str, overrides: dict, num_gpus: int) -> Estimate:
    """Estimate a training run.

    Args:
        recipe: name or YAML file, as for training.
        overrides: fields of `StageConfig` as on the command line.
        num_gpus: processes, one a GPU.

    Raises:
        UserError: no such recipe, a wrong value, or a model whose configuration is not at hand.
    """
    if num_gpus < 1:
        raise UserError(f"gpus must be at least 1, got {num_gpus}")
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(StageConfig)}
    run = SimpleNamespace(**defaults | stage_values(recipe, overrides))
    config, notes = model_config(run)
    model = meta_model(config, run)
    engine = read_deepspeed_config(run.deepspeed)
    zero = {"stage": 0} if engine is None else engine["zero_optimization"]
    estimate = Estimate(
        engine=f"ZeRO-{zero['stage']} over {num_gpus}" if engine else f"no DeepSpeed, {num_gpus} process(es)",
        parameters=count_parameters(model),
        samples_a_step=num_gpus * run.per_device_train_batch_size * run.gradient_accumulation_steps,
        steps_a_sample=run.model_max_length,
        notes=notes,
        **model_states(model, run, zero, num_gpus, has_master=engine is not None),
        **activations(model, config, run),
    )
    if engine:  # gradients on their way: two buckets by turns, at stage 3 one that is there from the start
        trained, bucket = sum(count for _, count in estimate.parameters.values()), zero.get("reduce_bucket_size", 5e8)
        size = model.get_input_embeddings().weight.element_size()
        estimate.transient += size * (bucket if zero["stage"] == 3 else 2 * min(trained, bucket))
    estimate.notes.append(
        f"activations are those of {run.per_device_train_batch_size} samples of {run.model_max_length} steps with a "
        f"drawn image each; shorter batches need less. What the allocator leaves unused and NCCL takes comes on top"
    )
    return estimate


# The model ---------------------------------------------------------------------------------------------------


def model_config(run: SimpleNamespace) -> tuple[EvoTokLlavaConfig, list[str]]:
    """The configuration that the run's model will have, and what had to be assumed.

    Raises:
        UserError: it is not at hand.
    """
    if not run.model_name_or_path:
        raise UserError("model_name_or_path is not set; pass --model_name_or_path or put it into the recipe")
    name = run.model_name_or_path.replace("{workspace}", run.workspace)
    if Path(name).is_dir() and model_type_of(name) == EvoTokLlavaConfig.model_type:
        config = open_config(EvoTokLlavaConfig, name)
        check_head(run, config)
        return config, []
    try:
        text = open_config(AutoConfig, name)
    except ValueError as error:
        raise UserError(
            f"the configuration of {name!r} cannot be read: {error}. Without a connection, pass "
            "--model_name_or_path FOLDER (or its config.json)"
        ) from error
    notes = []
    if run.vision_tower:
        folder = run.vision_tower.replace("{workspace}", run.workspace)
        if model_type_of(folder) != "evotok":
            raise UserError(f"{folder!r} is not an EvoTok tokenizer (model_type {model_type_of(folder)!r})")
        vision = open_config(EvoTokConfig, folder)
    else:
        vision = EvoTokConfig.preset("paper")
        notes.append("no vision_tower is given, the paper's tokenizer is assumed")
    return EvoTokLlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        residual_token_offset=text.vocab_size,
        **new_head_settings(run),
    ), notes


def meta_model(config: EvoTokLlavaConfig, run: SimpleNamespace) -> nn.Module:
    """The model without memory, with what the stage trains set free."""
    config._attn_implementation = "evotok_estimate"
    with torch.device("meta"):
        model = EvoTokLlavaForConditionalGeneration(config)
        model.tie_weights()
        set_tower_aside(model)
        model.to(torch.bfloat16 if run.bf16 or run.fp16 else torch.float32)
        if freezes_tables(run):
            add_new_token_rows(model)
        if run.lora_enable:
            model = add_lora(model, run)
    choose_trainable(model, run)
    return model


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of every part."""
    counts = {"vision_tower": (sum(p.numel() for p in model.vision_tower.parameters()), 0)}
    for part in GROUPS:
        members = [p for name, p in model.named_parameters() if group_of(name) == part]
        if members:
            counts[part] = (sum(p.numel() for p in members), sum(p.numel() for p in members if p.requires_grad))
    return counts


# Memory ------------------------------------------------------------------------------------------------------


def model_states(
    model: nn.Module, run: SimpleNamespace, zero: dict, num_gpus: int, has_master: bool
) -> dict[str, float]:
    """Bytes a GPU of weights, gradients and optimizer, and what offloading puts on the host."""
    stage = zero["stage"]
    share = {"optimizer": num_gpus if stage >= 1 else 1, "gradients": num_gpus if stage >= 2 else 1}
    trained = [p for p in model.parameters() if p.requires_grad]
    count, size = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    tower = sum(p.numel() * p.element_size() for p in model.vision_tower.parameters())
    weights, gathered = _weight_bytes(model, run), 0.0
    if stage == 3:
        largest = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in _layers(model))
        gathered = min(weights, largest + zero.get("stage3_prefetch_bucket_size", 5e7) * trained[0].element_size())
        weights /= num_gpus
    states = {
        "weights": weights,
        "gradients": size / share["gradients"],
        "optimizer": count * (_ADAM + (_MASTER if has_master else 0)) / share["optimizer"],
    }
    on_host = 0.0
    for what, moved in (("offload_param", ("weights",)), ("offload_optimizer", ("gradients", "optimizer"))):
        if zero.get(what, {}).get("device", "none") != "none":
            on_host += sum(states[name] for name in moved)
            states |= dict.fromkeys(moved, 0.0)
    states["weights"] += tower + gathered
    return {**states, "on_host": on_host}


def _layers(model: nn.Module) -> list[nn.Module]:
    """What ZeRO-3 gathers at a time."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists for layer in layers] + [model.get_input_embeddings()]


def _weight_bytes(model: nn.Module, run: SimpleNamespace) -> float:
    linear = {id(m.weight) for m in model.language_model.modules() if isinstance(m, nn.Linear)}
    total = 0.0
    for parameter in model.parameters():
        packed = run.bits == 4 and id(parameter) in linear and not parameter.requires_grad
        total += parameter.numel() * (_NF4[run.double_quant] if packed else parameter.element_size())
    return total


def activations(model: nn.Module, config: EvoTokLlavaConfig, run: SimpleNamespace) -> dict[str, float]:
    """Bytes a GPU that a micro-batch keeps for its backward pass, and what the losses hold beside it."""
    rows, steps = run.per_device_train_batch_size, run.model_max_length
    embedding = model.get_input_embeddings().weight
    hidden = torch.empty(rows, steps, embedding.shape[1], dtype=embedding.dtype, device="meta", requires_grad=True)
    drawn = hidden.flatten(0, 1)[: rows * min(steps, config.steps_per_drawn_image)]
    backbone = kept_bytes(model, lambda: model.language_model(inputs_embeds=hidden, use_cache=False))
    head = kept_bytes(model, lambda: _run_head(model, config, drawn))
    layers = config.text_config.num_hidden_layers
    checkpointed = layers * hidden.numel() * hidden.element_size() + backbone / layers  # one layer at a time is redone
    logits = min(MAX_LOGITS, rows * steps * config.text_config.vocab_size)
    classifiers = [model.get_output_embeddings(), *model.image_head.classifiers]
    learned = sum(p.numel() * p.element_size() for c in classifiers for p in c.parameters() if p.requires_grad)
    if config.image_head == "flat" and config.residual_embeddings == "tied":  # features of a codebook and their slopes
        learned += 2 * config.vision_config.codebook_size * embedding.shape[1] * embedding.element_size()
    return {
        "activations": (checkpointed if run.gradient_checkpointing else backbone) + head,
        "activations_without_checkpointing": backbone + head,
        # A chunk of logits, their scores and slopes; the gradients at the classifiers, made while going forward.
        "transient": logits * (2 * embedding.element_size() + 4) + learned,
    }


def _run_head(model: nn.Module, config: EvoTokLlavaConfig, hidden: Tensor) -> None:
    """The image head on the hidden states before drawn steps."""
    vision, head = config.vision_config, model.image_head
    if config.image_head == "depth":
        head(hidden, hidden.new_empty(hidden.shape[0], vision.pixel_depth, vision.codebook_dim))
        return
    for level in range(vision.pixel_depth):  # of a classifier's work its rows' gradients are kept, as large as they are
        head.states(hidden[level :: vision.pixel_depth], level).square()


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # held, so that no later storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps; on the meta device PyTorch would take one that keeps all scores."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("evotok_estimate", _attention)
