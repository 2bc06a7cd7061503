"""Parser of scene prompts: the inverse of `evotok_plugin.scenes.captions`."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import NUMBERS, plural, with_article
from evotok_plugin.scenes.scene import CELL_NAMES, COLORS, RELATIONS, SHAPES, Scene, relation

_PREFIX = "a photo of "
_COUNTS = {name: count for count, name in enumerate(NUMBERS) if count >= 2}
_SINGULAR = {plural(shape): shape for shape in SHAPES}
_COLOR = f"(?:(?P<color>{'|'.join(COLORS)}) )?"
_OBJECT = re.compile(rf"(?P<article>an?) {_COLOR}(?P<shape>{'|'.join(SHAPES)})")
_PLACED = re.compile(rf"{_OBJECT.pattern} in the (?P<cell>{'|'.join(CELL_NAMES)})")
_COUNTED = re.compile(rf"(?P<count>{'|'.join(_COUNTS)}) {_COLOR}(?P<shape>{'|'.join(_SINGULAR)})")
_LINK = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


class Shown(Protocol):
    """An object that an image shows; a `SceneObject` is one."""

    @property
    def shape(self) -> str: ...

    @property
    def color(self) -> str | None: ...

    @property
    def cell(self) -> int: ...


@dataclass(frozen=True)
class Wanted:
    """One phrase of a prompt: `count` objects of a shape, with a color and a grid cell (0..8) where it names them."""

    shape: str
    color: str | None = None
    count: int = 1
    cell: int | None = None

    def fits(self, item: Shown) -> bool:
        """Whether the object has the shape, and the color and the cell if they are named."""
        return self.shape == item.shape and self.color in (None, item.color) and self.cell in (None, item.cell)

    def clause(self) -> dict[str, Any]:
        """The phrase as an `include` clause of a GenEval record, which has no cells."""
        return {"class": self.shape, "count": self.count, **({"color": self.color} if self.color else {})}


@dataclass(frozen=True)
class ScenePrompt:
    """A parsed prompt.

    Attributes:
        text: the prompt.
        wanted: its phrases, in order.
        relation: the position of the first object relative to the second ("left of", ...), or None.
    """

    text: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None

    @property
    def count(self) -> int:
        """The number of objects."""
        return sum(phrase.count for phrase in self.wanted)

    @property
    def exceeds_records(self) -> bool:
        """Whether a GenEval record cannot express the prompt: it names cells, or one shape in several phrases."""
        shapes = {phrase.shape for phrase in self.wanted}
        return len(shapes) < len(self.wanted) or any(phrase.cell is not None for phrase in self.wanted)

    def record(self) -> dict[str, Any]:
        """The GenEval record of the prompt: that of `prompt_record` for the plain prompt of a skill.

        Where a prompt exceeds records, its record has one clause per shape, without colors and relation.
        """
        if self.exceeds_records:
            shapes = dict.fromkeys(phrase.shape for phrase in self.wanted)
            counts = {shape: sum(phrase.count for phrase in self.wanted if phrase.shape == shape) for shape in shapes}
            include = [{"class": shape, "count": count} for shape, count in counts.items()]
            return {"tag": self._skill(), "include": include, "prompt": self.text}
        include = [phrase.clause() for phrase in self.wanted]
        if self.relation is not None:
            first, second = include
            include = [second, {**first, "position": [self.relation, 0]}]
        record = {"tag": self._skill(), "include": include}
        if self.wanted[0].count > 1:
            record["exclude"] = [{"class": self.wanted[0].shape, "count": self.wanted[0].count + 1}]
        return {**record, "prompt": self.text}

    def _skill(self) -> str:
        """The skill of GenEval that the prompt belongs to."""
        if self.wanted[0].count > 1:
            return "counting"
        if self.relation is not None:
            return "position"
        colored = any(phrase.color for phrase in self.wanted)
        if len(self.wanted) == 1:
            return "colors" if colored else "single_object"
        return "color_attr" if colored else "two_object"

    def found_in(self, items: Sequence[Shown], related: Callable[[int, int], bool]) -> bool:
        """Whether different objects fit all phrases, and the relation; there may be further objects.

        Args:
            items: the objects shown.
            related: whether the object at the first index has the prompt's relation to the object at the second.
        """
        return any(self.relation is None or related(found[0], found[1]) for found in self._assignments(items, ()))

    def _assignments(self, items: Sequence[Shown], taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """All ways to choose different objects, by index, for the objects of the phrases, in order."""
        expanded = [phrase for phrase in self.wanted for _ in range(phrase.count)]
        if len(taken) == len(expanded):
            yield taken
            return
        for index, item in enumerate(items):
            if index not in taken and expanded[len(taken)].fits(item):
                yield from self._assignments(items, (*taken, index))

    def shown_by(self, scene: Scene) -> bool:
        """Whether the scene has the objects of the prompt and no others."""
        items = scene.objects
        return len(items) == self.count and self.found_in(
            items, lambda first, second: relation(items[first], items[second]) == self.relation
        )


def parse_prompt(text: str) -> ScenePrompt:
    """Parse a prompt that `evotok_plugin.scenes.captions` can write, with or without "a photo of".

    Raises:
        UserError: the text is not such a prompt.
    """
    plain = text.strip().removeprefix(_PREFIX)
    if counted := _COUNTED.fullmatch(plain):
        shape, count = _SINGULAR[counted["shape"]], _COUNTS[counted["count"]]
        return ScenePrompt(text, (Wanted(shape, counted["color"], count),))
    placed = [_PLACED.fullmatch(part) for part in plain.split(", ")]
    if all(placed):
        return ScenePrompt(text, tuple(_wanted(match, text) for match in placed if match))
    first, *link = _LINK.split(plain, maxsplit=1)
    single = [_OBJECT.fullmatch(part) for part in (first, *link[1:])]
    if not all(single):
        raise _not_understood(text)
    how = link[0] if link and link[0] != "and" else None
    return ScenePrompt(text, tuple(_wanted(match, text) for match in single if match), how)


def _wanted(match: re.Match[str], text: str) -> Wanted:
    named = match.groupdict()
    color, shape = named["color"], named["shape"]
    if not with_article(color or shape).startswith(f"{named['article']} "):
        raise _not_understood(text)
    return Wanted(shape, color, cell=CELL_NAMES.index(named["cell"]) if "cell" in named else None)


def _not_understood(text: str) -> UserError:
    return UserError(
        f"prompt {text!r} is not a scene prompt; expected one object ('a photo of a red circle'), "
        "two ('a ring and a cross', 'a ring above a blue cross'), a number of them ('three red triangles'), or a list "
        f"with places ('a red circle in the top left, a blue ring in the center'); shapes: {', '.join(SHAPES)}; "
        f"colors: {', '.join(COLORS)}; numbers: {', '.join(_COUNTS)}; relations: {', '.join(RELATIONS)}; "
        f"places: {', '.join(CELL_NAMES)}"
    )
