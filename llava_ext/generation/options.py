"""Settings of image generation: those of a call, and the model's own in its generation_config.json."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from evotok_plugin.errors import UserError
from evotok_plugin.sampling_options import SamplingOptions

if TYPE_CHECKING:  # command lines are parsed with these options, without the model's libraries
    from transformers import GenerationConfig

    from llava_ext.generation.model_interface import ModelInterface

_LARGEST_SCALE = 1000  # far above useful values, far below overflow
SCHEDULES = ("constant", "linear", "cosine")
IMAGE_GENERATION = "image_generation"  # the entry of generation_config.json that holds a model's settings
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_GUIDANCE = ("guidance_scale", "guidance_schedule", "guidance_interval", "guidance_rescale")
MODEL_SETTINGS = (*_GUIDANCE, *_SAMPLING)  # the keys of that entry


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _as_numbers(value: Any, kind: type) -> Any:
    return tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)


@dataclass(frozen=True)
class DrawingOptions:
    """Guidance and sampling of drawn images. None leaves a setting to the model (`generation_config.image_generation`).

    Options are complete if no setting is None and all four sampling values are in `sampling`; see `completed`.

    Attributes:
        guidance_scale: scale of classifier-free guidance, one number or one per level; 1 draws from the prompt alone at
            half the cost, larger values follow the prompt more closely.
        guidance_schedule: "constant", or how the scale rises from 1 at the first position to `guidance_scale` at the
            last: "linear", or "cosine", which is slow at both ends.
        negative_prompt: the prompt that guidance steers away from; None or "" is the empty prompt.
        sampling: all four sampling values at once; or give some of them by name:
        temperature, top_k, top_p, min_p: values of `SamplingOptions`, each one number or one per level.
        guidance_interval: two fractions (start, end) of the positions of an image; guidance applies at position p of N
            if start <= p / N < end, elsewhere the scale is 1 (Kynkäänniemi et al. 2024, arXiv 2404.07724, there over
            noise levels). (0, 1) is the whole image.
        guidance_rescale: 0 to 1, the share of the guided logits that is scaled to the standard deviation of those with
            the prompt (`guided_logits`); 0 is off.

    Raises:
        UserError: a value is out of its range, or `sampling` is given together with one of the four.
    """

    guidance_scale: float | Sequence[float] | None = None
    guidance_schedule: str | None = None
    negative_prompt: str | None = None
    sampling: SamplingOptions | None = None
    temperature: float | Sequence[float] | None = None
    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    min_p: float | Sequence[float] | None = None
    guidance_interval: Sequence[float] | None = None
    guidance_rescale: float | None = None

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        scales = scale if isinstance(scale, (list, tuple)) else (1 if scale is None else scale,)
        if not scales or not all(_is_number(one) and 1 <= one <= _LARGEST_SCALE for one in scales):
            raise UserError(
                f"guidance_scale must be at least 1 and at most {_LARGEST_SCALE}, got {scale!r}; 1 draws from the "
                "prompt alone"
            )
        interval = (0, 1) if self.guidance_interval is None else self.guidance_interval
        is_pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(_is_number, interval))
        if not is_pair or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(
                f"guidance_interval: expected two fractions of the positions, 0 <= start < end <= 1, got {interval!r}"
            )
        rescale = 0 if self.guidance_rescale is None else self.guidance_rescale
        if not _is_number(rescale) or not 0 <= rescale <= 1:
            raise UserError(f"guidance_rescale must be from 0 to 1, got {rescale!r}; 0 turns it off")
        if self.guidance_schedule not in (None, *SCHEDULES):
            raise UserError(f"guidance_schedule: expected {', '.join(SCHEDULES)}, got {self.guidance_schedule!r}")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise UserError(f"negative_prompt: expected a text or None, got {self.negative_prompt!r}")
        if self._given and self.sampling is not None:
            raise UserError(f"give either sampling or {', '.join(self._given)}, and not both")
        SamplingOptions(**self._given)  # checks the ranges
        for name in (*_GUIDANCE, *_SAMPLING):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))

    @property
    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}

    def above(self, other: "DrawingOptions") -> "DrawingOptions":
        """Merge with `other`, which fills the settings that are None here."""
        merged = {name: vars(other)[name] if value is None else value for name, value in vars(self).items()}
        if self.sampling is not None:  # sets all four values
            merged |= dict.fromkeys(_SAMPLING)
        return DrawingOptions(**merged)

    def completed(self, defaults: "DrawingOptions | None" = None) -> "DrawingOptions":
        """Fill every setting that is None from complete `defaults`, by default the library's."""
        defaults = defaults or DEFAULTS
        sampling = self.sampling or defaults.sampling
        assert sampling is not None, "the defaults are incomplete"
        guidance = {name: getattr(defaults if getattr(self, name) is None else self, name) for name in _GUIDANCE}
        return DrawingOptions(
            negative_prompt=self.negative_prompt or "", sampling=replace(sampling, **self._given), **guidance
        )

    def for_model(self, model: "ModelInterface") -> "DrawingOptions":
        """Fill every setting that is None from the model's `generation_config`.

        Warns about given settings of guidance where its scale is 1.

        Raises:
            UserError: a setting has values for another number of levels, or the model's own settings are invalid.
        """
        defaults = model_settings(getattr(model, "generation_config", None))
        options = self.completed(defaults)
        assert options.sampling is not None
        num_levels = model.config.vision_config.pixel_depth
        options.sampling.check_levels(num_levels)
        scale = options.guidance_scale
        if isinstance(scale, tuple) and len(scale) != num_levels:
            raise UserError(
                f"guidance_scale has {len(scale)} values, but {num_levels} levels are drawn; give one per level"
            )
        if not options.guided and (unused := self._settings_of_guidance(defaults)):
            warnings.warn(
                f"{', '.join(unused)} without effect: guidance_scale is 1, which draws from the prompt alone; pass a "
                "larger guidance_scale",
                stacklevel=1,  # a drawing completes its options several times, but is warned about once
            )
        return options

    def _settings_of_guidance(self, defaults: "DrawingOptions") -> list[str]:
        """Names of settings that differ from the defaults and change a drawing only with guidance."""
        names = ("guidance_schedule", "guidance_interval", "guidance_rescale", "negative_prompt")
        return [name for name in names if getattr(self, name) not in (None, "", getattr(defaults, name))]

    def settings(self) -> dict[str, Any]:
        """Return complete options as one flat mapping with the parameter names of `generate_images`."""
        assert self.guidance_scale is not None and self.sampling is not None, "complete the options first"
        values = {**vars(self), **vars(self.sampling)}
        texts = ("guidance_schedule", "negative_prompt")
        return {
            name: values[name] if name in texts else _as_numbers(values[name], int if name == "top_k" else float)
            for name in (*_GUIDANCE, "negative_prompt", *_SAMPLING)
        }

    @property
    def guided(self) -> bool:
        """Whether each image needs an unconditional row next to the conditional one; for complete options."""
        scale = self.guidance_scale
        assert scale is not None and self.sampling is not None, "complete the options first"
        return any(one != 1 for one in scale) if isinstance(scale, Sequence) else scale != 1

    def scale_at(self, step: int, num_steps: int, level: int = 0) -> float:
        """Return the guidance scale of a level at step 0 ... num_steps - 1 of an image."""
        assert self.guidance_scale is not None, "complete the options first"
        scale = self.guidance_scale[level] if isinstance(self.guidance_scale, Sequence) else self.guidance_scale
        start, end = self.guidance_interval or (0, 1)
        if not start <= step / num_steps < end:
            return 1.0
        if self.guidance_schedule in (None, "constant"):
            return scale
        fraction = step / max(1, num_steps - 1)
        rise = fraction if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
        return 1 + (scale - 1) * rise


# Used where a model's generation_config has no settings.
DEFAULTS = DrawingOptions(3.0, "constant", "", SamplingOptions(), guidance_interval=(0.0, 1.0), guidance_rescale=0.0)


# A model's own settings --------------------------------------------------------------------------------------


def checked_entry(entry: str, values: Any, known: Sequence[str]) -> Mapping[str, Any]:
    """Return an entry of a generation_config.json, after a check that it maps known names to values.

    Args:
        entry: its name, for the error.

    Raises:
        UserError: it is not a mapping, has an unknown key, or a key without a value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{entry}: expected a mapping of {', '.join(known)}, got {values!r}")
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise UserError(f"{entry}: unknown setting {name!r}; {hint}")
        if value is None:
            raise UserError(f"{entry}: {name} has no value; set one or remove the key")
    return values


def read_settings(values: Any) -> DrawingOptions:
    """Parse the entry `image_generation` of a generation_config.json; settings that it leaves out are None.

    Raises:
        UserError: it is not a mapping, has an unknown key, or a value is out of its range.
    """
    for name, value in checked_entry(IMAGE_GENERATION, values, MODEL_SETTINGS).items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if name in _SAMPLING and not all(map(_is_number, numbers)):
            raise UserError(f"{IMAGE_GENERATION}: expected one number or one per level, got {name}={value!r}")
    try:
        return DrawingOptions(**values)
    except UserError as error:
        raise UserError(f"{IMAGE_GENERATION}: {error}") from None


def model_settings(config: "GenerationConfig | None") -> DrawingOptions:
    """Return the complete settings in a model's generation config; the library's if it has none.

    Raises:
        UserError: as `read_settings`.
    """
    values = getattr(config, IMAGE_GENERATION, None)
    return DEFAULTS if values is None else read_settings(values).completed()


def to_entry(options: DrawingOptions) -> dict[str, Any]:
    """Convert complete options to the entry `image_generation` of a generation_config.json."""
    settings = options.settings()
    return {name: list(v) if isinstance(v := settings[name], tuple) else v for name in MODEL_SETTINGS}


def store_settings(config: "GenerationConfig", options: DrawingOptions | None = None) -> None:
    """Store complete settings in a generation config; `options` override the ones it has.

    Raises:
        UserError: as `read_settings`.
    """
    options = (options or DrawingOptions()).completed(model_settings(config))
    # transformers refuses to save a config with questionable values unless it is unchanged since loading; this addition
    # must not count as a change.
    unchanged = getattr(config, "_original_object_hash", None) == hash(config)
    setattr(config, IMAGE_GENERATION, to_entry(options))
    config._from_model_config = False  # otherwise transformers drops unknown entries when it reads the file
    if unchanged:
        config._original_object_hash = hash(config)


def seeds_for(seed: int | Sequence[int], count: int, what: str) -> list[int]:
    """Return `count` seeds: the given ones, or consecutive ones from a single seed.

    Args:
        what: explanation of `count` for the error message.

    Raises:
        UserError: the number of seeds is not `count`, or a seed is too large.
    """
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, (int, Integral)) else [int(s) for s in seed]
    if len(seeds) != count:
        raise UserError(f"got {len(seeds)} seeds for {count} ({what})")
    if wrong := [s for s in seeds if not -(2**63) <= s < 2**63]:
        raise UserError(f"a seed has at most 63 bits, got {wrong[0]}")
    return seeds
