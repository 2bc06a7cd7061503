import json

import numpy as np
import pytest

from evotok_plugin.scenes import captions, corpus, questions
from evotok_plugin.scenes import scene as scenes


@pytest.mark.parametrize("skill", scenes.SKILLS)
def test_each_object_stays_inside_its_own_cell(skill, rng):
    for _ in range(100):
        scene = scenes.sample_scene(rng, skill)
        cells = [item.cell for item in scene.objects]
        assert len(set(cells)) == len(cells)
        for item in scene.objects:
            left, top = (item.cell % 3) / 3, (item.cell // 3) / 3
            assert left <= item.x - item.size / 2 and item.x + item.size / 2 <= left + 1 / 3
            assert top <= item.y - item.size / 2 and item.y + item.size / 2 <= top + 1 / 3


@pytest.mark.parametrize("skill", scenes.SKILLS)
def test_prompts_are_true_of_their_scenes(skill, rng):
    for _ in range(100):
        scene = scenes.sample_scene(rng, skill)
        record = captions.prompt_record(scene, skill)
        assert record["tag"] == skill and record["prompt"].startswith("a photo of ")
        for clause in record["include"]:
            fitting = [
                item
                for item in scene.objects
                if item.shape == clause["class"] and item.color == clause.get("color", item.color)
            ]
            assert len(fitting) >= clause["count"]
        for clause in record.get("exclude", ()):
            assert sum(item.shape == clause["class"] for item in scene.objects) < clause["count"]
        if skill == "position":
            first, second = scene.objects
            how = record["include"][1]["position"][0]
            dx, dy = first.x - second.x, first.y - second.y
            assert {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[how]
            assert abs(dx) > 2 * abs(dy) or abs(dy) > 2 * abs(dx)


def test_questions_have_their_answer_among_distinct_options(rng):
    rows = questions.mmbench_rows(300, rng)
    for row in rows:
        choices = [row[letter] for letter in "ABCD" if row[letter] != "nan"]
        assert len(set(choices)) == len(choices) >= 2 and row["answer"] in "ABCD"[: len(choices)]
    assert {row["category"] for row in rows} == set(questions.L2_CATEGORY)
    letters = [row["answer"] for row in rows if row["C"] != "nan"]
    assert all(letters.count(letter) > len(letters) * 0.15 for letter in "ABCD")


def test_counting_questions_count(rng):
    for _ in range(200):
        scene = scenes.sample_scene(rng, "counting")
        question = questions.sample_question(scene, rng)
        if question.category == "counting":
            shape = next((s for s in scenes.SHAPES if captions.plural(s) in question.text), None)
            count = sum(item.shape == shape or shape is None for item in scene.objects)
            assert question.answer == captions.NUMBERS[count]


def test_the_corpus_depends_only_on_its_seed(tmp_path):
    for name in ("a", "b"):
        corpus.write_corpus(tmp_path / name, num_train=9, num_val=2, seed=5)
    corpus.write_corpus(tmp_path / "c", num_train=9, num_val=2, seed=6)
    read = lambda name, file: (tmp_path / name / "train" / file).read_bytes()  # noqa: E731
    files = (
        "finetune.json",
        "pretrain.json",
        "questions.json",
        "places.json",
        "relations.json",
        "single.json",
        "mixed.json",
        "interleaved.json",
        "other.json",
        "prompts.jsonl",
    )
    for file in (*files, "images/000003.png"):
        assert read("a", file) == read("b", file) != read("c", file)
    kinds = {
        file: [record["id"].split("-", 1)[1] for record in json.loads(read("a", file))]
        for file in ("finetune.json", "mixed.json", "places.json", "single.json")
    }
    assert kinds["finetune.json"] == ["prompt", "draw", "draw-rich", "draw-asked"] * 6
    assert kinds["mixed.json"] == ["describe", "draw"] * 3
    assert kinds["places.json"] == ["places"] * (4 + 3)  # four of the six skills have several objects
    assert kinds["single.json"] == ["single"] * 2


def test_single_drawings_name_the_object_and_relation_questions_ask_about_two(tmp_path):
    corpus.write_corpus(tmp_path, num_train=90, num_val=1, seed=3, image_size=8)
    read = lambda file: json.loads((tmp_path / "train" / file).read_text())  # noqa: E731
    of_image = {row["image"]: row["conversations"][1]["value"] for row in read("pretrain.json")[::2]}
    singles = read("single.json")
    assert len(singles) == 20
    for row in singles:
        prompt, drawing = (turn["value"] for turn in row["conversations"])
        assert of_image[row["image"]].startswith(prompt.removeprefix("a photo of ") + " in the ")
        assert "," not in of_image[row["image"]] and drawing == "<image>"
    asked = [row["conversations"] for row in read("relations.json")]
    assert len(asked) > 60
    assert all(" relative to the " in question["value"] for question, _ in asked)
    assert {answer["value"] for _, answer in asked} == set(scenes.RELATIONS)
    with_options = [question["value"] for question, _ in asked if "\nA. " in question["value"]]
    assert 0.1 < len(with_options) / len(asked) < 0.5


@pytest.mark.parametrize("shape_first", [True, False])
def test_places_list_every_object_once_in_random_order(shape_first):
    rng, orders = np.random.default_rng(3), set()
    for _ in range(50):
        scene = scenes.sample_mixed_scene(rng)
        kinds = {f"{i.shape} {i.color}" if shape_first else f"{i.color} {i.shape}": i for i in scene.objects}
        listed = captions.places(scene, rng, shape_first).split(", ")
        found = [kinds[" ".join(text.split(" ")[:2])] for text in listed]
        assert sorted(map(id, found)) == sorted(map(id, scene.objects))
        assert [text.split(" ", 2)[2] for text in listed] == [scenes.CELL_NAMES[item.cell] for item in found]
        orders.add(tuple(np.argsort([item.cell for item in found])))
    assert len(orders) > 10


def test_prompts_of_the_corpus_are_held_out_by_their_text(tmp_path):
    corpus.write_corpus(tmp_path, num_train=180, num_val=360, seed=0, image_size=8)
    train, val = (
        {row["prompt"]: row["tag"] for row in map(json.loads, (tmp_path / split / "prompts.jsonl").open())}
        for split in ("train", "val")
    )
    assert {*train.values()} == {*val.values()} == {*scenes.SKILLS, corpus.DETAILED}
    shared = train.keys() & val.keys()
    assert shared and {train[prompt] for prompt in shared} <= {"single_object", "colors", "counting"}


def test_mixed_scenes_hold_different_objects_in_different_cells(rng):
    for _ in range(200):
        items = scenes.sample_mixed_scene(rng).objects
        assert 2 <= len(items) <= 4
        assert len({item.kind for item in items}) == len({item.cell for item in items}) == len(items)


def test_relations_are_asked_between_objects_named_by_their_shapes(rng):
    asked = 0
    for _ in range(300):
        scene = scenes.sample_mixed_scene(rng)
        question = questions.sample_question(
            scene, rng, {**dict.fromkeys(questions.TRAINING_SHARES, 0.2), "relation": 9}
        )
        if question.category == "relation":
            named = [s for s in scenes.SHAPES if s in question.text]
            first, second = sorted(named, key=question.text.index)
            found = {item.shape: item for item in scene.objects}
            assert [item.shape for item in scene.objects].count(first) == 1
            assert scenes.relation(found[first], found[second]) == question.answer
            asked += 1
    assert asked > 100


def test_scene_prompts_are_distinct_and_limited_to_those_that_exist(rng):
    assert len(captions.scene_prompts("single_object", 20, rng)) == len(scenes.SHAPES)
    prompts = [record["prompt"] for record in captions.scene_prompts("position", 20, rng)]
    assert len(set(prompts)) == 20


def test_unknown_skills_and_shapes_are_rejected(rng):
    with pytest.raises(ValueError, match="unknown skill 'flying'"):
        scenes.sample_scene(rng, "flying")
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        scenes.render(scenes.Scene((scenes.SceneObject("blob", "red", 0.5, 0.5, 0.2),)))


def test_rendering_shows_color_and_background():
    scene = scenes.Scene((scenes.SceneObject("square", "red", 0.5, 0.5, 0.3),), background=(150, 150, 150))
    picture = np.array(scenes.render(scene))
    assert tuple(picture[24, 24]) == scenes.COLORS["red"] and tuple(picture[2, 2]) == (150, 150, 150)
