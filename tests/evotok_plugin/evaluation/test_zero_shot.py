"""Zero-shot accuracy: SigLIP's own logits as reference, and the command with a teacher that has a text tower."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipModel

from evotok_plugin.cli import main
from evotok_plugin.errors import UserError
from evotok_plugin.metrics import zero_shot
from evotok_plugin.scenes.scene import Scene, place, render
from evotok_plugin.teacher import load_teacher, teacher_features
from evotok_plugin.training.teacher import build_siglip
from evotok_plugin.training.teacher import main as train_teacher

NAMES = ["circle", "square", "red_ring"]


@pytest.fixture(scope="module")
def siglip_folder(model, tiny_backbone_folder, tmp_path_factory):
    """A complete SigLIP with random weights, and the tokenizer of the tiny backbone."""
    from evotok_plugin.model_folder import open_tokenizer_folder

    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = open_tokenizer_folder(tiny_backbone_folder)
    torch.manual_seed(2)
    build_siglip(model.config, len(tokenizer), 16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_embeddings_equal_those_of_the_whole_model(siglip_folder, processor):
    """From the teacher's features to the embedding, and from names to theirs, as SigLIP itself computes them."""
    classifier, whole = zero_shot.load_zero_shot(siglip_folder), SiglipModel.from_pretrained(siglip_folder).eval()
    rng = np.random.default_rng(0)
    pixel_values = processor(
        [Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8)) for _ in range(3)]
    ).pixel_values
    texts = [f"a photo of a {name.replace('_', ' ')}" for name in NAMES]
    ids = classifier._tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        images = whole.get_image_features(pixel_values).pooler_output
        words = whole.get_text_features(ids).pooler_output
    features = teacher_features(load_teacher(siglip_folder), pixel_values)
    torch.testing.assert_close(classifier.embed_features(features), torch.nn.functional.normalize(images, dim=-1))
    torch.testing.assert_close(classifier.embed_names(NAMES), torch.nn.functional.normalize(words, dim=-1))


@pytest.fixture
def shapes(tmp_path):
    """Scenes in folders named by their shape."""
    rng = np.random.default_rng(1)
    for shape in ("circle", "cross"):
        (tmp_path / "shapes" / shape).mkdir(parents=True)
        for number in range(4):
            scene = Scene((place(rng, shape, "red", 4),))
            render(scene, 96).save(tmp_path / "shapes" / shape / f"{number}.png")
    return tmp_path / "shapes"


def evaluated(capsys, *words):
    code = main(["evaluate", *map(str, words), "--num_workers", "0"])
    return code, capsys.readouterr()


def test_the_command_measures_it_with_a_text_tower(
    shapes, siglip_folder, teacher_folder, tiny_evotok_folder, tmp_path, capsys
):
    common = [shapes, "--model", tiny_evotok_folder, "-o", tmp_path / "out"]
    code, said = evaluated(capsys, *common, "--teacher", siglip_folder)
    values = json.loads((tmp_path / "out/metrics.json").read_text())
    assert code == 0 and values["zero_shot_classes"] == 2 and "zero_shot" not in values["not_measured"]
    # Both figures are counts of eight images; the teacher's is its own classification of the originals.
    assert (values["zero_shot_accuracy"] * 8).is_integer() and (values["teacher_zero_shot_accuracy"] * 8).is_integer()
    whole = SiglipModel.from_pretrained(siglip_folder).eval()
    classifier = zero_shot.load_zero_shot(siglip_folder)
    from evotok_plugin.tokenizer_folder import open_image_processor

    crop = open_image_processor(tiny_evotok_folder)
    files = sorted(shapes.rglob("*.png"))
    with torch.no_grad():
        found = whole.get_image_features(crop([Image.open(file) for file in files]).pixel_values).pooler_output
    nearest = (found @ classifier.embed_names(["circle", "cross"]).T).argmax(dim=1)
    right = sum(["circle", "cross"][place] == file.parent.name for place, file in zip(nearest, files, strict=True))
    assert values["teacher_zero_shot_accuracy"] == right / 8
    assert "zero-shot accuracy of the teacher" in said.out
    code, said = evaluated(capsys, *common, "--teacher", teacher_folder)
    assert code == 0 and "* zero_shot: it classifies by the names of classes" in said.out
    code, said = evaluated(capsys, *common, "--teacher", teacher_folder, "--metrics", "zero_shot")
    assert code == 2 and "zero_shot cannot be measured" in said.err


def test_identifiers_need_names(shapes, siglip_folder, tiny_evotok_folder, tmp_path, capsys):
    (shapes / "circle").rename(shapes / "n01440764")
    common = [shapes, "--model", tiny_evotok_folder, "--teacher", siglip_folder, "--metrics", "zero_shot"]
    code, said = evaluated(capsys, *common)
    assert code == 2 and "class 'n01440764' has no name in words; pass --class_names" in said.err
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"n01440764": "circle"}))
    code, said = evaluated(capsys, *common, "--class_names", names)
    assert code == 0 and "zero-shot accuracy" in said.out
    names.write_text(json.dumps({"n01440764": 3}))
    with pytest.raises(UserError, match="expected names by folder"):
        zero_shot.read_class_names(names)


def test_a_tokenizer_with_other_ids_is_rejected(model, siglip_folder):
    classifier = zero_shot.load_zero_shot(siglip_folder)
    classifier.text_model.embeddings.token_embedding = torch.nn.Embedding(2, 8)
    with pytest.raises(UserError, match="give a folder whose tokenizer belongs to the model"):
        classifier.embed_names(["circle"])


def test_a_trained_teacher_can_keep_its_text_tower(scene_folder, tiny_backbone_folder, tmp_path):
    words = ["--data", str(scene_folder / "train"), "--tokenizer", str(tiny_backbone_folder), "--max_steps", "1"]
    for name, flags in (("whole", ["--with_text"]), ("tower", [])):
        assert train_teacher([*words, "--batch_size", "4", "--output_dir", str(tmp_path / name), *flags]) == 0
    assert zero_shot.has_text_tower(str(tmp_path / "whole")) and not zero_shot.has_text_tower(str(tmp_path / "tower"))
    zero_shot.load_zero_shot(str(tmp_path / "whole")).embed_names(NAMES)
    whole, tower = (load_teacher(str(tmp_path / name)).state_dict() for name in ("whole", "tower"))
    assert whole and all(value.equal(tower[name]) for name, value in whole.items())
    with pytest.raises(UserError, match="expected a complete SigLIP"):
        zero_shot.load_zero_shot(str(tmp_path / "tower"))
