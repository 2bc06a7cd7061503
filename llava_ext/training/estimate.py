"""Estimates of the memory and other costs of a training run, without reading, creating or downloading weights.

The model is built on the meta device, where tensors have shapes but no values. Activations are the tensors that
autograd keeps of a forward pass there.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evotok_plugin.errors import UserError
from evotok_plugin.image_head import DepthTransformerHead
from evotok_plugin.losses.cross_entropy import MAX_LOGITS
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.model_folder import set_tower_aside
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import add_new_token_rows
from llava_ext.training.adapters import add_lora
from llava_ext.training.assumed_models import model_of, schema_of
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import read_deepspeed_config
from llava_ext.training.estimate_costs import (
    GIB,
    GPUS,
    RESERVED,
    Costs,
    Sizes,
    checkpoint_bytes,
    flops_of_step,
    gpus_with,
)
from llava_ext.training.parameter_groups import GROUPS, choose_trainable, freezes_tables, group_of, plain_model
from llava_ext.training.settings import stage_values

_MEAN_TEXT = 128  # tokens of text next to an image
_ADAM = 8  # bytes per trained parameter: two float32 averages
_MASTER = 4  # bytes per trained parameter: the float32 copy of DeepSpeed
# Bytes per 4-bit weight including its scales, by double_quant (QLoRA, arXiv 2305.14314).
_NF4 = {True: 0.516, False: 0.5625}

Trained = EvoTokLlavaForConditionalGeneration | PeftModel


@dataclass
class Estimate:
    """Parameters and memory of a run.

    Attributes:
        engine: description of the training engine.
        parameters: (all, trained) parameters of the tokenizer and of every parameter group.
        weights, gradients, optimizer, activations, transient: memory per GPU in bytes; `transient` is temporary memory
            of the losses and of the reduction of gradients.
        activations_without_checkpointing: `activations` without activation checkpointing.
        on_host: memory of the host per GPU in bytes.
        samples_per_step: samples of an optimizer step over all GPUs.
        steps_per_sample: maximum number of LLM steps of a sample.
        num_gpus: number of processes, one per GPU.
        notes: assumptions, and memory that is not included.
        costs: disk, host memory and hours.
    """

    engine: str
    parameters: dict[str, tuple[int, int]]
    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_without_checkpointing: float
    transient: float
    on_host: float
    samples_per_step: int
    steps_per_sample: int
    num_gpus: int = 1
    notes: list[str] = field(default_factory=list)
    costs: Costs | None = field(default=None, init=False)

    @property
    def total(self) -> float:
        """Peak memory per GPU in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient

    def __str__(self) -> str:
        lines = [f"{'parameters':<22}{'all':>12}{'trained':>12}"]
        sums = [sum(counts) for counts in zip(*self.parameters.values(), strict=True)]
        for name, (every, trained) in [*self.parameters.items(), ("total", sums)]:
            lines.append(f"  {name:<20}{every / 1e6:>10.2f} M{trained / 1e6:>10.2f} M")
        lines += ["", f"memory per GPU, {self.engine}"]
        for name in ("weights", "gradients", "optimizer", "activations", "transient", "total"):
            lines.append(f"  {name:<20}{getattr(self, name) / GIB:>10.3f} GiB")
        lines.append(f"  (activations without checkpointing {self.activations_without_checkpointing / GIB:.3f} GiB)")
        fitting = [f"{name} ({GPUS[name].gigabytes} GB)" for name in gpus_with(self.total)]
        names = ", ".join(fitting) or f"none of {', '.join(GPUS)}"
        lines.append(f"  fits with {RESERVED / 1e9:g} GB to spare: {names}")
        if self.on_host:
            lines.append(f"  (host memory {self.on_host / GIB:.3f} GiB per GPU)")
        tokens = self.samples_per_step * self.steps_per_sample
        lines += [
            "",
            f"per step: {self.samples_per_step} samples, at most {tokens} LLM steps (tokens or positions)",
        ]
        if self.costs is not None:
            lines += self.costs.lines(self.num_gpus)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Workload:
    """The data of a run, for its duration.

    Attributes:
        num_samples: samples of an epoch; None if unknown.
        mean_steps: mean LLM steps of a sample; by default those of an image and 128 tokens of text.
        drawn_share: share of the samples that draw.
    """

    num_samples: int | None = None
    mean_steps: float | None = None
    drawn_share: float = 0.5


def estimate_run(recipe: str, overrides: dict[str, Any], num_gpus: int, workload: Workload | None = None) -> Estimate:
    """Estimate a training run.

    Args:
        recipe: name or YAML file, as for training.
        overrides: fields of `StageConfig`, as on the command line.
        num_gpus: number of processes, one per GPU.

    Raises:
        UserError: the recipe does not exist, a value is wrong, or the configuration of the model cannot be read.
    """
    if num_gpus < 1:
        raise UserError(f"gpus must be at least 1, got {num_gpus}")
    schema = schema_of(recipe)
    run = schema(**stage_values(recipe, overrides, schema=schema))
    assumed = model_of(run)
    config, notes = assumed.config, assumed.notes
    model = meta_model(config, run)
    engine = read_deepspeed_config(run.deepspeed)
    zero = zero_settings(engine, config.text_config.hidden_size)
    estimate = Estimate(
        engine=f"ZeRO-{zero['stage']} over {num_gpus}" if engine else f"no DeepSpeed, {num_gpus} process(es)",
        parameters=count_parameters(model),
        samples_per_step=num_gpus * run.per_device_train_batch_size * run.gradient_accumulation_steps,
        steps_per_sample=run.model_max_length,
        num_gpus=num_gpus,
        notes=notes,
        **model_states(model, run, zero, num_gpus, has_master=engine is not None),
        **activations(model, config, run),
    )
    if engine:  # gradients being reduced: two alternating buckets; at stage 3 one that is allocated at the start
        trained, bucket = sum(count for _, count in estimate.parameters.values()), zero["reduce_bucket_size"]
        size = _embedding_table(model).element_size()
        estimate.transient += size * (bucket if zero["stage"] == 3 else 2 * min(trained, bucket))
    estimate.costs = costs_of(model, config, run, estimate, num_gpus, workload or Workload())
    estimate.notes.append(
        f"activations are those of {run.per_device_train_batch_size} samples of {run.model_max_length} steps with one "
        "drawn image each; shorter batches need less. Memory for NCCL and unused parts of allocated blocks is not "
        "included"
    )
    return estimate


# The model ---------------------------------------------------------------------------------------------------


def meta_model(config: EvoTokLlavaConfig, run: StageConfig) -> Trained:
    """The model on the meta device, with the parameter groups that the stage trains unfrozen."""
    config._attn_implementation = "evotok_estimate"
    with torch.device("meta"):
        model = EvoTokLlavaForConditionalGeneration(config)
        model.tie_weights()
        set_tower_aside(model)
        dtype = torch.bfloat16 if run.bf16 or run.fp16 else torch.float32
        model.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides `self`
        if freezes_tables(run):
            add_new_token_rows(model)
        trained = add_lora(model, run) if run.lora_enable else model
    choose_trainable(trained, run)
    return trained


def count_parameters(model: Trained) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of the tokenizer and of every parameter group."""
    counts = {"vision_tower": (_numel(plain_model(model).vision_tower.parameters()), 0)}
    for group in GROUPS:
        members = [p for name, p in model.named_parameters() if group_of(name) == group]
        if members:
            counts[group] = (_numel(members), _numel(p for p in members if p.requires_grad))
    return counts


# Disk, host memory and hours -----------------------------------------------------------------------------------


def costs_of(
    model: Trained,
    config: EvoTokLlavaConfig,
    run: StageConfig,
    estimate: Estimate,
    num_gpus: int,
    workload: Workload,
) -> Costs:
    """Disk, host memory and hours of a run."""
    plain = plain_model(model)
    tower = _bytes(plain.vision_tower.parameters())
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    head = {id(p) for p in plain.image_head.parameters()}
    in_llm = [weight for weight in linear if id(weight) not in head]
    classifiers = _numel(plain.image_head.get_submodule("classifiers").parameters())
    depth, positions = config.vision_config.pixel_depth, config.vision_config.num_positions
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = Sizes(
        tower=tower,
        weights=_weight_bytes(model, run),
        trained=_bytes(trained),
        num_trained=_numel(trained),
        num_active=_numel(in_llm),
        num_active_trained=_numel(weight for weight in in_llm if weight.requires_grad),
        head_per_position=classifiers + depth * (_numel(plain.image_head.parameters()) - classifiers),
    )
    engine = read_deepspeed_config(run.deepspeed)
    stage = None if engine is None else zero_settings(engine, config.text_config.hidden_size)["stage"]
    checkpoint = checkpoint_bytes(sizes, stage, run.lora_enable)
    drawn = workload.drawn_share * estimate.samples_per_step * positions
    mean = min(run.model_max_length, workload.mean_steps or config.steps_per_drawn_image + _MEAN_TEXT)
    steps = max(0, run.max_steps)
    if not steps and workload.num_samples:
        steps = math.ceil(run.num_train_epochs * workload.num_samples / estimate.samples_per_step)
    estimate.notes.append(
        f"operations are those of samples of {mean:g} LLM steps, of which {workload.drawn_share:.0%} draw an image "
        "(--mean_steps, --drawn_share); encoding the images once is not included"
    )
    return Costs(
        checkpoint=checkpoint,
        disk=checkpoint * ((run.save_total_limit or 1) + 1) + sizes.weights + tower,
        host=num_gpus * (sizes.weights + tower + estimate.on_host),
        flops_per_step=flops_of_step(sizes, estimate.samples_per_step * mean, drawn, _is_checkpointed(run)),
        steps=steps,
    )


def _is_checkpointed(run: StageConfig) -> bool:
    # TrainingArguments prefers the new name to its deprecated alias.
    new, old = run.activation_checkpointing, run.gradient_checkpointing
    return bool(old if new is None else new)


# Memory ------------------------------------------------------------------------------------------------------


def zero_settings(engine: dict[str, Any] | None, hidden_size: int) -> dict[str, Any]:
    """The `zero_optimization` block of a DeepSpeed configuration, stage 0 without one.

    "auto" sizes of buckets, and missing ones, have the values that transformers and DeepSpeed give them.
    """
    zero: dict[str, Any] = {"stage": 0, **((engine or {}).get("zero_optimization") or {})}
    squared = hidden_size * hidden_size
    for name, auto, default in (
        ("reduce_bucket_size", squared, 5e8),
        ("stage3_prefetch_bucket_size", int(0.9 * squared), 5e7),
    ):
        value = zero.get(name, default)
        zero[name] = auto if value == "auto" else value
    return zero


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_states(
    model: Trained, run: StageConfig, zero: dict[str, Any], num_gpus: int, has_master: bool
) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and optimizer, and bytes that offloading moves to the host.

    Args:
        zero: the settings from `zero_settings`.
        has_master: whether DeepSpeed keeps float32 copies of the trained parameters.
    """
    stage = zero["stage"]
    share = {"optimizer": num_gpus if stage >= 1 else 1, "gradients": num_gpus if stage >= 2 else 1}
    trained = [p for p in model.parameters() if p.requires_grad]
    count, size = _numel(trained), _bytes(trained)
    tower = _bytes(plain_model(model).vision_tower.parameters())
    weights, gathered = _weight_bytes(model, run), 0.0
    if stage == 3:
        largest = max(_bytes(layer.parameters()) for layer in _layers(model))
        gathered = min(weights, largest + zero["stage3_prefetch_bucket_size"] * trained[0].element_size())
        weights /= num_gpus
    states = {
        "weights": weights,
        "gradients": size / share["gradients"],
        "optimizer": count * (_ADAM + (_MASTER if has_master else 0)) / share["optimizer"],
    }
    on_host = 0.0
    for setting, moved in (("offload_param", ("weights",)), ("offload_optimizer", ("gradients", "optimizer"))):
        if (zero.get(setting) or {}).get("device", "none") != "none":
            on_host += sum(states[name] for name in moved)
            states |= dict.fromkeys(moved, 0.0)
    states["weights"] += tower + gathered
    return {**states, "on_host": on_host}


def _layers(model: Trained) -> list[nn.Module]:
    """The modules that ZeRO-3 gathers one at a time."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists for layer in layers] + [plain_model(model).get_input_embeddings()]


def _embedding_table(model: Trained) -> Tensor:
    table = plain_model(model).get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


def _weight_bytes(model: Trained, run: StageConfig) -> float:
    linear = {id(m.weight) for m in plain_model(model).language_model.modules() if isinstance(m, nn.Linear)}
    total = 0.0
    for parameter in model.parameters():
        packed = run.bits == 4 and id(parameter) in linear and not parameter.requires_grad
        total += parameter.numel() * (_NF4[run.double_quant] if packed else parameter.element_size())
    return total


def activations(model: Trained, config: EvoTokLlavaConfig, run: StageConfig) -> dict[str, float]:
    """Bytes per GPU that a micro-batch keeps for its backward pass, and temporary memory of the losses."""
    rows, steps, plain = run.per_device_train_batch_size, run.model_max_length, plain_model(model)
    embedding = _embedding_table(model)
    hidden = torch.empty(rows, steps, embedding.shape[1], dtype=embedding.dtype, device="meta", requires_grad=True)
    drawn = hidden.flatten(0, 1)[: rows * min(steps, config.steps_per_drawn_image)]
    backbone = kept_bytes(model, lambda: plain.language_model(inputs_embeds=hidden, use_cache=False))
    head = kept_bytes(model, lambda: _run_head(plain, config, drawn))
    layers = config.text_config.num_hidden_layers
    checkpointed = layers * _bytes([hidden]) + backbone / layers  # one layer at a time is recomputed
    logits = min(MAX_LOGITS, rows * steps * config.text_config.vocab_size)
    classifiers = nn.ModuleList([plain.get_output_embeddings(), plain.image_head.get_submodule("classifiers")])
    learned = _bytes(parameter for parameter in classifiers.parameters() if parameter.requires_grad)
    if config.image_head == "flat" and config.residual_embeddings == "tied":  # features of a codebook, their gradients
        learned += 2 * config.vision_config.codebook_size * embedding.shape[1] * embedding.element_size()
    return {
        "activations": (checkpointed if _is_checkpointed(run) else backbone) + head,
        "activations_without_checkpointing": backbone + head,
        # A chunk of logits, their probabilities and gradients; the gradients of the classifiers, which the forward
        # pass computes.
        "transient": logits * (2 * embedding.element_size() + 4) + learned,
    }


def _run_head(model: EvoTokLlavaForConditionalGeneration, config: EvoTokLlavaConfig, hidden: Tensor) -> None:
    """Run the image head on the hidden states before drawn steps."""
    vision, head = config.vision_config, model.image_head
    if isinstance(head, DepthTransformerHead):
        head(hidden, hidden.new_empty(hidden.shape[0], vision.pixel_depth, vision.codebook_dim))
        return
    for level in range(vision.pixel_depth):  # a classifier keeps the gradients of its rows, as large as the rows
        head.states(hidden[level :: vision.pixel_depth], level).square()


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps of a forward pass, each storage counted once, without weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # a reference, so that no later storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(torch.autograd.Function):
    """Keeps the tensors that a fused attention kernel keeps.

    On the meta device PyTorch would use a kernel that keeps all attention scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("evotok_estimate", _attention)
