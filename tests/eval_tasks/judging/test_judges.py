"""The judges with small random weights: batches equal single images, and results equal a naive reference."""

import json
import shutil

import judges
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from eval_tasks.judging.colors import ColorClassifier, crop
from eval_tasks.judging.detectors import Mask2FormerDetector
from eval_tasks.judging.rules import Instance
from eval_tasks.judging.vocabulary import CLASSES, COLORS
from eval_tasks.judging.vqa import YesNoJudge
from evotok_plugin.errors import UserError


@pytest.fixture(scope="module")
def detector(judge_folders) -> Mask2FormerDetector:
    return Mask2FormerDetector.open(judge_folders["detector"])


@pytest.fixture(scope="module")
def classifier(judge_folders) -> ColorClassifier:
    return ColorClassifier.open(judge_folders["clip"])


@pytest.fixture(scope="module")
def vqa(judge_folders) -> YesNoJudge:
    return YesNoJudge.open(judge_folders["vqa"])


# The detector --------------------------------------------------------------------------------------------------


def test_batched_detections_equal_one_by_one(detector):
    """Nine images of two sizes in random order; images must not be padded to a common size."""
    images = [judges.picture(n, *((64, 64) if n % 3 else (80, 48))) for n in range(9)]
    batched = detector.detect_batch(images)
    assert sum(map(len, batched)) > 30
    for image, together in zip(images, batched, strict=True):
        (alone,) = detector.detect_batch([image])
        assert [item.label for item in together] == [item.label for item in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert (one.mask != other.mask).mean() < 0.01 and one.mask.shape == (image.height, image.width)


def naive_instances(detector, image) -> list[tuple[str, float, np.ndarray]]:
    """Post-processing as in mmdet's Mask2Former, one pair of query and class at a time."""
    inputs = detector.processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    probabilities = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    masks = F.interpolate(outputs.masks_queries_logits, inputs["pixel_values"].shape[-2:], mode="bilinear")
    masks = F.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
    pairs = sorted(
        ((float(p), query, label) for query, row in enumerate(probabilities) for label, p in enumerate(row)),
        reverse=True,
    )[:100]
    found = []
    for probability, query, label in pairs:
        inside = masks[query] > 0
        quality = float(masks[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6))
        if probability * quality > 0.3:
            found.append((CLASSES[label], probability * quality, inside.numpy()))
    return found


def test_detections_follow_the_naive_reference(detector):
    for n in range(4):
        image = judges.picture(20 + n, 72, 64)
        (found,) = detector.detect_batch([image])
        expected = naive_instances(detector, image)
        assert len(found) == len(expected) > 0
        for instance, (label, score, mask) in zip(found, expected, strict=True):
            assert instance.label == label and instance.score == pytest.approx(score, abs=1e-5)
            assert np.array_equal(instance.mask, mask)
            rows, columns = np.nonzero(mask)
            assert instance.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_detectors_of_other_classes_are_rejected(judge_folders, tmp_path):
    config = json.loads((judge_folders["detector"] / "config.json").read_text())
    swapped = dict(enumerate(CLASSES)) | {0: CLASSES[1], 1: CLASSES[0]}
    coco = dict(enumerate(CLASSES)) | {64: "mouse", 65: "remote", 66: "keyboard"}
    for labels, message in (
        (dict(enumerate(CLASSES[:5])), "has 5 classes, expected COCO's 80"),
        (swapped, "class 0 is 'bicycle', expected COCO's 'person'"),
        (coco, None),
    ):
        model = type("Model", (torch.nn.Module,), {})()
        model.config = type("Config", (), {"id2label": labels})
        if message is None:
            Mask2FormerDetector(model, None)
        else:
            with pytest.raises(ValueError, match=message):
                Mask2FormerDetector(model, None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="type 'vit', expected 'mask2former'"):
        Mask2FormerDetector.open(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        Mask2FormerDetector.open(other)


# Colors -------------------------------------------------------------------------------------------------------


def half(label: str, left: int, right: int) -> Instance:
    mask = np.zeros((64, 64), bool)
    mask[10:40, left:right] = True
    return Instance(label, 0.9, (left, 10, right, 40), mask)


def test_crops_show_the_object_on_gray():
    image = Image.new("RGB", (64, 64), "red")
    instance = half("cup", 8, 24)
    instance.mask[10:20] = False
    pixels = np.asarray(crop(image, instance))
    assert pixels.shape == (30, 16, 3)
    assert (pixels[:10] == 0x99).all() and (pixels[10:] == (255, 0, 0)).all()


def test_batched_colors_equal_one_by_one_and_the_naive_reference(classifier, judge_folders):
    import open_clip

    name = f"local-dir:{judge_folders['clip']}"
    model, transform = open_clip.create_model_from_pretrained(name)
    words = open_clip.get_tokenizer(name)
    crops, naive = [], []
    for n in range(12):
        image, instance = judges.picture(40 + n), half(("cup", "dog")[n % 2], 8 + n, 60 - n)
        crops.append(classifier.prepare(image, instance))
        with torch.no_grad():
            seen = F.normalize(model.encode_image(transform(crop(image, instance))[None]), dim=-1)[0]
            similarity = []
            for color in COLORS:
                texts = [f"a photo of a {color} {instance.label}", f"a photo of a {color}-colored {instance.label}"]
                features = F.normalize(model.encode_text(words([*texts, f"a photo of a {color} object"])), dim=-1)
                similarity.append(float(seen @ F.normalize(features.mean(dim=0), dim=-1)))
        naive.append(COLORS[int(np.argmax(similarity))])
    batched = classifier.classify(crops)
    assert batched == [classifier.classify([item])[0] for item in crops] == naive
    assert len(set(batched)) > 1


# Questions -----------------------------------------------------------------------------------------------------


def test_batched_answers_equal_one_by_one(vqa):
    images = [judges.picture(n, 30 + n, 40) for n in range(8)]
    questions = ["is it a dog?" + " or a cat" * n for n in range(8)]
    batched = vqa.ask(images, questions)
    for image, question, together in zip(images, questions, batched, strict=True):
        (alone,) = vqa.ask([image], [question])
        assert (together.yes, together.no) == pytest.approx((alone.yes, alone.no), rel=1e-3)
        assert 0 < together.yes < 1 and 0 < together.no < 1
    assert len({answer.yes for answer in batched}) == 8


def test_the_answer_is_the_probability_of_the_next_token(vqa):
    image, question = judges.picture(3), "red?"
    inputs = vqa.processor(images=image, text=f"<image>{question}:", return_tensors="pt")
    with torch.no_grad():
        probabilities = vqa.model(**inputs).logits[0, -1].softmax(-1)
    (answer,) = vqa.ask([image], [question])
    ids = vqa.processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    assert (answer.yes, answer.no) == pytest.approx(probabilities[ids].tolist(), rel=1e-3)


def test_a_vqa_model_without_a_chat_template(tmp_path):
    folder = judges.write_blip(tmp_path / "blip")
    vqa = YesNoJudge.open(folder)
    images, questions = [judges.picture(n) for n in range(3)], ["is it red?", "is there a blue dog there?", "no?"]
    batched = vqa.ask(images, questions)
    alone = [vqa.ask([image], [question])[0] for image, question in zip(images, questions, strict=True)]
    for together, one in zip(batched, alone, strict=True):
        assert (together.yes, together.no) == pytest.approx((one.yes, one.no), rel=1e-3)


def test_a_rejected_question_is_a_user_error(judge_folders, monkeypatch):
    vqa = YesNoJudge.open(judge_folders["vqa"])
    monkeypatch.setattr(vqa.processor, "chat_template", "{{ raise_exception('only text') }}")
    with pytest.raises(UserError, match="VQA judge does not accept an image with a question: only text; choose"):
        vqa.ask([judges.picture(0)], ["Is it red?"])


def test_models_that_cannot_answer_are_rejected(judge_folders, tmp_path):
    with pytest.raises(ValueError, match="'mask2former', which does not answer questions"):
        YesNoJudge.open(judge_folders["detector"])
    with pytest.raises(ValueError, match="must be a folder with config.json"):
        YesNoJudge.open(tmp_path)


# Weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["detector", "clip", "vqa"])
@pytest.mark.parametrize("damage", ["pointer", "cut", "drop", "nan"])
def test_judges_do_not_start_from_damaged_or_random_weights(judge_folders, tmp_path, kind, damage):
    folder = shutil.copytree(judge_folders[kind], tmp_path / kind)
    (file,) = folder.glob("*.safetensors")
    if damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 14458342\n")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        name = next(name for name, value in weights.items() if value.is_floating_point() and value.ndim == 2)
        if damage == "drop":
            weights.pop(name)
        else:
            weights[name][0, 0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
    message = {"pointer": "Git LFS pointer", "cut": "cut off or damaged", "nan": "NaN or infinite"}
    judge = {"detector": Mask2FormerDetector, "clip": ColorClassifier, "vqa": YesNoJudge}[kind]
    with pytest.raises(ValueError, match=message.get(damage, "missing|Missing key")):
        judge.open(folder)
