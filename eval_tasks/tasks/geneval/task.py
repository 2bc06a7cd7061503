"""The task `geneval`: GenEval's 553 prompts, judged by its rules on detected instances and colors named by CLIP."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from PIL.Image import Image

from eval_tasks.judging.clip import find_clip
from eval_tasks.judging.colors import WHAT as COLOR_CLASSIFIER
from eval_tasks.judging.colors import ColorClassifier, Crop
from eval_tasks.judging.detectors import Detector, Mask2FormerDetector, check_detector
from eval_tasks.judging.drawn_run import Drawn
from eval_tasks.judging.judge_run import Batch, Benchmark
from eval_tasks.judging.options import JudgeOptions, variable
from eval_tasks.judging.rules import Instance, colors_wanted, evaluate
from eval_tasks.judging.scene_detector import SceneDetector
from eval_tasks.judging.scores import Judgement, Stopwatch
from eval_tasks.judging.vocabulary import COLORS, SKILLS
from eval_tasks.judging.weights import fetch
from eval_tasks.tasks.geneval.prompts import geneval_records
from eval_tasks.tasks.judged_task import JudgedTask
from evotok_plugin.errors import UserError

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
SCENES = "scenes"


@dataclass(eq=False)
class _Seen:
    """An image that waits for its judgement: its instances, and its unclassified crops by index of the instance."""

    drawn: Drawn
    record: dict
    instances: list[Instance]
    crops: dict[int, Crop]


class GenEvalJudge:
    """Judges with a detector, and with a color classifier if the detector does not report colors.

    Images go through the detector batch by batch. The classifier runs on full batches of crops from any images; while
    crops wait, only they stay in memory, not their images.
    """

    def __init__(self, detector: Detector, colors: ColorClassifier | None, batch_size: int) -> None:
        self.detector, self.colors, self.batch_size = detector, colors, batch_size
        self.stopwatch = Stopwatch()

    def judge(self, batches: Iterator[Batch]) -> Iterator[Judgement]:
        """Judge images of documents with a GenEval `record`.

        Raises:
            UserError: a record with a class or color that the judge does not know.
        """
        waiting: deque[_Seen] = deque()
        for batch in batches:
            with self.stopwatch:
                found = self.detector.detect_batch([image for _, image in batch])
            for (drawn, image), instances in zip(batch, found, strict=True):
                waiting.append(self._seen(drawn, image, instances))
            yield from self._finished(waiting, least=self.batch_size)
        yield from self._finished(waiting, least=1)

    def _seen(self, drawn: Drawn, image: Image, instances: list[Instance]) -> _Seen:
        try:
            record = json.loads(drawn.document["record"])
            self._check(record)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"prompt {drawn.index} has no valid GenEval record ({error!r}); draw again") from error
        crops: dict[int, Crop] = {}
        if self.colors is not None:
            for instance in colors_wanted(record, instances, self.detector.rules):
                crops[instances.index(instance)] = self.colors.prepare(image, instance)
        return _Seen(drawn, record, [replace(instance, mask=None) for instance in instances], crops)

    def _check(self, record: dict) -> None:
        clauses = [*record["include"], *record.get("exclude", ())]
        unknown = [clause["class"] for clause in clauses if clause["class"] not in self.detector.classes]
        if unknown:
            raise UserError(f"{record['prompt']!r}: the detector does not know the class {unknown[0]!r}; check --task")
        colors = [clause["color"] for clause in clauses if "color" in clause]
        if self.colors and not set(colors) <= set(COLORS):
            raise UserError(f"{record['prompt']!r}: colors must be among {', '.join(COLORS)}, got {colors}")

    def _finished(self, waiting: deque[_Seen], least: int) -> Iterator[Judgement]:
        """Classify crops while at least `least` wait; then judge, in order, the images that wait for none."""
        crops = [(seen, place) for seen in waiting for place in seen.crops]
        while len(crops) >= least:
            assert self.colors is not None, "crops are only made for a classifier"
            now, crops = crops[: self.batch_size], crops[self.batch_size :]
            with self.stopwatch:
                colors = self.colors.classify([seen.crops[place] for seen, place in now])
            for (seen, place), color in zip(now, colors, strict=True):
                seen.instances[place] = replace(seen.instances[place], color=color)
                del seen.crops[place]
        while waiting and not waiting[0].crops:
            yield self._judgement(waiting.popleft())

    def _judgement(self, seen: _Seen) -> Judgement:
        verdict = evaluate(seen.record, seen.instances, self.detector.rules)
        score = float(verdict.correct)
        return Judgement(
            index=seen.drawn.index,
            sample=seen.drawn.sample,
            image=seen.drawn.image,
            prompt=seen.record["prompt"],
            score=score,
            marks={seen.record["tag"]: [score]},
            correct=verdict.correct,
            reason=verdict.reason,
            details={"instances": [instance.as_dict() for instance in seen.instances]},
        )


# The benchmark -------------------------------------------------------------------------------------------------


def _names(options: JudgeOptions) -> dict[str, str]:
    detector = options.detector or MASK2FORMER
    return {"detector": detector} if detector == SCENES else {"detector": detector, "clip": options.clip}


def _folders(options: JudgeOptions) -> dict[str, Path]:
    detector = fetch(options.detector or MASK2FORMER, "the detector's weights", variable("detector"))
    check_detector(detector)
    return {"detector": detector, "clip": find_clip(options, COLOR_CLASSIFIER)}


def find_judges(options: JudgeOptions) -> dict[str, str]:
    """Locate the judges, downloading them if necessary; returns their names.

    Raises:
        UserError: a judge is missing (the message says where to get it), or the detector has other classes than COCO's.
    """
    names = _names(options)
    if names["detector"] != SCENES:
        _folders(options)
    return names


def open_judge(options: JudgeOptions) -> GenEvalJudge:
    """Load the detector and the color classifier on the device of the options."""
    if _names(options)["detector"] == SCENES:
        return GenEvalJudge(SceneDetector(), None, options.batch_size)
    folders, device = _folders(options), options.torch_device
    detector = Mask2FormerDetector.open(folders["detector"], device)
    return GenEvalJudge(detector, ColorClassifier.open(folders["clip"], device), options.batch_size)


def documents() -> list[dict]:
    """The 553 prompts, with skills alternating so that a limit covers all; `index` is the number in GenEval's list."""
    by_skill = [
        [
            {"index": index, "tag": skill, "prompt": record["prompt"], "record": json.dumps(record)}
            for index, record in enumerate(geneval_records())
            if record["tag"] == skill
        ]
        for skill in SKILLS
    ]
    return [document for turn in zip_longest(*by_skill) for document in turn if document is not None]


BENCHMARK = Benchmark(
    name="geneval",
    overall="skills",
    num_images=4,
    documents=documents,
    find_judges=find_judges,
    open_judge=open_judge,
)

_TASK = JudgedTask(BENCHMARK, documents, lambda document: (document["tag"],))
process_docs, process_results = _TASK.process_docs, _TASK.process_results
aggregate_overall, aggregate_interval = _TASK.aggregate_overall, _TASK.aggregate_interval
aggregate_skill = _TASK.aggregate_skill
