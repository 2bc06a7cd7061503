"""README and docs: links, navigation, Python examples, and the commands in shell examples."""

import argparse
import os
import re
import runpy
import shlex
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForImageTextToText

from eval_tasks import cli as eval_cli
from evotok_plugin import EvoTokModel
from evotok_plugin import cli as tokenizer_cli
from evotok_plugin.common.recipes import add_arguments, flags_of
from evotok_plugin.scenes.scene import render, sample_scene
from evotok_plugin.training.config import TokenizerTrainingConfig
from llava_ext import cli as llava_cli
from llava_ext.model_folder import default_model_folder, load_model, open_model
from llava_ext.serving.api.requests import ApiLimits
from llava_ext.serving.api.server import make_server
from llava_ext.training.config import StageConfig
from llava_ext.training.reinforcement.config import ReinforceConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"evotok": tokenizer_cli.main, "evotok-llava": llava_cli.main, "evotok-eval": eval_cli.main}
# Blocks that cannot run here: the programs and packages that they need.
NEEDS_OTHERS = ("from llava.",)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the shell examples of a page, without comments and settings of the environment."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for group in config["nav"] for item in group.values() for page in _pages_of(item)]
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


def _pages_of(item):
    return [item] if isinstance(item, str) else [page for entry in item for page in entry.values()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target or not (file or anchor):
            continue
        linked = page.parent / file if file else page
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_backbone_folder):
    """A folder with the models and images that the examples name."""
    place = tmp_path_factory.mktemp("reader")
    model, processor = load_model(default_model_folder())
    for folder in ("outputs/evotok", "outputs/quickstart/evotok"):
        model.vision_tower.save_pretrained(place / folder)
        processor.image_processor.save_pretrained(place / folder)
    (place / "Qwen2.5-0.5B-Instruct").symlink_to(tiny_backbone_folder)
    rng = np.random.default_rng(0)
    for name in ("imagenet/train/n01440764/n01440764_10026.JPEG", "out/some.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        render(sample_scene(rng, "position"), 48).save(place / name)
    return place


@pytest.fixture
def server():
    """A server of the included model; its port."""
    running = make_server(open_model(default_model_folder()), ApiLimits(), "127.0.0.1", 0, None)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: running.run(sockets=[listening]))
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.05)
    assert running.started
    yield str(listening.getsockname()[1])
    running.should_exit = True
    thread.join()


def examples():
    return [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", examples(), ids=lambda page: page.name)
def test_python_examples_run(page, workplace, monkeypatch, request, capsys):
    """The blocks of a page run one after another, as a reader types them; they print the text that the page shows."""
    monkeypatch.chdir(workplace)
    if page.name == "train_tokenizer.md":
        assert tokenizer_cli.main(["encode", "imagenet/train", "-o", "codes", "--model", "outputs/evotok"]) == 0
    names: dict = {}
    port = request.getfixturevalue("server") if page.name == "serve.md" else "8000"
    if page.name == "best_of.md":  # continues play.md
        names["model"], names["processor"] = load_model(default_model_folder())
    for block in blocks(page, "python"):
        if not any(needed in block for needed in NEEDS_OTHERS):
            exec(compile(block.replace("8000", port), str(page), "exec"), names)
    printed = capsys.readouterr().out
    assert all(text in printed for text in blocks(page, "text"))


def test_the_llava_of_the_example_is_loaded_again(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (block, *_) = blocks(ROOT / "docs" / "plug_in.md", "python")
    exec(block, {})
    model = AutoModelForImageTextToText.from_pretrained("outputs/llava")
    ours, theirs = EvoTokModel.from_pretrained("outputs/evotok").state_dict(), model.model.vision_tower.state_dict()
    shared = {name: value for name, value in ours.items() if any(key.endswith(name) for key in theirs)}
    assert shared and all(
        any(key.endswith(name) and value.equal(theirs[key]) for key in theirs) for name, value in shared.items()
    )


def help_of(program: str, words: list[str], capsys) -> str:
    """The help of a command, which lists its flags."""
    command = words[:2] if words[0] == "data" else words[:1]
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program]([*command, "--help"])
    assert not stopped.value.code, words
    listed = capsys.readouterr().out
    return listed + (flags_of_training(StageConfig) if words[0] == "estimate" else "")


def flags_of_training(schema) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser, schema)
    return " ".join(["--recipe", *flags_of(parser)])


def known_to_script(script: str, capsys) -> str:
    """The flags of a shell script, from the command that it starts."""
    schemas = {"reinforce": ReinforceConfig, "train_tokenizer": TokenizerTrainingConfig}
    name = Path(script).stem
    if name == "evaluate":
        return help_of("evotok-eval", ["run"], capsys)
    if (program := (ROOT / script).with_suffix(".py")).is_file():  # the script starts it
        return program.read_text()
    return flags_of_training(schemas.get(name, StageConfig))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_programs_and_flags_that_exist(page, capsys):
    for words in commands(page):
        if words[0] in PROGRAMS:
            known = help_of(words[0], words[1:], capsys)
        elif words[0] in ("bash", "python") and words[1].startswith("scripts/"):
            assert (ROOT / words[1]).is_file(), words
            if words[0] == "bash":
                known = known_to_script(words[1], capsys)
            else:
                known = "".join(file.read_text() for file in (ROOT / words[1]).parent.glob("*.py"))
        else:
            continue
        for flag in (word.split("=")[0] for word in words if word.startswith("-") and not word.startswith("-1")):
            assert re.search(rf"{re.escape(flag)}\b", known), (words, flag)


def test_the_commands_of_the_first_screen_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    ran = [words for words in commands(ROOT / "README.md") if words[0] == "evotok-llava" and words[1] != "demo"]
    assert [words[1] for words in ran] == ["draw", "chat"]
    for words in ran:
        assert llava_cli.main(words[1:]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].strip() in ("one", "two", "three", "four")


def test_the_script_of_the_pictures_writes_both(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["documentation.py", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts" / "pictures" / "documentation.py"), run_name="__main__")
    assert sorted(os.listdir(tmp_path)) == ["drawn.png", "first_screen.png"]
