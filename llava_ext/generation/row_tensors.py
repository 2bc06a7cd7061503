"""Assemble the inputs of the language model from parts of a batch, and collect the codes of rows over their steps.

G rows of a batch with their partners, R rows of a part, T steps of a prompt, D width of the language model, l codes per
step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RowInputs:
    """The inputs of the next step, set for some rows of the batch at a time; rows that are not set get a filler."""

    def __init__(self, num_rows: int, filler: Tensor) -> None:
        """
        Args:
            filler: (1, D).
        """
        self._filler = filler
        self._parts: list[Tensor] = []
        self._places: list[int | None] = [None] * num_rows  # by row: its place in the joined parts
        self._num_places = 0

    def __contains__(self, row: int) -> bool:
        return self._places[row] is not None

    def set(self, rows: Sequence[int], embeddings: Tensor) -> None:
        """Set the inputs of rows to embeddings (R, D)."""
        self._parts.append(embeddings)
        for row in rows:
            self._places[row] = self._num_places
            self._num_places += 1

    def joined(self, partnered: Sequence[int] = ()) -> Tensor:
        """The inputs of all rows, followed by those of the `partnered` rows again: (G, D)."""
        places = [self._num_places if place is None else place for place in self._places]
        places += [places[row] for row in partnered]
        parts = self._parts if max(places) < self._num_places else [*self._parts, self._filler]
        inputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if places == list(range(len(inputs))):
            return inputs
        return inputs[torch.tensor(places, device=inputs.device)]


def append_to_rows(embeddings: Tensor, mask: Tensor, last: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Append an embedding (1, D) to the wanted rows of embeddings (R, T, D) with their mask (R, T), which are padded on
    the left; the other rows get padding."""
    if not any(wanted):
        return embeddings, mask
    last = last.to(embeddings.dtype).expand(len(wanted), 1, -1)
    ones = mask.new_ones(len(wanted), 1)
    appended, seen = torch.cat([embeddings, last], 1), torch.cat([mask, ones], 1)
    if all(wanted):
        return appended, seen
    padded, unchanged = torch.cat([torch.zeros_like(last), embeddings], 1), torch.cat([torch.zeros_like(ones), mask], 1)
    chosen = torch.tensor(wanted, device=mask.device)[:, None]
    return torch.where(chosen[..., None], appended, padded), torch.where(chosen, seen, unchanged)


def codes_of_rows(drawn: Sequence[Sequence[tuple[Tensor, int]]]) -> Tensor:
    """The codes of rows that have taken equally many steps: (R, steps x l).

    Args:
        drawn: for each row and step, the codes (rows drawn together, l) and the row's place in them.
    """
    steps: list[Tensor] = []
    for of_step in zip(*drawn, strict=True):
        codes, _ = of_step[0]
        if any(own is not codes for own, _ in of_step):
            steps.append(torch.stack([own[place] for own, place in of_step]))
            continue
        places = [place for _, place in of_step]
        steps.append(codes if places == list(range(len(codes))) else codes[places])
    return torch.cat(steps, dim=1)
