"""Candidates of a search: named, complete settings of drawing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evotok_plugin.common.recipes import read_recipe
from evotok_plugin.errors import UserError
from llava_ext.generation.options import DrawingOptions, read_settings, to_entry

CURRENT = "current"
_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
# Pairs of temperature and min_p, from the full distribution to nearly the most likely codes.
_SAMPLING = ((1.0, 0.0), (1.0, 0.1), (0.7, 0.1), (0.5, 0.0), (0.5, 0.2))
# Pairs and scales that the other settings of guidance are tried with.
_VARIED_SAMPLING = ((1.0, 0.1), (0.5, 0.2))
_VARIED_SCALES = (1.5, 2.0, 3.0)
_VARIATIONS: tuple[dict[str, Any], ...] = (
    {"guidance_rescale": 0.7},
    {"guidance_interval": (0.0, 0.125)},
    {"guidance_interval": (0.0, 0.25)},
    {"guidance_interval": (0.0, 0.5)},
)


@dataclass(frozen=True)
class Candidate:
    """Settings that take part in a search.

    Attributes:
        name: for tables.
        options: complete.
    """

    name: str
    options: DrawingOptions

    @property
    def cost(self) -> float:
        """Fraction of the positions, 0 to 1, that need an unconditional row: 0 without guidance."""
        interval = self.options.guidance_interval
        assert interval is not None, "complete the options first"
        return interval[1] if self.options.guided else 0.0


def search_space(current: DrawingOptions, num_levels: int) -> list[Candidate]:
    """The default candidates: a grid over guidance and sampling around the current settings, which come first.

    Args:
        current: complete settings of the model; its schedule, top_k and top_p are those of all candidates.
        num_levels: levels that are drawn.
    """
    return _different([Candidate(CURRENT, current), *_grid(current, num_levels)])


def read_candidates(path: str | Path, current: DrawingOptions) -> list[Candidate]:
    """Read candidates from a YAML file of settings by name, and put the current settings first.

    Args:
        path: lines such as `strong: {guidance_scale: 3, temperature: 0.7}`.
        current: complete settings of the model, which fill the ones that a line leaves out.

    Raises:
        UserError: the file cannot be read, or a setting is invalid.
    """
    rows = read_recipe(Path(path))
    if not rows:
        raise UserError(f"{path}: expected lines such as 'strong: {{guidance_scale: 3}}', got none")
    found = [Candidate(CURRENT, current)]
    for name, values in rows.items():
        try:
            found.append(Candidate(str(name), read_settings(values).completed(current)))
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
    return _different(found)


def _grid(current: DrawingOptions, num_levels: int) -> Iterator[Candidate]:
    for scale in _SCALES:
        for temperature, min_p in _SAMPLING:
            yield _candidate(current, {"guidance_scale": scale}, temperature, min_p)
    first_levels = -(-num_levels // 2)
    for scale in _VARIED_SCALES:
        per_level = (scale,) * first_levels + (1.0,) * (num_levels - first_levels)
        for temperature, min_p in _VARIED_SAMPLING:
            for variation in _VARIATIONS:
                yield _candidate(current, {"guidance_scale": scale, **variation}, temperature, min_p)
            if num_levels > 1:
                yield _candidate(current, {"guidance_scale": per_level}, temperature, min_p)


def _candidate(current: DrawingOptions, guidance: Mapping[str, Any], temperature: float, min_p: float) -> Candidate:
    neutral: dict[str, Any] = {"guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0}
    assert current.sampling is not None, "complete the options first"
    sampling = replace(current.sampling, temperature=temperature, min_p=min_p)
    name = ", ".join(f"{key} {_text(value)}" for key, value in guidance.items())
    return Candidate(
        f"{name}, temperature {temperature:g}, min_p {min_p:g}",
        replace(current, **{**neutral, **guidance}, sampling=sampling),
    )


def _text(value: float | tuple[float, ...]) -> str:
    return "/".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"


def _different(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Drop candidates with the same settings as an earlier one."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(repr(to_entry(candidate.options)), candidate)
    return list(found.values())
