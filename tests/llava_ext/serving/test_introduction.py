"""The introduction of a model, read from the card in its folder."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.cli import main
from llava_ext.model_folder import INCLUDED_MODEL
from llava_ext.serving.introduction import MAX_EXAMPLES, Introduction, read_introduction


@pytest.fixture
def read(tmp_path):
    """`read(header)` reads the introduction from a card with this header."""

    def run(header, end="---\n\n# A model\n"):
        (tmp_path / "README.md").write_text(f"---\n{header}\n{end}", encoding="utf-8")
        return read_introduction(tmp_path)

    return run


def test_the_line_and_the_examples_come_from_the_card(read, tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    examples = "[a cat, {text: 'What is it?', image: a.png}]"
    found = read(f"demo:\n  knows: cats,\n    and *dogs*\n  examples: {examples}\nlicense: mit")
    assert found.knows == "cats, and *dogs*"
    assert [example.text for example in found.examples] == ["a cat", "What is it?"]
    assert found.examples[0].image is None
    assert np.asarray(found.examples[1].image).tolist() == np.full((6, 8, 3), (255, 0, 0)).tolist()


@pytest.mark.parametrize(
    "card", [None, "# A model\n", "---\nlicense: mit\n---\n", "---\ndemo: {knows: never closed}\n"]
)
def test_a_folder_without_an_introduction_has_none(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_introduction(tmp_path) == Introduction("", ())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("demo: [", "README.md cannot be read"),
        ("demo: cats", "demo: expected the keys knows and examples, got 'cats'"),
        ("demo: {know: cats}", "unknown key 'know'; expected knows or examples"),
        ("demo: {knows: 3}", "demo.knows: expected a text of 1 to 300 characters, got 3"),
        (f"demo: {{knows: {'x' * 301}}}", "demo.knows: expected a text of 1 to 300 characters"),
        (f"demo: {{examples: {['a'] * (MAX_EXAMPLES + 1)}}}", "expected a list of at most 6 examples"),
        ("demo: {examples: a cat}", "expected a list of at most 6 examples, got 'a cat'"),
        ("demo: {examples: ['']}", "demo.examples, number 1: expected a text"),
        ("demo: {examples: [a, {image: a.png}]}", "demo.examples, number 2, text: expected a text"),
        ("demo: {examples: [{text: a, picture: a.png}]}", "number 1: unknown key 'picture'"),
        ("demo: {examples: [{text: a, image: /etc/a.png}]}", "expected the path of an image in the model folder"),
        ("demo: {examples: [{text: a, image: ../a.png}]}", "expected the path of an image in the model folder"),
        ("demo: {examples: [{text: a, image: absent.png}]}", "absent.png"),
        ("demo: {examples: [{text: a, image: README.md}]}", "README.md"),
    ],
)
def test_a_wrong_introduction_is_rejected_with_its_file(read, tmp_path, header, message):
    with pytest.raises(UserError) as refused:
        read(header)
    assert message in str(refused.value) and str(tmp_path / "README.md") in str(refused.value)


def test_the_page_of_a_model_with_a_wrong_introduction_does_not_start(tiny_mllm, tmp_path, capsys):
    for part in tiny_mllm:
        part.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ndemo: {know: cats}\n---\n")
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert "unknown key 'know'" in capsys.readouterr().err.splitlines()[-1]


def test_the_example_of_the_documentation_is_read(tmp_path):
    page = (Path(__file__).resolve().parents[3] / "docs" / "play.md").read_text()
    (header,) = re.findall(r"```yaml\n(---\n.*?)```", page, re.S)
    (tmp_path / "README.md").write_text(header)
    Image.new("RGB", (8, 6)).save(tmp_path / "example.png")
    found = read_introduction(tmp_path)
    assert found.knows and [example.image is None for example in found.examples] == [True, False]


def test_the_included_model_has_a_line_and_six_examples():
    found = read_introduction(INCLUDED_MODEL)
    assert "colored shapes" in found.knows and len(found.examples) == MAX_EXAMPLES
    assert {example.image.size for example in found.examples if example.image} == {(48, 48)}


def test_an_export_keeps_the_introduction_and_its_images(tmp_path):
    assert main(["export", str(INCLUDED_MODEL), "-o", str(tmp_path / "out")]) == 0
    kept, own = read_introduction(tmp_path / "out"), read_introduction(INCLUDED_MODEL)
    assert kept.knows == own.knows and [one.text for one in kept.examples] == [one.text for one in own.examples]
    for one, other in zip(kept.examples, own.examples, strict=True):
        assert (one.image is None) == (other.image is None) and (not one.image or one.image == other.image)
