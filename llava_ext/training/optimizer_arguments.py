"""Settings of the optimizer that the chosen optimizer reads; transformers ignores the others without a message."""

from typing import Any

from evotok_plugin.errors import UserError

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# By optimizer: keys of optim_args that it reads. Weight decay is a setting of the stage for all of them.
_KEYS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "rmsprop_bnb": ("momentum", "alpha", "eps", "centered"),
    "rmsprop_bnb_8bit": ("momentum", "alpha", "eps", "centered"),
    "rmsprop_bnb_32bit": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    ),
    "adamw_anyprecision": (
        "use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype",
    ),
    "adamw_torch_4bit": ("block_size", "bf16_stochastic_round"),
    "adamw_torch_8bit": ("block_size", "bf16_stochastic_round"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), ("weight_lr_power", "r")),
}  # fmt: skip
# Optimizers without betas, and those with betas but without epsilon.
_WITHOUT_BETAS = (
    "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adafactor", "lomo", "adalomo",
    "schedule_free_sgd",
)  # fmt: skip
_WITHOUT_EPSILON = ("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit")


def check_optimizer(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Check that the optimizer reads `optim_args` and the settings of Adam that flags give.

    Args:
        values: settings by name, those of the recipe and flags.
        overrides: the settings that flags give.

    Raises:
        UserError: a setting without effect.
    """
    optimizer = str(values.get("optim", "adamw_torch"))
    optimizer = optimizer.split(".")[-1].lower() if optimizer.startswith("OptimizerNames") else optimizer
    _check_keys(optimizer, values.get("optim_args"))
    ignored = _ADAM if optimizer in _WITHOUT_BETAS else _ADAM[2:] if optimizer in _WITHOUT_EPSILON else ()
    for name in ignored:
        if name in overrides:
            raise UserError(f"--{name} has no effect on the optimizer {optimizer}; leave it out")


def _check_keys(optimizer: str, given: str | None) -> None:
    pairs = [pair.partition("=") for pair in (given or "").replace(" ", "").split(",") if pair]
    known = _KEYS.get(optimizer, ())
    for key, equals, value in pairs:
        if not equals or not value:
            raise UserError(f"optim_args: expected KEY=VALUE,KEY=VALUE, got {given!r}")
        if not known:
            raise UserError(
                f"optim_args {given} has no effect on the optimizer {optimizer}; use --adam_beta1, --adam_beta2, "
                "--adam_epsilon and --weight_decay"
            )
        if key not in known:
            raise UserError(
                f"optim_args: {key} has no effect on the optimizer {optimizer}; expected some of {', '.join(known)}"
                f"{' (--weight_decay sets weight decay)' if key == 'weight_decay' else ''}"
            )
