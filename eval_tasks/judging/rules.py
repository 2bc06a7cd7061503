"""GenEval's verdict on one image: pure rules over detected instances.

Source: the judging protocol of GenEval (arXiv 2310.11513). Boxes are (left, top, right, bottom) in pixels, y down.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evotok_plugin.errors import UserError

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Instance:
    """One detected object.

    Attributes:
        label: class name.
        score: confidence in [0, 1].
        mask: (H, W) bool; None once it has been dropped.
        color: None where it is unknown.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None
    color: str | None = None

    def as_dict(self) -> dict:
        """The instance as it appears in reports."""
        box = [round(float(side), 2) for side in self.box]
        return {"class": self.label, "color": self.color, "score": round(self.score, 3), "box": box}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """GenEval's thresholds; a detector with another scale of confidence has its own."""

    min_score: float = 0.3
    min_score_counting: float = 0.9
    max_instances: int = 16  # per class, the most confident ones
    box_shrink: float = 0.1  # share of the boxes' summed sizes: smaller offsets count as zero
    min_offset: float = 1e-3  # pixels: shrunk offsets below this on both axes have no direction
    min_direction: float = 0.5  # share of the unit offset that counts as a direction


GENEVAL_RULES = Rules()


@dataclass(frozen=True)
class Verdict:
    """Whether an image matches its record; `reason` names every failed clause, and is empty if there are none."""

    correct: bool
    reason: str


def directions(box: Box, other: Box, rules: Rules = GENEVAL_RULES) -> frozenset[str]:
    """The position of `box` relative to `other`: any of "left of", "right of", "above", "below"."""
    corners, other_corners = np.reshape(box, (2, 2)), np.reshape(other, (2, 2))  # rows: top left, bottom right
    offset = corners.mean(axis=0) - other_corners.mean(axis=0)
    sizes = np.ptp(corners, axis=0) + np.ptp(other_corners, axis=0)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - rules.box_shrink * sizes, 0.0)
    if np.all(np.abs(shrunk) < rules.min_offset):
        return frozenset()
    x, y = shrunk / np.hypot(*offset)
    found = {
        "left of": x < -rules.min_direction,
        "right of": x > rules.min_direction,
        "above": y < -rules.min_direction,
        "below": y > rules.min_direction,
    }
    return frozenset(name for name, holds in found.items() if holds)


def confident(instances: Sequence[Instance], tag: str, rules: Rules = GENEVAL_RULES) -> dict[str, list[Instance]]:
    """Instances above the rules' thresholds by class, the most confident first."""
    least = rules.min_score_counting if tag == "counting" else rules.min_score
    by_class: dict[str, list[Instance]] = {}
    for instance in sorted(instances, key=lambda item: -item.score):
        group = by_class.setdefault(instance.label, [])
        if instance.score > least and len(group) < rules.max_instances:
            group.append(instance)
    return by_class


def _position_fault(
    clause: dict, taken: Sequence[Instance], groups: Sequence[Sequence[Instance] | None], rules: Rules
) -> str | None:
    wanted, target = clause["position"]
    if groups[target] is None:
        return f"no target for the {clause['class']} to be {wanted}"
    for instance in taken:
        for other in groups[target]:
            found = directions(instance.box, other.box, rules)
            if wanted not in found:
                seen = " and ".join(sorted(found)) or "in no clear direction from"
                return f"expected the {clause['class']} {wanted} the {other.label}, found it {seen} it"
    return None


def _clause_fault(
    clause: dict, taken: Sequence[Instance], groups: Sequence[Sequence[Instance] | None], rules: Rules
) -> str | None:
    """The reason why an `include` clause fails on the instances selected for it, or None."""
    label, count = clause["class"], clause["count"]
    if len(taken) < count:
        return f"expected {label} >= {count}, found {len(taken)}"
    if "color" in clause:
        colors = [instance.color for instance in taken]
        if colors.count(clause["color"]) < count:
            seen = ", ".join(color or "none" for color in colors)
            return f"expected {clause['color']} {label} >= {count}, found {colors.count(clause['color'])} ({seen})"
    if "position" in clause:
        return _position_fault(clause, taken, groups, rules)
    return None


def colors_wanted(record: dict, instances: Sequence[Instance], rules: Rules = GENEVAL_RULES) -> list[Instance]:
    """The instances whose color affects the verdict: those selected for clauses with a color."""
    by_class = confident(instances, record["tag"], rules)
    wanted: dict[int, Instance] = {}
    for clause in record["include"]:
        taken = by_class.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(taken) == clause["count"]:
            wanted |= {id(instance): instance for instance in taken}
    return list(wanted.values())


def evaluate(record: dict, instances: Sequence[Instance], rules: Rules = GENEVAL_RULES) -> Verdict:
    """Judge the detections in an image against a GenEval record (`tag`, `include`, optional `exclude`).

    Clauses are judged in order; a failed clause cannot be the target of a later clause's position. The instances of
    `colors_wanted` must have a color.

    Raises:
        UserError: a position that does not refer to an earlier clause.
    """
    by_class = confident(instances, record["tag"], rules)
    groups: list[Sequence[Instance] | None] = []
    faults = []
    for clause in record["include"]:
        if "position" in clause and not 0 <= clause["position"][1] < len(groups):
            raise UserError(
                f"record {record.get('prompt', record)!r}: position {clause['position']} refers to clause "
                f"{clause['position'][1]}, but only {len(groups)} clauses come before it"
            )
        taken = by_class.get(clause["class"], [])[: clause["count"]]
        fault = _clause_fault(clause, taken, groups, rules)
        groups.append(taken if fault is None else None)
        if fault is not None:
            faults.append(fault)
    for clause in record.get("exclude") or ():
        found = len(by_class.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']} < {clause['count']}, found {found}")
    return Verdict(correct=not faults, reason="; ".join(faults))


def task_scores(scored: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each tag, from one (tag, score) pair per image."""
    by_tag: dict[str, list[float]] = {}
    for tag, score in scored:
        by_tag.setdefault(tag, []).append(score)
    return {tag: float(np.mean(scores)) for tag, scores in by_tag.items()}


def overall_score(scored: Sequence[tuple[str, float]]) -> float:
    """GenEval's overall score: the mean over tasks, not over images.

    Raises:
        UserError: nothing was scored.
    """
    if not scored:
        raise UserError("no image was judged, so the overall score is undefined; was the run limited to 0 documents?")
    return float(np.mean(list(task_scores(scored).values())))
