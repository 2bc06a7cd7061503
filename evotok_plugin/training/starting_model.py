"""The model at the first step of a run: random weights of a preset, or those of another tokenizer."""

import logging

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, open_config
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.tokenizer_folder import load_tokenizer
from evotok_plugin.training.config import TokenizerTrainingConfig

logger = logging.getLogger(__name__)

# Fields that do not change the shape of any weight; of the codebooks the first levels can be kept.
CHANGEABLE = (
    "pixel_depth", "semantic_depth", "num_quantizers", "ema_decay", "restart_threshold", "codebook_warmup_steps",
    "restart_by_error", "level_dropout", "initializer_range", "quantizer_gradient",
)  # fmt: skip


def starting_config(config: TokenizerTrainingConfig) -> EvoTokConfig:
    """The configuration of the model: that of the preset, or of the tokenizer in `init_from`, with fields replaced.

    Raises:
        UserError: the folder of `init_from` has no tokenizer, or `model` changes a size of it.
    """
    if config.init_from is None:
        return EvoTokConfig.preset(config.preset, **config.model)
    kind = model_type_of(config.init_from)
    if kind != EvoTokConfig.model_type:
        raise UserError(f"init_from: {config.init_from!r} holds a {kind or 'nameless'} model, expected a tokenizer")
    given = open_config(EvoTokConfig, config.init_from)
    for name, value in config.model.items():
        if name not in EvoTokConfig.preset("tiny").to_dict():
            EvoTokConfig.preset("tiny", **{name: value})  # raises the error that lists the fields
        found = getattr(given, name)
        same = list(found) == list(value) if isinstance(found, (list, tuple)) else found == value
        if not same and name not in CHANGEABLE:
            raise UserError(
                f"model: {name} {value} is not that of {config.init_from} ({found}), whose weights the run starts "
                f"from; only {', '.join(CHANGEABLE)} can change"
            )
    changed = EvoTokConfig(**{**given.to_dict(), **config.model})
    if changed.num_quantizers > given.num_quantizers:
        raise UserError(
            f"model: num_quantizers {changed.num_quantizers} is more than the {given.num_quantizers} levels of "
            f"{config.init_from}; only the first levels can be kept"
        )
    return changed


def starting_model(config: TokenizerTrainingConfig) -> EvoTokModel:
    """The model, with the parts frozen that the run does not train.

    Raises:
        UserError: as `starting_config`, or the weights in `init_from` are missing or damaged.
    """
    settings = starting_config(config)
    model = EvoTokModel(settings)
    if config.init_from is not None:
        state = load_tokenizer(config.init_from).state_dict()
        for name in [name for name in state if name.startswith("quantizer.")]:  # levels are the first dimension
            state[name] = state[name][: settings.num_quantizers]
        model.load_state_dict(state)
        logger.info("starting from %s; its sizes replace those of the preset", config.init_from)
    if config.train_parts != "all":
        model.encoder.requires_grad_(False)
        model.quantizer.fix()
        model.pixel_decoder.requires_grad_(config.train_parts != "semantic_decoder")
        model.semantic_decoder.requires_grad_(config.train_parts != "pixel_decoder")
    return model
