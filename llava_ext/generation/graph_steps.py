"""The steps of images that are drawn together: one after another, or one of them recorded and repeated.

R rows, G = 2 R with guidance (conditional first), l codes a step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_ext.generation.options import DrawingOptions
from llava_ext.generation.steps import Steps


class SingleSteps:
    """Codes (R, l), step by step."""

    def __init__(self, stepper, steps: Steps, noise: Tensor, options: DrawingOptions) -> None:
        """`steps` has seen the prompts; noise (R, steps, l)."""
        self._stepper, self._steps, self._noise, self._options = stepper, steps, noise, options

    def __iter__(self) -> Iterator[Tensor]:
        stepper, count = self._stepper, self._stepper.steps_per_image
        for index in range(count):
            scale = stepper.scale_at(index, self._options)
            codes = stepper.draw(self._steps.hidden, index, self._noise[:, index], self._options.sampling, scale)
            yield codes
            if index + 1 < count:
                embeddings = stepper.embed(codes, index, index // stepper.steps_per_position)
                self._steps.step(_with_partners(embeddings, self._options))


class GraphSteps:
    """The same codes from steps that are all alike: what differs from one to the next stands in memory.

    On CUDA the steps of the first position are recorded as graphs and repeated from then on. Elsewhere they run as they
    are.
    """

    def __init__(self, stepper, steps: Steps, noise: Tensor, options: DrawingOptions) -> None:
        self._stepper, self._steps, self._options = stepper, steps.fixed(), options
        self._all_noise = noise
        self._noise = noise[:, 0].clone()
        self._position = torch.zeros((), dtype=torch.long, device=noise.device)
        self._scale = torch.ones((), device=noise.device)
        self._codes: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self._stepper.steps_per_image):
            position, kind = divmod(index, self._stepper.steps_per_position)
            self._noise.copy_(self._all_noise[:, index])
            self._position.fill_(position)
            self._scale.fill_(self._stepper.scale_at(index, self._options))
            yield self._step(kind).clone()

    def _step(self, kind: int) -> Tensor:
        if self._noise.device.type != "cuda":
            self._run(kind)
        elif kind in self._graphs:
            self._graphs[kind].replay()
        else:
            self._record(kind)
        return self._codes[kind]

    def _run(self, kind: int) -> None:
        codes = self._stepper.draw(self._steps.hidden, kind, self._noise, self._options.sampling, self._scale)
        self._codes[kind] = codes
        self._steps.step(_with_partners(self._stepper.embed(codes, kind, self._position), self._options))

    def _record(self, kind: int) -> None:
        """Run the step once, for libraries to set themselves up, put back what it changed, and record it."""
        state = self._steps.state()
        before = [value.clone() for value in state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(kind)
        torch.cuda.current_stream().wait_stream(aside)
        for value, old in zip(state, before, strict=True):
            value.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(kind)
        graph.replay()  # recording runs nothing
        self._graphs[kind] = graph


def _with_partners(embeddings: Tensor, options: DrawingOptions) -> Tensor:
    """What both rows of an image read next; they differ in their prompts alone."""
    return torch.cat([embeddings, embeddings]) if options.guided else embeddings
