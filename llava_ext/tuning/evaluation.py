"""Draw and judge the images of a candidate."""

from collections.abc import Callable, Sequence

from PIL.Image import Image

from llava_ext.model_folder import OpenModel
from llava_ext.rewards import Reward
from llava_ext.tuning.candidates import Candidate
from llava_ext.tuning.journal import Journal
from llava_ext.tuning.scores import Job, Result


class Evaluator:
    """Scores candidates on the same images: equal prompts and seeds for all of them."""

    def __init__(
        self,
        opened: OpenModel,
        judge: Reward,
        jobs: Sequence[Job],
        batch_size: int,
        journal: Journal | None = None,
        on_images: Callable[[int], object] | None = None,
    ) -> None:
        """Prepare to draw.

        Args:
            batch_size: images drawn and judged together.
            journal: holds the scores of an earlier run, and gets every new batch.
            on_images: called with the number of images that were drawn or found in the journal.
        """
        self._opened, self._judge, self._jobs, self._batch_size = opened, judge, jobs, batch_size
        self._journal, self._on_images = journal, on_images
        self._scores: dict[Candidate, list[float]] = {}

    def evaluate(self, candidate: Candidate, num_images: int) -> Result:
        """Score a candidate on the first images of the search; those of earlier calls are not drawn again.

        Raises:
            UserError: the judge cannot score a prompt, or the journal cannot be written.
        """
        scores = self._scores.setdefault(candidate, [])
        if self._journal is not None:
            found = self._journal.scores(candidate)[len(scores) : num_images]
            scores += found
            self._report(len(found))
        while len(scores) < num_images:
            jobs = self._jobs[len(scores) : min(len(scores) + self._batch_size, num_images)]
            new = self._judged(candidate, jobs)
            if self._journal is not None:
                self._journal.append(candidate, new)
            scores += new
            self._report(len(new))
        tags = tuple(job.prompt.tag for job in self._jobs[:num_images])
        return Result(candidate, tags, tuple(scores[:num_images]))

    def _judged(self, candidate: Candidate, jobs: Sequence[Job]) -> list[float]:
        prompts = [job.prompt.text for job in jobs]
        images = self._opened.model.generate_images(
            prompts,
            self._opened.processor,
            seed=[job.seed for job in jobs],
            batch_size=len(jobs),
            **candidate.options.settings(),
        )
        assert all(isinstance(image, Image) for image in images)
        return [float(score) for score in self._judge(prompts, list(images))]

    def _report(self, num_images: int) -> None:
        if self._on_images is not None and num_images:
            self._on_images(num_images)
