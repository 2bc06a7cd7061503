"""Answers that are one image each, selected among several candidates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.generation.events import CandidateDrawn, Event, Finished, ImageDrawn, ImagePreview, ImageStarted
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.selection import candidate_seed, candidates_for, make_selector
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_CANDIDATES_PER_BATCH = 16  # of each conversation


def best_answers(
    run: Callable[[int, list[int]], Iterator[Event]],
    model: ModelInterface,
    processor: EvoTokLlavaProcessor,
    seeds: list[int],
    best_of: int,
    prompts: Sequence[str] | None,
    lock: AbstractContextManager[None] | None = None,
) -> Iterator[Event]:
    """Yield the events of answers; with `best_of` above 1, of the best of that many candidates of each.

    Then the image of an answer comes when all candidates are drawn. Until then, the previews of a conversation are
    those of the first candidate of each batch of candidates.

    Args:
        run: yields the events of the answers of that many rows per conversation, the rows of a conversation together,
            from one seed per row.
        seeds: of the conversations; candidate 0 has this seed, further ones that of `candidate_seed`.
        best_of: above 1, each answer must be one image.
        prompts: for `best_of` above 1, what the image of each conversation should show: candidates are scored for it.
        lock: held while the model scores candidates and decodes the best ones.

    Raises:
        UserError: a prompt is missing or empty.
    """
    if best_of == 1:
        yield from run(1, seeds)
        return
    wanted = [] if prompts is None else list(prompts)
    if len(wanted) != len(seeds) or not all(prompt.strip() for prompt in wanted):
        raise UserError(
            f"best_of={best_of} scores images for prompts; expected {len(seeds)}, one per conversation and none empty, "
            f"got prompts={prompts!r:.200}"
        )
    selector = make_selector(model, processor, best_of, judge=None)
    drawn: dict[tuple[int, int], Tensor] = {}
    ids: dict[tuple[int, int], Tensor] = {}
    for first in range(0, best_of, _CANDIDATES_PER_BATCH):
        numbers = range(first, min(first + _CANDIDATES_PER_BATCH, best_of))
        row_seeds = [candidate_seed(seed, number) for seed in seeds for number in numbers]
        for event in run(len(numbers), row_seeds):
            row, place = divmod(event.row, len(numbers))
            if isinstance(event, CandidateDrawn):
                drawn[row, numbers[place]] = event.codes
            elif isinstance(event, Finished):
                ids[row, numbers[place]] = event.ids
            elif isinstance(event, ImagePreview) and place == 0:
                yield replace(event, row=row)
            elif isinstance(event, ImageStarted) and numbers[place] == 0:
                yield replace(event, row=row)
    candidates = candidates_for(wanted, seeds, best_of)
    codes = torch.stack([drawn[one.image, one.number] for one in candidates])
    with lock or nullcontext(), torch.no_grad():
        choices = selector.add(candidates, codes)
        pixels = model.vision_tower.decode_pixels(torch.stack([choice.codes for choice in choices]))
    for choice, image in zip(choices, processor.image_processor.to_pil(pixels), strict=True):
        best = (choice.candidate.image, choice.candidate.number)
        yield ImageDrawn(best[0], 0, image, choice.codes, choice)
        yield Finished(best[0], ids[best])
