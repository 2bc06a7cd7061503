"""The choice of a teacher's layers: one, several that are summed, or different ones for different depths.

`-2` is one layer; `-2+-6` the sum of two; `4:6,16:-2` layer 6 as the target of depth 4, layer -2 as that of depth 16.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from evotok_plugin.errors import UserError

_FORM = "expected a layer such as -2, a sum such as -2+-6, or layers by depth such as 4:6,16:-2"


@dataclass(frozen=True)
class TeacherLayers:
    """Layers by depth, each a tuple of indices whose features are summed.

    Attributes:
        by_depth: layers by the number of levels that must predict them; the key None stands for `semantic_depth`.
    """

    by_depth: Mapping[int | None, tuple[int, ...]]

    @classmethod
    def parse(cls, text: str) -> "TeacherLayers":
        """Read the form of the module's docstring.

        Raises:
            UserError: the text has another form, or names a depth twice.
        """
        chosen: dict[int | None, tuple[int, ...]] = {}
        for part in re.sub(r"\s", "", text).split(","):
            match = re.fullmatch(r"(?:(\d+):)?(-?\d+(?:\+-?\d+)*)", part)
            depth = int(match[1]) if match and match[1] else None
            if match is None or depth in chosen or (depth is None and "," in text):
                raise UserError(f"teacher_layer: {_FORM}, got {text!r}")
            chosen[depth] = tuple(map(int, match[2].split("+")))
        return cls(chosen)

    def at(self, semantic_depth: int, num_quantizers: int) -> dict[int, tuple[int, ...]]:
        """Layers by depth, from the shallowest; the last depth is `semantic_depth`.

        Raises:
            UserError: a depth does not exist, or there is no layer for `semantic_depth`.
        """
        named = {semantic_depth if depth is None else depth: layers for depth, layers in self.by_depth.items()}
        for depth in named:
            if not 1 <= depth <= num_quantizers:
                raise UserError(
                    f"teacher_layer: depth {depth} does not exist; the tokenizer has {num_quantizers} levels"
                )
        if semantic_depth not in named:
            raise UserError(
                f"teacher_layer names depths {', '.join(map(str, named))}, but none for semantic_depth "
                f"{semantic_depth}, at which the semantic decoder is trained; add {semantic_depth}:LAYER"
            )
        return dict(sorted(named.items(), key=lambda item: (item[0] == semantic_depth, item[0])))
