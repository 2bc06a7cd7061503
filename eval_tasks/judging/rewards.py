"""Rewards for drawn images from the judges of the benchmarks; each object is a `llava_ext.rewards.Reward`."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from eval_tasks.judging.rules import Instance, directions, evaluate
from eval_tasks.judging.scene_detector import SceneDetector
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
