"""Captions and drawing prompts of scenes, also as GenEval records.

Texts are functions of a `Scene` and a random generator, so text and image always agree.
"""

from typing import Any

import numpy as np

from evotok_plugin.scenes.scene import CELL_NAMES, Scene, relation, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four")


def with_article(noun: str) -> str:
    """Prepend the indefinite article: "a red circle"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Form the plural: "circles", "crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


def description(scene: Scene) -> str:
    """Describe all objects in reading order: "a red circle in the top left, a blue ring in the center"."""
    ordered = sorted(scene.objects, key=lambda item: item.cell)
    return ", ".join(f"{with_article(item.kind)} in the {CELL_NAMES[item.cell]}" for item in ordered)


def places(scene: Scene, rng: np.random.Generator, shape_first: bool) -> str:
    """List all objects with their cells in random order: "red circle top left", or "circle red top left"."""
    items = [scene.objects[int(n)] for n in rng.permutation(len(scene.objects))]
    kinds = [f"{item.shape} {item.color}" if shape_first else item.kind for item in items]
    return ", ".join(f"{kind} {CELL_NAMES[item.cell]}" for kind, item in zip(kinds, items, strict=True))


def prompt_record(scene: Scene, skill: str) -> dict:
    """Describe the scene as a GenEval record: `tag`, `include`, `exclude` (counting only) and `prompt`."""
    items = scene.objects
    first = items[0]
    if skill in ("single_object", "colors"):
        clause: dict[str, Any] = {"class": first.shape, "count": 1}
        if skill == "colors":
            clause["color"] = first.color
        noun = first.kind if skill == "colors" else first.shape
        return {"tag": skill, "include": [clause], "prompt": f"a photo of {with_article(noun)}"}
    if skill == "counting":
        count = len(items)
        return {
            "tag": skill,
            "include": [{"class": first.shape, "count": count}],
            "exclude": [{"class": first.shape, "count": count + 1}],
            "prompt": f"a photo of {NUMBERS[count]} {plural(first.shape)}",
        }
    second = items[1]
    if skill == "position":
        how = relation(first, second)
        return {
            "tag": skill,
            "include": [
                {"class": second.shape, "count": 1},
                {"class": first.shape, "count": 1, "position": [how, 0]},
            ],
            "prompt": f"a photo of {with_article(first.shape)} {how} {with_article(second.shape)}",
        }
    colored = skill == "color_attr"
    clauses = [{"class": i.shape, "count": 1, **({"color": i.color} if colored else {})} for i in items[:2]]
    nouns = [with_article(i.kind if colored else i.shape) for i in items[:2]]
    return {"tag": skill, "include": clauses, "prompt": f"a photo of {nouns[0]} and {nouns[1]}"}


def rich_prompt(scene: Scene, skill: str, rng: np.random.Generator) -> str:
    """Sample a prompt with more detail than the skill requires (colors of several objects, relations, cells)."""
    items = list(scene.objects)
    if rng.random() < 0.4:
        return f"a photo of {description(scene)}"
    first = items[0]
    if len(items) == 1:
        if rng.random() < 0.5:
            return f"a photo of {with_article(first.kind)} in the {CELL_NAMES[first.cell]}"
        return f"a photo of {with_article(first.kind)}"
    if skill == "counting":
        same = len({item.color for item in items}) == 1
        color = f"{first.color} " if same else ""
        return f"a photo of {NUMBERS[len(items)]} {color}{plural(first.shape)}"
    if rng.random() < 0.5:
        items.reverse()
    how = relation(items[0], items[1])
    return f"a photo of {with_article(items[0].kind)} {how or 'and'} {with_article(items[1].kind)}"


def scene_captions(scene: Scene, skill: str, rng: np.random.Generator) -> list[str]:
    """Three captions: the full description, a detailed prompt and the skill's plain prompt."""
    return [description(scene), rich_prompt(scene, skill, rng), prompt_record(scene, skill)["prompt"]]


def scene_prompts(skill: str, count: int, rng: np.random.Generator) -> list[dict]:
    """Sample `count` GenEval records of one skill with different prompts, or fewer if the skill has fewer prompts."""
    records: dict[str, dict] = {}
    for _ in range(count * 50):
        record = prompt_record(sample_scene(rng, skill), skill)
        records.setdefault(record["prompt"], record)
        if len(records) == count:
            break
    return list(records.values())
