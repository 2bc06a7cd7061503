"""Several positions of one image per step of the language model, with the codes of drawing them one by one.

The seed of an image fixes the noise of every position in advance, so the codes of a position are a function of the
codes before it. A step of the language model reads the last codes and drafts of the codes that follow, and the image
head draws all positions after them at once, each with its own noise. The first result is right. Each further one is
right if the draft that it follows equals the right codes. Right codes are kept, the cache forgets the steps of wrong
drafts, and the other results are the next drafts. This is Jacobi iteration (Santilli et al. 2023, arXiv 2305.10427; for
images Teng et al. 2024, arXiv 2410.01699, who accept drafts at random instead of fixing the noise). Every image equals
that of single steps up to rounding, so the distribution does not change.

N positions, W positions per step, w <= W of one step, L levels, D width of the language model, G = 1 row, 2 with
guidance (conditional first).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.generation.head_steps import ImageHeadStepper
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import DrawingOptions
from llava_ext.generation.steps import Steps, has_fixed_rotation


class SpeculativeSteps:
    """Iterator over the codes (1, L) of every position of one image.

    As in `SingleSteps`, the unconditional row takes part only from the first step with guidance to the last one.

    Attributes:
        num_steps: steps of the language model so far, without that of the prompt.
    """

    def __init__(
        self,
        stepper: ImageHeadStepper,
        steps: Steps,
        noise: Tensor,
        options: DrawingOptions,
        unconditional: Steps | None = None,
        *,
        window: int,
        grid_size: int,
    ) -> None:
        """Start after the prompt.

        Args:
            stepper: of a head that draws all levels of a position in one step.
            steps: the language model after the prompt, a single row with room for the image.
            noise: (1, N, L).
            options: complete.
            unconditional: the language model after the negative prompt, a single row.
            window: W.
            grid_size: positions in a row of the image.
        """
        assert stepper.steps_per_position == 1 and noise.shape[0] == 1
        self._stepper, self._steps, self._noise, self._options = stepper, steps, noise[0], options
        self._unconditional, self._window, self._grid_size = unconditional, window, grid_size
        scales = [stepper.scales_at(position, options) for position in range(stepper.num_positions)]
        self._scales = torch.tensor(scales, device=noise.device)  # (N, L)
        self._guided = stepper.guided_steps(options) if unconditional is not None else range(0)
        self.num_steps = 0

    def __iter__(self) -> Iterator[Tensor]:
        count, stepper = self._stepper.num_positions, self._stepper
        codes = torch.zeros_like(self._noise, dtype=torch.long)  # (N, L), right up to a position, then drafts
        self._use_rows(0, 1, codes)
        codes[:1] = self._draw(self._steps.hidden[:, None], 0)
        yield codes[:1].clone()
        done = drafted = 1  # positions that are right, and positions with codes
        while done < count:
            end = min(done + self._window, count)
            for position in range(drafted, end - 1):
                codes[position] = codes[self._similar(position)]
            self._use_rows(done, end, codes)
            inputs = stepper.embed(codes[done - 1 : end - 1], 0, self._positions(done - 1, end - 1))
            states = self._steps.run(inputs.expand(self._steps.num_rows, -1, -1))  # (G, w, D)
            self.num_steps += 1
            found = self._draw(states, done)  # (w, L)
            equal = (found[:-1] == codes[done : end - 1]).all(dim=1)
            num_right = 1 + int(equal.long().cumprod(dim=0).sum())
            self._steps.drop_last(len(found) - num_right, states[:, num_right - 1])
            codes[done:end] = found
            drafted, done = end, done + num_right
            for position in range(done - num_right, done):
                yield codes[position : position + 1].clone()

    def _similar(self, position: int) -> int:
        """The position whose codes are the first draft: above, or in the first row of the image to the left."""
        return position - (self._grid_size if position >= self._grid_size else 1)

    def _positions(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self._noise.device)

    def _use_rows(self, start: int, end: int, codes: Tensor) -> None:
        """Add or drop the unconditional row before the positions from `start` to `end` are drawn; those before `start`
        are right."""
        if self._steps.num_rows == 1 and start < self._guided.stop and end > self._guided.start:
            assert self._unconditional is not None
            missed = max(0, start - 1)  # the input of the next step is that of position start - 1
            row = Steps.joined([self._unconditional], missed)
            if missed:
                row.run(self._stepper.embed(codes[:missed], 0, self._positions(0, missed))[None])
            self._steps.add_rows(row)
        elif self._steps.num_rows == 2 and start >= self._guided.stop:
            self._steps.select([0])

    def _draw(self, states: Tensor, start: int) -> Tensor:
        """Draw the codes (w, L) of the positions from `start` on: states (G, w, D)."""
        part = slice(start, start + states.shape[1])
        return self._stepper.draw(states.flatten(0, 1), 0, self._noise[part], self._options, self._scales[part])


def speculative_steps(
    stepper: ImageHeadStepper,
    steps: Sequence[Steps],
    noise: Tensor,
    options: DrawingOptions,
    unconditional: Steps | None = None,
    *,
    window: int,
    grid_size: int,
) -> Iterator[Tensor]:
    """Yield the codes (R, L) of every position of R images; each image has steps of its own (`SpeculativeSteps`).

    Args:
        steps: the language model after each prompt, R single rows.
        noise: (R, N, L).
    """
    images = [
        SpeculativeSteps(stepper, one, own, options, unconditional, window=window, grid_size=grid_size)
        for one, own in zip(steps, noise.split(1), strict=True)
    ]
    for codes in zip(*images, strict=True):
        yield torch.cat(codes)


def check_speculation(model: ModelInterface, window: int, use_graphs: bool) -> None:
    """Check that a model can draw several positions per step.

    Raises:
        UserError: it cannot, or the number is below 1.
    """
    if window < 1:
        raise UserError(f"speculate must be at least 1, got {window}; 1 draws one position per step")
    if window == 1:
        return
    if use_graphs:
        raise UserError("speculate and use_graphs exclude each other: recorded steps all have one position")
    if model.config.image_head == "flat":
        raise UserError(
            f"speculate={window}: expected the depth head, got the flat head, which draws one level per step; leave "
            "out speculate"
        )
    if not has_fixed_rotation(model.config.text_config):
        raise UserError(
            f"speculate={window}: the rotary embeddings of this language model change with the length, so that several "
            "positions at once differ from single steps; leave out speculate"
        )
