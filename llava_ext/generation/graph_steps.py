"""The steps of images that are drawn together, run one by one or recorded as CUDA graphs and replayed.

R rows, G = 2 R with guidance (conditional first), l codes per step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_ext.generation.head_steps import ImageHeadStepper
from llava_ext.generation.options import DrawingOptions
from llava_ext.generation.steps import Steps


class SingleSteps:
    """Iterator over the codes (R, l) of every step, computed one by one.

    Unconditional rows take part only from the first step with guidance to the last one. Their steps before the first
    one are computed all at once, because keys and values of those steps are needed later.
    """

    def __init__(
        self,
        stepper: ImageHeadStepper,
        steps: Steps,
        noise: Tensor,
        options: DrawingOptions,
        unconditional: Steps | None = None,
    ) -> None:
        """Start after the prompts.

        Args:
            steps: the language model after the prompts, R rows.
            noise: (R, steps, l).
            options: complete.
            unconditional: the language model after the negative prompt, a single row (`Steps.split`).
        """
        self._stepper, self._steps, self._noise, self._options = stepper, steps, noise, options
        self._unconditional = unconditional

    def __iter__(self) -> Iterator[Tensor]:
        stepper, count = self._stepper, self._stepper.steps_per_image
        scales = [stepper.scales_at(index, self._options) for index in range(count)]
        guided = stepper.guided_steps(self._options) if self._unconditional is not None else range(0)
        before: list[Tensor] = []  # inputs (R, D) of the steps before the first one with guidance
        for index in range(count):
            if guided and index == guided.start:
                self._add_unconditional_rows(before)
            codes = stepper.draw(self._steps.hidden, index, self._noise[:, index], self._options, scales[index])
            yield codes
            if index + 1 < count:
                if index + 1 >= guided.stop:
                    self._steps.select(list(range(self._noise.shape[0])))
                embeddings = stepper.embed(codes, index, index // stepper.steps_per_position)
                if index < guided.start:
                    before.append(embeddings)
                self._steps.step(_for_all_rows(embeddings, self._steps.num_rows))

    def _add_unconditional_rows(self, before: list[Tensor]) -> None:
        assert self._unconditional is not None
        rows = Steps.joined([self._unconditional] * self._noise.shape[0], len(before))
        if before:
            rows.run(torch.stack(before, dim=1))
        self._steps.add_rows(rows)


class GraphSteps:
    """Iterator over the same codes, from steps that differ only in the contents of memory.

    On CUDA the steps of the first position are recorded as graphs, which all later positions replay. On other devices
    the steps run as they are.
    """

    def __init__(
        self,
        stepper: ImageHeadStepper,
        steps: Steps,
        noise: Tensor,
        options: DrawingOptions,
        unconditional: Steps | None = None,
    ) -> None:
        """As `SingleSteps`; the unconditional rows take part in every step."""
        if unconditional is not None:
            steps.add_rows(Steps.joined([unconditional] * noise.shape[0], 0))
        self._stepper, self._steps, self._options = stepper, steps.to_fixed(), options
        self._all_noise = noise
        self._noise = noise[:, 0].clone()
        self._position = torch.zeros((), dtype=torch.long, device=noise.device)
        self._scales = torch.ones(stepper.codes_per_step, device=noise.device)
        self._codes: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self._stepper.steps_per_image):
            position, kind = divmod(index, self._stepper.steps_per_position)
            self._noise.copy_(self._all_noise[:, index])
            self._position.fill_(position)
            self._scales.copy_(torch.tensor(self._stepper.scales_at(index, self._options)))
            yield self._step(kind).clone()

    def _step(self, kind: int) -> Tensor:
        """Run a step; `kind` is its number within the position."""
        if self._noise.device.type != "cuda":
            self._run(kind)
        elif kind in self._graphs:
            self._graphs[kind].replay()
        else:
            self._record(kind)
        return self._codes[kind]

    def _run(self, kind: int) -> None:
        codes = self._stepper.draw(self._steps.hidden, kind, self._noise, self._options, self._scales)
        self._codes[kind] = codes
        embeddings = self._stepper.embed(codes, kind, self._position)
        self._steps.step(_for_all_rows(embeddings, self._steps.hidden.shape[0]))

    def _record(self, kind: int) -> None:
        """Run the step once so that libraries initialize themselves, restore the state, and record the step."""
        state = self._steps.state()
        before = [value.clone() for value in state]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            self._run(kind)
        torch.cuda.current_stream().wait_stream(warm_up)
        for value, old in zip(state, before, strict=True):
            value.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(kind)
        graph.replay()  # recording executes nothing
        self._graphs[kind] = graph


def _for_all_rows(embeddings: Tensor, num_rows: int) -> Tensor:
    """Repeat the embeddings (R, D) for unconditional rows (G, D): both rows of an image read the same codes."""
    return torch.cat([embeddings, embeddings]) if num_rows > embeddings.shape[0] else embeddings
