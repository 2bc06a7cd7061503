"""Settings of drawing: what a call says, and above which values of the model it stands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions

_LARGEST_SCALE = 1000  # far beyond what makes sense, and far from where numbers overflow
SCHEDULES = ("constant", "linear", "cosine")
IMAGE_GENERATION = "image_generation"  # the entry of generation_config.json with a model's own settings
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
MODEL_SETTINGS = ("guidance_scale", "guidance_schedule", *_SAMPLING)  # the keys of that entry


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class DrawingOptions:
    """Guidance and sampling of drawn images. None leaves a setting to the model (`generation_config.image_generation`).

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 draws from the prompt alone, at half the cost, larger
            values follow the prompt more closely.
        guidance_schedule: "constant", or how the scale rises from 1 at the first position to `guidance_scale` at the
            last: "linear" or, slowly at both ends, "cosine".
        negative_prompt: the prompt that guidance leads away from; None or "" is the empty prompt.
        sampling: all four sampling values at once; or some of them by their names:
        temperature, top_k, top_p, min_p: values of `SamplingOptions`, each a number or one a level.

    Raises:
        UserError: a value out of its range, or `sampling` together with one of the four.
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
        """These options, with those of another that are None here."""
        merged = {name: vars(other)[name] if value is None else value for name, value in vars(self).items()}
        if self.sampling is not None:  # stands for all four
            merged |= dict.fromkeys(_SAMPLING)
        return DrawingOptions(**merged)

    def completed(self, defaults: "DrawingOptions | None" = None) -> "DrawingOptions":
        """These options with every setting that is None taken from complete `defaults`, by default the library's: all
        four sampling values stand in `sampling`."""
        defaults = defaults or DEFAULTS
        return DrawingOptions(
            defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            defaults.guidance_schedule if self.guidance_schedule is None else self.guidance_schedule,
            self.negative_prompt or "",
            replace(self.sampling or defaults.sampling, **self._given),
        )

    def for_model(self, model) -> "DrawingOptions":
        """These options with every setting that is None taken from a model's `generation_config`.

        Raises:
            UserError: a setting with values for another number of levels, or the model's own are broken.
        """
        options = self.completed(model_settings(getattr(model, "generation_config", None)))
        options.sampling.check_levels(model.config.vision_config.pixel_depth)
        return options

    def settings(self) -> dict[str, Any]:
        """Complete options as one flat mapping, by the names that `generate_images` gives them."""
        self._check_complete()
        values = vars(self.sampling)
        kinds = {name: int if name == "top_k" else float for name in _SAMPLING}
        sampling = {
            name: tuple(map(kind, values[name])) if isinstance(values[name], tuple) else kind(values[name])
            for name, kind in kinds.items()
        }
        schedule = {"guidance_scale": float(self.guidance_scale), "guidance_schedule": self.guidance_schedule}
        return {**schedule, "negative_prompt": self.negative_prompt, **sampling}

    @property
    def guided(self) -> bool:
        """Whether images are drawn with the prompt and without it side by side."""
        self._check_complete()
        return self.guidance_scale != 1

    def scale_at(self, step: int, num_steps: int) -> float:
        """The guidance scale of one of an image's steps, numbered from 0."""
        share = step / max(1, num_steps - 1)
        if self.guidance_schedule in (None, "constant"):
            return self.guidance_scale
        rise = share if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
        return 1 + (self.guidance_scale - 1) * rise

    def _check_complete(self) -> None:
        assert None not in (self.guidance_scale, self.guidance_schedule, self.sampling), "complete the options first"


# Used where a model's generation_config has no values of its own.
DEFAULTS = DrawingOptions(3.0, "constant", "", SamplingOptions())


# A model's own settings --------------------------------------------------------------------------------------


def read_settings(values: Any) -> DrawingOptions:
    """The entry `image_generation` of a generation_config.json as options; what it leaves out is None.

    Raises:
        UserError: not a mapping, an unknown key, or a value out of its range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{IMAGE_GENERATION}: expected a mapping of {', '.join(MODEL_SETTINGS)}, got {values!r}")
    for name, value in values.items():
        if name not in MODEL_SETTINGS:
            near = get_close_matches(str(name), MODEL_SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(MODEL_SETTINGS)}"
            raise UserError(f"{IMAGE_GENERATION}: unknown setting {name!r}; {hint}")
        if value is None:
            raise UserError(f"{IMAGE_GENERATION}: {name} has no value; give one, or leave it out")
        several = value if isinstance(value, (list, tuple)) else [value]
        if name in _SAMPLING and not all(map(_is_number, several)):
            raise UserError(f"{IMAGE_GENERATION}: expected a number or one a level, got {name}={value!r}")
    try:
        return DrawingOptions(**values)
    except ValueError as error:
        raise UserError(f"{IMAGE_GENERATION}: {error}") from None


def model_settings(config: GenerationConfig | None) -> DrawingOptions:
    """The complete settings of a model's generation config; the library's where it has none.

    Raises:
        UserError: as `read_settings`.
    """
    values = getattr(config, IMAGE_GENERATION, None)
    return DEFAULTS if values is None else read_settings(values).completed()


def store_settings(config: GenerationConfig, options: DrawingOptions | None = None) -> None:
    """Write complete settings into a generation config: `options` above those that it has.

    Raises:
        UserError: as `read_settings`.
    """
    settings = (options or DrawingOptions()).completed(model_settings(config)).settings()
    # transformers saves a config with questionable values only while it is as it was loaded; this addition is not
    # one of them.
    unchanged = getattr(config, "_original_object_hash", None) == hash(config)
    plain = {name: list(v) if isinstance(v := settings[name], tuple) else v for name in MODEL_SETTINGS}
    setattr(config, IMAGE_GENERATION, plain)
    config._from_model_config = False  # entries that transformers does not know are not read back otherwise
    if unchanged:
        config._original_object_hash = hash(config)


def seeds_for(seed: int | Sequence[int], count: int, what: str) -> list[int]:
    """One seed for each of `count` draws, which `what` explains: those given, or as many from one on.

    Raises:
        UserError: another number of them, or one that no generator takes.
    """
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, Integral) else [int(s) for s in seed]
    if len(seeds) != count:
        raise UserError(f"got {len(seeds)} seeds for {count} ({what})")
    if wrong := [s for s in seeds if not -(2**63) <= s < 2**63]:
        raise UserError(f"a seed has at most 63 bits, got {wrong[0]}")
    return seeds
