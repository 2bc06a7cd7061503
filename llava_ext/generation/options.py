"""Settings of image generation: those of a call, and the model's own in its generation_config.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.generation.model_interface import ModelInterface

_LARGEST_SCALE = 1000  # far above useful values, far below overflow
SCHEDULES = ("constant", "linear", "cosine")
IMAGE_GENERATION = "image_generation"  # the entry of generation_config.json that holds a model's settings
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
MODEL_SETTINGS = ("guidance_scale", "guidance_schedule", *_SAMPLING)  # the keys of that entry


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class DrawingOptions:
    """Guidance and sampling of drawn images. None leaves a setting to the model (`generation_config.image_generation`).

    Options are complete if no setting is None and all four sampling values are in `sampling`; see `completed`.

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 draws from the prompt alone at half the cost, larger
            values follow the prompt more closely.
        guidance_schedule: "constant", or how the scale rises from 1 at the first position to `guidance_scale` at the
            last: "linear", or "cosine", which is slow at both ends.
        negative_prompt: the prompt that guidance steers away from; None or "" is the empty prompt.
        sampling: all four sampling values at once; or give some of them by name:
        temperature, top_k, top_p, min_p: values of `SamplingOptions`, each one number or one per level.

    Raises:
        UserError: a value is out of its range, or `sampling` is given together with one of the four.
    """

    guidance_scale: float | None = None
    guidance_schedule: str | None = None
    negative_prompt: str | None = None
    sampling: SamplingOptions | None = None
    temperature: float | Sequence[float] | None = None
    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    min_p: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if scale is not None and not (_is_number(scale) and 1 <= scale <= _LARGEST_SCALE):
            raise UserError(
                f"guidance_scale must be at least 1 and at most {_LARGEST_SCALE}, got {scale!r}; 1 draws from the "
                "prompt alone"
            )
        if self.guidance_schedule not in (None, *SCHEDULES):
            raise UserError(f"guidance_schedule: expected {', '.join(SCHEDULES)}, got {self.guidance_schedule!r}")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise UserError(f"negative_prompt: expected a text or None, got {self.negative_prompt!r}")
        if self._given and self.sampling is not None:
            raise UserError(f"give either sampling or {', '.join(self._given)}, and not both")
        SamplingOptions(**self._given)  # checks the ranges
        for name, value in self._given.items():
            if isinstance(value, Sequence):
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
        return DrawingOptions(
            defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            defaults.guidance_schedule if self.guidance_schedule is None else self.guidance_schedule,
            self.negative_prompt or "",
            replace(sampling, **self._given),
        )

    def for_model(self, model: ModelInterface) -> "DrawingOptions":
        """Fill every setting that is None from the model's `generation_config`.

        Raises:
            UserError: a setting has values for another number of levels, or the model's own settings are invalid.
        """
        options = self.completed(model_settings(getattr(model, "generation_config", None)))
        assert options.sampling is not None
        options.sampling.check_levels(model.config.vision_config.pixel_depth)
        return options

    def settings(self) -> dict[str, Any]:
        """Return complete options as one flat mapping with the parameter names of `generate_images`."""
        values = vars(self.sampling)
        kinds = {name: int if name == "top_k" else float for name in _SAMPLING}
        sampling = {
            name: tuple(map(kind, values[name])) if isinstance(values[name], tuple) else kind(values[name])
            for name, kind in kinds.items()
        }
        schedule = {"guidance_scale": float(self._scale), "guidance_schedule": self.guidance_schedule}
        return {**schedule, "negative_prompt": self.negative_prompt, **sampling}

    @property
    def guided(self) -> bool:
        """Whether each image needs an unconditional row next to the conditional one; for complete options."""
        return self._scale != 1

    @property
    def _scale(self) -> float:
        assert self.guidance_scale is not None and self.sampling is not None, "complete the options first"
        return self.guidance_scale

    def scale_at(self, step: int, num_steps: int) -> float:
        """Return the guidance scale at step 0 ... num_steps - 1 of an image."""
        assert self.guidance_scale is not None, "complete the options first"
        fraction = step / max(1, num_steps - 1)
        if self.guidance_schedule in (None, "constant"):
            return self.guidance_scale
        rise = fraction if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
        return 1 + (self.guidance_scale - 1) * rise


# Used where a model's generation_config has no settings.
DEFAULTS = DrawingOptions(3.0, "constant", "", SamplingOptions())


# A model's own settings --------------------------------------------------------------------------------------


def read_settings(values: Any) -> DrawingOptions:
    """Parse the entry `image_generation` of a generation_config.json; settings that it leaves out are None.

    Raises:
        UserError: it is not a mapping, has an unknown key, or a value is out of its range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{IMAGE_GENERATION}: expected a mapping of {', '.join(MODEL_SETTINGS)}, got {values!r}")
    for name, value in values.items():
        if name not in MODEL_SETTINGS:
            near = get_close_matches(str(name), MODEL_SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(MODEL_SETTINGS)}"
            raise UserError(f"{IMAGE_GENERATION}: unknown setting {name!r}; {hint}")
        if value is None:
            raise UserError(f"{IMAGE_GENERATION}: {name} has no value; set one or remove the key")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if name in _SAMPLING and not all(map(_is_number, numbers)):
            raise UserError(f"{IMAGE_GENERATION}: expected one number or one per level, got {name}={value!r}")
    try:
        return DrawingOptions(**values)
    except UserError as error:
        raise UserError(f"{IMAGE_GENERATION}: {error}") from None


def model_settings(config: GenerationConfig | None) -> DrawingOptions:
    """Return the complete settings in a model's generation config; the library's if it has none.

    Raises:
        UserError: as `read_settings`.
    """
    values = getattr(config, IMAGE_GENERATION, None)
    return DEFAULTS if values is None else read_settings(values).completed()


def store_settings(config: GenerationConfig, options: DrawingOptions | None = None) -> None:
    """Store complete settings in a generation config; `options` override the ones it has.

    Raises:
        UserError: as `read_settings`.
    """
    settings = (options or DrawingOptions()).completed(model_settings(config)).settings()
    # transformers refuses to save a config with questionable values unless it is unchanged since loading; this addition
    # must not count as a change.
    unchanged = getattr(config, "_original_object_hash", None) == hash(config)
    plain = {name: list(v) if isinstance(v := settings[name], tuple) else v for name in MODEL_SETTINGS}
    setattr(config, IMAGE_GENERATION, plain)
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
