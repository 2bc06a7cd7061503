import numpy as np
import pytest

from evotok_plugin.scenes import other_topics, other_words
from evotok_plugin.scenes.captions import scene_captions
from evotok_plugin.scenes.other_topics import OUT_OF_DOMAIN_ANSWER, other_topic_records, other_topic_turns
from evotok_plugin.scenes.questions import sample_question
from evotok_plugin.scenes.scene import COLORS, SHAPES, SKILLS, sample_scene

LISTS = {name.lower(): value for name, value in vars(other_words).items() if name.isupper()}


def questions_of(records):
    return [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "human"]


def test_records_are_text_with_the_fixed_answer():
    records = other_topic_records(300, seed=0, split="train")
    assert len(records) == 300 and len({record["id"] for record in records}) == 300
    for record in records:
        assert set(record) == {"id", "conversations"}
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert {turn["value"] for turn in turns[1::2]} == {OUT_OF_DOMAIN_ANSWER}
    assert {len(record["conversations"]) for record in records} == {2, 4}


def test_a_seed_gives_the_same_records_again_and_another_seed_others():
    first = other_topic_records(50, seed=1, split="train")
    assert first == other_topic_records(50, seed=1, split="train")
    assert first != other_topic_records(50, seed=2, split="train")


def test_the_answer_names_all_shapes_and_colors():
    assert all(word in OUT_OF_DOMAIN_ANSWER for word in (*SHAPES, *COLORS))


@pytest.mark.parametrize("split", other_topics.SPLITS)
def test_most_texts_are_distinct_and_none_has_an_open_slot(split):
    texts = questions_of(other_topic_records(3000, seed=0, split=split))
    assert len(set(texts)) > 2200
    assert all(text.strip() and "{" not in text and "<image>" not in text for text in texts)


def test_texts_and_words_of_val_do_not_occur_in_train():
    train, val = (
        {text.lower() for text in questions_of(other_topic_records(3000, seed=0, split=split))}
        for split in other_topics.SPLITS
    )
    assert not train & val
    kinds = ("noun", "adjective", "place", "verb", "scenery", "theme", "person", "other_color", "other_shape")
    in_train, in_val = (
        {word for kind in kinds for word in other_topics.words(kind, split)} for split in other_topics.SPLITS
    )
    assert in_val and not in_train & in_val


@pytest.mark.parametrize("name", sorted(LISTS))
def test_words_are_unique_and_none_belongs_to_the_scenes(name):
    words = LISTS[name]
    assert len(set(words)) == len(words)
    assert not {part for word in words for part in word.split()} & {*SHAPES, *COLORS}


def test_no_text_is_one_of_the_scene_corpus(rng):
    inside = set()
    for _ in range(1500):
        for skill in SKILLS:
            scene = sample_scene(rng, skill)
            inside |= {caption.lower() for caption in scene_captions(scene, skill, rng)}
            inside.add(sample_question(scene, rng).text.lower())
    outside = questions_of(other_topic_records(3000, seed=0, split="train"))
    outside += [other_topic_turns(rng, split)[0] for split in other_topics.SPLITS for _ in range(1000)]
    assert not inside & {text.lower() for text in outside}


def test_near_misses_of_the_domain_are_among_the_texts():
    texts = questions_of(other_topic_records(3000, seed=0, split="train"))
    with_shape = [text for text in texts if any(shape in text for shape in SHAPES)]
    assert len(with_shape) > 0.08 * len(texts)


def test_image_questions_use_the_wording_of_the_corpus_for_other_things():
    rng = np.random.default_rng(0)
    texts = [other_topic_turns(rng) for _ in range(500)]
    assert {answer for _, answer in texts} == {OUT_OF_DOMAIN_ANSWER}
    for start in ("Is there a", "What color is the", "How many", "Where is the"):
        assert sum(text.startswith(start) for text, _ in texts) > 5


def test_drawing_requests_name_the_thing(rng):
    for split in other_topics.SPLITS:
        texts = {other_topics.drawing_request("a red circle", rng, split) for _ in range(100)}
        assert len(texts) > 3 and "a photo of a red circle" in texts
        assert all("a red circle" in text for text in texts)


def test_an_unknown_split_is_rejected():
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, val"):
        other_topic_records(1, seed=0, split="test")
