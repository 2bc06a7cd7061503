"""The model included in the package: its size, its role as the default, and what it can draw and answer."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eval_tasks.judging.scene_detector import SceneDetector
from evotok_plugin.scenes.questions import sample_question
from evotok_plugin.scenes.scene import SKILLS, render, sample_scene
from llava_ext.cli import main
from llava_ext.model_folder import INCLUDED_MODEL, default_model_folder, load_model


@pytest.fixture(scope="module")
def included():
    model, processor = load_model(INCLUDED_MODEL)
    return model.eval(), processor


def test_it_is_small_and_self_contained():
    weights = list(INCLUDED_MODEL.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 16 * 2**20
    assert not [path for path in INCLUDED_MODEL.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    for path in INCLUDED_MODEL.glob("*.json"):
        assert "/" not in json.loads(path.read_text()).get("_name_or_path", "")


def test_it_is_the_default_until_a_model_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert default_model_folder() == INCLUDED_MODEL
    assert main(["draw", "a photo of a red circle", "-o", "drawn"]) == 0
    assert str(INCLUDED_MODEL) in capsys.readouterr().err
    (tmp_path / "outputs/finetune").mkdir(parents=True)
    (tmp_path / "outputs/finetune/config.json").write_text("{}")
    assert default_model_folder().name == "finetune"


def test_drawing_needs_no_torchvision():
    """transformers itself imports torchvision wherever it is installed; the test hides it from all imports."""
    code = """
import sys
sys.modules["torchvision"] = None
from llava_ext.model_folder import INCLUDED_MODEL, open_model
opened = open_model(INCLUDED_MODEL, "cpu")
(image,) = opened.model.generate_images("a photo of a red circle", opened.processor)
print(image.size, [name for name in sys.modules if name.startswith("torchvision.")], sys.modules["torchvision"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(48, 48) [] None"


def test_it_draws_the_prompts(included):
    model, processor = included
    wanted = [("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "ring")]
    prompts = [f"a photo of a {color} {shape}" for color, shape in wanted]
    images = model.generate_images(prompts, processor, num_images=4, seed=0)
    detector, right = SceneDetector(), 0
    for number, image in enumerate(images):
        color, shape = wanted[number // 4]
        right += any((found.color, found.label) == (color, shape) for found in detector.detect(image))
    assert right >= 15


def test_it_answers_questions_about_unseen_scenes(included):
    model, processor = included
    rng = np.random.default_rng(12345)
    scenes = [sample_scene(rng, SKILLS[n % len(SKILLS)]) for n in range(60)]
    questions = [sample_question(scene, rng) for scene in scenes]
    inputs = processor.user_turns([f"<image>\n{q.text}" for q in questions], images=[render(scene) for scene in scenes])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer.strip() == q.answer for answer, q in zip(answers, questions, strict=True))
    assert right >= 50


def test_it_answers_questions_about_its_own_drawings(included):
    model, processor = included
    right = 0
    for seed in range(4):
        chat = [{"role": "user", "content": "a photo of a red circle"}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
        ids = model.generate(**inputs, modalities="auto", processor=processor, max_new_tokens=32, seed=seed)
        parts = processor.decode(ids[0, inputs["input_ids"].shape[1] :], images_from=model.vision_tower)
        assert isinstance(parts[0].get("image"), Image.Image)
        chat += [{"role": "assistant", "content": parts}, {"role": "user", "content": "What color is the circle?"}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
        ids = model.generate(**inputs, modalities="auto", processor=processor, max_new_tokens=32)
        parts = processor.decode(ids[0, inputs["input_ids"].shape[1] :], images_from=model.vision_tower)
        right += parts == [{"type": "text", "text": "red"}]
    assert right >= 3
