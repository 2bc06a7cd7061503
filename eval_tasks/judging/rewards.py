"""Rewards for drawn images from the judges of the benchmarks; each object is a `llava_ext.rewards.Reward`.

Rewards with models take them from the options of `eval_tasks.judging.options`, by default from the environment.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from eval_tasks.judging.clip import ClipScorer, find_clip, load_clip
from eval_tasks.judging.drawn_run import Drawn
from eval_tasks.judging.options import JudgeOptions, variable
from eval_tasks.judging.rules import Instance, directions, evaluate
from eval_tasks.judging.scene_detector import SceneDetector
from eval_tasks.judging.vqa import VQA_SCORE_QUESTION, open_vqa
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.prompt_parser import ScenePrompt, parse_prompt
from evotok_plugin.scenes.scene import GRID

# Scenes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A detected object as `ScenePrompt` compares it; `cell` is that of the center of the box."""

    shape: str
    color: str | None
    cell: int


def _seen(instance: Instance, image: Image) -> _Seen:
    left, top, right, bottom = instance.box
    column, row = (left + right) / 2 / image.width, (top + bottom) / 2 / image.height
    # The box of an object that the border cuts may have its center outside the image.
    column, row = (min(max(int(place * GRID), 0), GRID - 1) for place in (column, row))
    return _Seen(instance.label, instance.color, row * GRID + column)


def _names_found(prompt: ScenePrompt, instances: Sequence[Instance], image: Image) -> bool:
    """Whether different detected objects fit the prompt: shapes, colors, cells and the relation of their boxes."""

    def related(first: int, second: int) -> bool:
        return prompt.relation in directions(instances[first].box, instances[second].box)

    return prompt.found_in([_seen(instance, image) for instance in instances], related)


class SceneReward:
    """`scene_judge`: 1.0 if GenEval's rules accept what the scene detector finds, else 0.0.

    As in GenEval, further objects do not count against an image, except in prompts with a number. Prompts with cells,
    or with one shape in several colors, exceed GenEval's records: there, different objects must also fit the phrases.
    """

    def __init__(self) -> None:
        self._detector = SceneDetector()

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images of any size for R scene prompts.

        Raises:
            UserError: a prompt is not a scene prompt.
        """
        parsed = [parse_prompt(prompt) for prompt in prompts]
        found = self._detector.detect_batch(images)
        return [float(self._accepts(*row)) for row in zip(parsed, found, images, strict=True)]

    def _accepts(self, prompt: ScenePrompt, instances: Sequence[Instance], image: Image) -> bool:
        if not evaluate(prompt.record(), instances, self._detector.rules).correct:
            return False
        return not prompt.exceeds_records or _names_found(prompt, instances, image)


class SceneExactReward:
    """`scene_exact`: 1.0 if the image shows exactly what the prompt says and is drawn cleanly, else 0.0.

    Shapes, number, and the colors, cells and relation that the prompt names must be right. There must be no further
    object, and no other visible region: one that fits no shape, or a fragment larger than a speck.
    """

    def __init__(self) -> None:
        self._detector = SceneDetector()

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images of any size for R scene prompts.

        Raises:
            UserError: a prompt is not a scene prompt.
        """
        parsed = [parse_prompt(prompt) for prompt in prompts]
        return [float(self._shows(prompt, image)) for prompt, image in zip(parsed, images, strict=True)]

    def _shows(self, prompt: ScenePrompt, image: Image) -> bool:
        reading = self._detector.read(image)
        if reading.num_leftovers or len(reading.instances) != prompt.count:
            return False
        return _names_found(prompt, reading.instances, image)


# Models --------------------------------------------------------------------------------------------------------


class GenEvalReward:
    """`geneval_judge`: 1.0 if an image fulfills its prompt by the judge of the task `geneval`, else 0.0.

    Raises:
        UserError: the detector or the color classifier is missing or damaged, or is that of scenes.
    """

    def __init__(self, options: JudgeOptions | None = None) -> None:
        from eval_tasks.tasks.geneval.task import SCENES, open_judge

        options = options or JudgeOptions.from_environment()
        if options.detector == SCENES:
            raise UserError(
                f"geneval_judge needs a detector of COCO's classes, got {variable('detector')}={SCENES}; "
                "use scene_judge for scenes"
            )
        self._judge, self._batch_size = open_judge(options), options.batch_size

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images for R prompts of GenEval's six templates.

        Raises:
            UserError: a prompt of another form.
        """
        from eval_tasks.tasks.geneval.prompt_parser import parse_prompt as parse_geneval_prompt

        records = [json.dumps(parse_geneval_prompt(prompt)) for prompt in prompts]
        drawn = [
            (Drawn(index, 0, f"image {index}", {"record": record}), image)
            for index, (record, image) in enumerate(zip(records, images, strict=True))
        ]
        judgements = self._judge.judge(
            drawn[start : start + self._batch_size] for start in range(0, len(drawn), self._batch_size)
        )
        return [judgement.score for judgement in judgements]


class ClipReward:
    """`clip_score`: CLIPScore of the image and its prompt, 2.5 * max(cosine similarity, 0).

    Raises:
        UserError: the CLIP is missing or damaged.
    """

    def __init__(self, options: JudgeOptions | None = None) -> None:
        options = options or JudgeOptions.from_environment()
        what = "the CLIP of clip_score"
        self._scorer = ClipScorer(load_clip(find_clip(options, what), what), options.torch_device)
        self._batch_size = options.batch_size

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images for R prompts of any form; CLIP's tokenizer cuts long ones."""
        return _in_batches(self._scorer.score, images, prompts, self._batch_size)


class VqaReward:
    """`vqa_score`: VQAScore of the image and its prompt, the probability that a VQA model says the image shows it.

    Raises:
        UserError: the model is missing or damaged, or does not answer questions about images.
    """

    def __init__(self, options: JudgeOptions | None = None) -> None:
        options = options or JudgeOptions.from_environment()
        self._vqa, self._batch_size = open_vqa(options), options.batch_size

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images for R prompts of any form."""
        return _in_batches(self._score, images, prompts, self._batch_size)

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        questions = [VQA_SCORE_QUESTION.format(prompt=prompt) for prompt in prompts]
        return [answer.yes for answer in self._vqa.ask(images, questions)]


def _in_batches(
    score: Callable[[Sequence[Image], Sequence[str]], list[float]],
    images: Sequence[Image],
    prompts: Sequence[str],
    batch_size: int,
) -> list[float]:
    starts = range(0, len(images), batch_size)
    parts = [score(images[start : start + batch_size], prompts[start : start + batch_size]) for start in starts]
    return [value for part in parts for value in part]
