"""What can be said about a scene: captions, GenEval prompts, questions with options, LLaVA records.

Everything is a function of a `Scene` and a random generator, so text and picture cannot disagree.
"""

import numpy as np

from evotok_plugin.scenes.scene import CELL_NAMES, Scene, SceneObject, relation, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four")


def with_article(noun: str) -> str:
    """Prefix the indefinite article: "an orange circle"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _kind(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


# Captions and drawing prompts ----------------------------------------------------------------------------------


def description(scene: Scene) -> str:
    """All that can be seen, in reading order: "a red circle in the top left, a blue ring in the center"."""
    ordered = sorted(scene.objects, key=lambda item: item.cell)
    return ", ".join(f"{with_article(_kind(item))} in the {CELL_NAMES[item.cell]}" for item in ordered)


def prompt_record(scene: Scene, skill: str) -> dict:
    """The scene as a GenEval record: `tag`, `include`, (`exclude`), `prompt`; a true statement about the scene."""
    items = scene.objects
    first = items[0]
    if skill in ("single_object", "colors"):
        clause = {"class": first.shape, "count": 1}
        if skill == "colors":
            clause["color"] = first.color
        noun = _kind(first) if skill == "colors" else first.shape
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
    nouns = [with_article(_kind(i) if colored else i.shape) for i in items[:2]]
    return {"tag": skill, "include": clauses, "prompt": f"a photo of {nouns[0]} and {nouns[1]}"}


def rich_prompt(scene: Scene, skill: str, rng: np.random.Generator) -> str:
    """A prompt that says more than the skill asks for (colours where there are several objects, sides, cells)."""
    items = list(scene.objects)
    if rng.random() < 0.4:
        return f"a photo of {description(scene)}"
    first = items[0]
    if len(items) == 1:
        if rng.random() < 0.5:
            return f"a photo of {with_article(_kind(first))} in the {CELL_NAMES[first.cell]}"
        return f"a photo of {with_article(_kind(first))}"
    if skill == "counting":
        same = len({item.color for item in items}) == 1
        color = f"{first.color} " if same else ""
        return f"a photo of {NUMBERS[len(items)]} {color}{plural(first.shape)}"
    if rng.random() < 0.5:
        items.reverse()
    how = relation(items[0], items[1])
    return f"a photo of {with_article(_kind(items[0]))} {how or 'and'} {with_article(_kind(items[1]))}"


def captions(scene: Scene, skill: str, rng: np.random.Generator) -> list[str]:
    """Several true captions, from the full description to the bare prompt of the skill."""
    return [description(scene), rich_prompt(scene, skill, rng), prompt_record(scene, skill)["prompt"]]


def scene_prompts(skill: str, count: int, rng: np.random.Generator) -> list[dict]:
    """`count` different GenEval records of one skill (fewer where the skill does not have as many)."""
    records: dict[str, dict] = {}
    for _ in range(count * 50):
        record = prompt_record(sample_scene(rng, skill), skill)
        records.setdefault(record["prompt"], record)
        if len(records) == count:
            break
    return list(records.values())


# Questions -----------------------------------------------------------------------------------------------------


# LLaVA records -------------------------------------------------------------------------------------------------
