"""EvoTok's tower in the code of LLaVA or LLaVA-NeXT: whichever package `llava` can be imported.

Run in its environment: `PYTHONPATH=LLAVA_CHECKOUT python -m pytest tests/interop -rs`.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evotok_plugin import EvoTokVisionTower

ROOT = Path(__file__).resolve().parents[2]
TOWER = ROOT / "llava_ext" / "pretrained" / "scenes"
POSITIONS, WIDTH, SIDE = 9, 128, 48
IMAGE, IGNORED = -200, -100
PINPOINTS = [[48, 96], [96, 48], [96, 96]]
MERGES = ["flat", "spatial", "spatial_unpad"]


def built(cfg, **options):
    from llava.model.llava_arch import build_vision_tower

    return build_vision_tower(cfg, **options)


def pixels(model, pictures):
    prepared = [model.get_vision_tower().image_processor.preprocess(one, return_tensors="pt") for one in pictures]
    return torch.stack([one["pixel_values"][0] for one in prepared])


def prompt(*images_at, length=12):
    ids = torch.arange(3, 3 + length)
    ids[list(images_at)] = IMAGE
    return ids


def prepare(model, ids, images, sizes=None):
    options = {"image_sizes": sizes}
    if hasattr(model, "get_2dPool"):
        options["modalities"] = ["image"] * len(ids)
    labels = torch.where(ids == IMAGE, IGNORED, ids)
    return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, labels, images, **options)


def loss_of(model, ids, images, sizes=None):
    labels = torch.where(ids == IMAGE, IGNORED, ids)
    options = {"modalities": ["image"] * len(ids)} if hasattr(model, "get_2dPool") else {}
    return model(input_ids=ids, labels=labels, images=images, image_sizes=sizes, **options).loss


def test_the_code_base_builds_the_tower(host):
    for name in ("mm_vision_tower", "vision_tower"):
        for delay in (False, True):
            tower = built(SimpleNamespace(**{name: str(TOWER)}), delay_load=delay)
            assert isinstance(tower, EvoTokVisionTower) and tower.is_loaded != delay
            assert (tower.hidden_size, tower.num_patches, tower.config.image_size) == (WIDTH, POSITIONS, SIDE)


def test_features_equal_those_of_the_project(host):
    expected = load_file(str(ROOT / "tests" / "golden" / "tower_features.safetensors"))["features"]
    tower = built(SimpleNamespace(mm_vision_tower=str(TOWER)))
    pixel_values = torch.arange(2 * 3 * SIDE * SIDE).mul(7919).remainder(256).view(2, 3, SIDE, SIDE) / 127.5 - 1
    torch.testing.assert_close(tower(pixel_values), expected, atol=1e-4, rtol=1e-4)


def test_images_are_encoded_and_projected(host, pictures):
    model = host.model()
    images = pixels(model, pictures)
    expected = model.get_model().mm_projector(model.get_vision_tower()(images))
    encoded = model.encode_images(images)
    assert encoded.shape == (3, POSITIONS, 32)
    torch.testing.assert_close(encoded, expected)


def test_image_features_take_the_places_of_the_placeholders(host, pictures):
    model = host.model()
    images, ids = pixels(model, pictures[:2]), torch.stack([prompt(1), prompt(5)])
    *_, embeds, labels = prepare(model, ids, images)
    assert embeds.shape == (2, 12 - 1 + POSITIONS, 32) and labels.shape == embeds.shape[:2]
    encoded = model.encode_images(images)
    for row, at in enumerate((1, 5)):
        torch.testing.assert_close(embeds[row, at : at + POSITIONS], encoded[row])
        assert (labels[row, at : at + POSITIONS] == IGNORED).all()
        assert labels[row, :at].tolist() == ids[row, :at].tolist()


def test_the_loss_reaches_the_projector_and_not_the_tower(host, pictures):
    model = host.model().train()
    loss_of(model, torch.stack([prompt(1), prompt(5)]), pixels(model, pictures[:2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_model().mm_projector.parameters())
    assert all(p.grad is None for p in model.get_vision_tower().parameters())


def test_an_unfrozen_tower_gets_gradients(host, pictures):
    model = host.model().train()
    model.get_vision_tower().requires_grad_(True)
    loss_of(model, torch.stack([prompt(1)]), pixels(model, pictures[:1])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_vision_tower().parameters())


def test_several_images_in_a_sample(host, pictures):
    model = host.model()
    images, ids = pixels(model, pictures), torch.stack([prompt(2, 6), prompt(3)])
    *_, embeds, labels = prepare(model, ids, images)
    assert embeds.shape[1] == 12 - 2 + 2 * POSITIONS
    encoded = model.encode_images(images)
    torch.testing.assert_close(embeds[0, 2 : 2 + POSITIONS], encoded[0])
    torch.testing.assert_close(embeds[0, 5 + POSITIONS : 5 + 2 * POSITIONS], encoded[1])
    torch.testing.assert_close(embeds[1, 3 : 3 + POSITIONS], encoded[2])
    assert loss_of(model, ids, images).isfinite()


@pytest.mark.parametrize("as_list", [False, True])
def test_images_in_five_dimensions_or_as_a_list(host, pictures, as_list):
    model = host.model()
    images, ids = pixels(model, pictures[:2])[:, None].expand(-1, 2, -1, -1, -1), torch.stack([prompt(1), prompt(5)])
    *_, embeds, _ = prepare(model, ids, list(images) if as_list else images)
    assert embeds.shape == (2, 12 - 1 + 2 * POSITIONS, 32)
    torch.testing.assert_close(embeds[0, 1 : 1 + POSITIONS], embeds[0, 1 + POSITIONS : 1 + 2 * POSITIONS])


@pytest.mark.parametrize("merge", MERGES)
def test_images_of_any_resolution_are_cut_into_tiles(host, pictures, merge):
    from llava.mm_utils import process_images

    model = host.model(mm_patch_merge_type=merge, image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    tower = model.get_vision_tower()
    images = process_images(pictures, tower.image_processor, model.config)
    assert [image.shape[1:] for image in images] == [(3, SIDE, SIDE)] * 3
    assert [image.shape[0] for image in images] == [3, 3, 5]
    ids = torch.stack([prompt(1), prompt(5), prompt(2)])
    assert loss_of(model, ids, list(images), [picture.size for picture in pictures]).isfinite()


def test_images_are_padded_to_squares(host, pictures):
    from llava.mm_utils import process_images

    model = host.model(image_aspect_ratio="pad")
    images = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    assert images.shape == (3, 3, SIDE, SIDE) and images.abs().max() <= 1
    assert images[1, :, :8].abs().max() < 0.01  # the border has the mean color


def test_a_range_of_pinpoints_needs_a_list_instead(host):
    from llava import mm_utils

    if not host.is_next:
        pytest.skip("only LLaVA-NeXT has ranges of pinpoints")
    processor, picture = built(SimpleNamespace(mm_vision_tower=str(TOWER))).image_processor, Image.new("RGB", (60, 120))
    with pytest.raises(AssertionError, match="patch_size should be in"):
        mm_utils.process_anyres_image(picture, processor, "(1x1),...,(2x2)")
    explicit = str([[SIDE * rows, SIDE * columns] for rows, columns in itertools.product((1, 2), repeat=2)])
    assert mm_utils.process_anyres_image(picture, processor, explicit).shape == (3, 3, SIDE, SIDE)


def test_the_model_generates(host, pictures):
    model = host.model()
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    if host.is_next:
        options["modalities"] = ["image"]
    sizes = [pictures[0].size]
    ids = model.generate(prompt(1)[None], images=pixels(model, pictures[:1]), image_sizes=sizes, **options)
    again = model.generate(prompt(1)[None], images=pixels(model, pictures[:1]), image_sizes=sizes, **options)
    assert ids.shape[1] >= 5 and torch.equal(ids, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_searches_codes_in_float32(host, pictures, dtype):
    tower = built(SimpleNamespace(mm_vision_tower=str(TOWER)))
    books = tower.vision_tower.quantizer.codebooks.clone()
    tower.to(dtype=dtype)
    assert tower.dtype == tower.dummy_feature.dtype == dtype
    assert torch.equal(tower.vision_tower.quantizer.codebooks, books)
    if dtype == torch.bfloat16:  # PyTorch 2.1 has no float16 kernels for CPUs
        images = tower.image_processor.preprocess(pictures[0], return_tensors="pt")["pixel_values"]
        assert tower(images.to(dtype)).dtype == dtype and tower(images).dtype == torch.float32


@pytest.mark.parametrize(("low_memory", "dtype"), itertools.product([False, True], [torch.float32, torch.bfloat16]))
def test_a_frozen_tower_is_the_same_after_saving_and_loading(host, pictures, tmp_path, low_memory, dtype):
    model = host.model()
    images = pixels(model, pictures)
    expected = model.get_vision_tower()(images)
    model.save_pretrained(tmp_path)
    loaded = host.model_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory, torch_dtype=dtype)
    tower = loaded.get_vision_tower()
    tower.load_model()
    assert all(not p.is_meta for p in tower.parameters())
    assert torch.equal(
        tower.vision_tower.quantizer.codebooks, model.get_vision_tower().vision_tower.quantizer.codebooks
    )
    if tower.dtype == torch.float32:
        torch.testing.assert_close(tower(images), expected)
    assert loaded.encode_images(images.to(dtype)).shape == (3, POSITIONS, 32)


@pytest.mark.parametrize(("low_memory", "is_complete"), itertools.product([False, True], [False, True]))
def test_a_trained_tower_comes_from_the_checkpoint(host, pictures, tmp_path, low_memory, is_complete):
    model = host.model()
    images, tower = pixels(model, pictures), model.get_vision_tower()
    model.config.unfreeze_mm_vision_tower, model.config.mm_tunable_parts = True, "mm_vision_tower"
    with torch.no_grad():
        tower.vision_tower.semantic_decoder.to_features[2].bias += 1
    learned = tower(images)
    state = model.state_dict()
    if not is_complete:  # only what was trained, as with adapters
        state = {name: value for name, value in state.items() if "vision_tower" not in name or "to_features" in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = host.model_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    again = loaded.get_vision_tower()
    if again.is_loaded:  # built with the model
        torch.testing.assert_close(again(images), learned)
    else:  # LLaVA has no trained towers: it loads the folder
        again.load_model()
        torch.testing.assert_close(again(images), learned - 1)


def test_the_code_base_loads_a_saved_model(host, words, pictures, tmp_path):
    from llava.model.builder import load_pretrained_model
    from transformers import AutoTokenizer

    folder = tmp_path / f"llava-{host.kind}"
    model = host.model()
    images = pixels(model, pictures)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(words, use_fast=False).save_pretrained(folder)
    options = {"device_map": "cpu", "attn_implementation": "eager"} if host.is_next else {"device": "cpu"}
    if host.is_next and not torch.cuda.is_available():
        pytest.skip("LLaVA-NeXT's load_pretrained_model moves the tower to CUDA")
    _, loaded, processor, _ = load_pretrained_model(str(folder), None, folder.name, **options)
    tower = loaded.get_vision_tower()
    assert tower.is_loaded and processor is tower.image_processor
    torch.testing.assert_close(tower.float()(images), model.get_vision_tower()(images), atol=1e-4, rtol=1e-4)


def records(folder, pictures):
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    conversation = [
        {"from": "human", "value": "<image>\nWhat is in this image?"},
        {"from": "gpt", "value": "A red circle is above a blue square"},
    ]
    rows = [{"id": str(n), "image": f"{n % len(pictures)}.png", "conversations": conversation} for n in range(8)]
    (folder / "data.json").write_text(json.dumps(rows))


def stand_in_for_deepspeed(folder):
    """An empty stand-in for DeepSpeed, which LLaVA's training imports but does not use in a single process."""
    partition = folder / "deepspeed" / "runtime" / "zero"
    partition.mkdir(parents=True)
    for package in (partition, partition.parent, partition.parent.parent):
        (package / "__init__.py").touch()
    (folder / "deepspeed" / "__init__.py").write_text("from deepspeed.runtime import zero\n")
    (partition / "partition_parameters.py").write_text("class ZeroParamStatus:\n    NOT_AVAILABLE = 0\n")


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_the_hf_builder_takes_the_exported_tower(host, pictures, tmp_path, monkeypatch, feature, layer):
    if not host.is_next:
        pytest.skip("only LLaVA-NeXT builds towers by the name hf:FOLDER")
    from evotok_plugin.export.tower import export_tower

    export_tower(TOWER, tmp_path / "tower")
    move = torch.nn.Module.to  # the builder moves every tower to a GPU
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, to: move(self, "cpu" if to == "cuda" else to))
    cfg = SimpleNamespace(
        mm_vision_tower=f"hf:{tmp_path / 'tower'}", mm_vision_select_layer=layer, mm_vision_select_feature=feature
    )
    tower = built(cfg)
    assert type(tower).__name__ == "HFVisionTower" and not isinstance(tower.vision_tower, EvoTokVisionTower)
    has_class = feature == "cls_patch"
    assert (tower.hidden_size, tower.num_patches) == (WIDTH, POSITIONS + has_class)
    images = torch.stack(
        [tower.image_processor.preprocess(one, return_tensors="pt")["pixel_values"][0] for one in pictures]
    )
    ours = built(SimpleNamespace(mm_vision_tower=str(TOWER)))
    expected = ours.image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]
    assert images.shape == expected.shape and (images[0] - expected[0]).abs().max() < 0.01  # a square image
    assert tower.vision_tower.dtype == torch.bfloat16 and tower.vision_tower.quantizer.codebooks.dtype == torch.float32
    tower.float()
    ours.bfloat16().float()  # the builder has rounded the weights, and rounds the images
    same = ours(expected.bfloat16().float())
    torch.testing.assert_close(tower(expected)[:, has_class:], same, atol=1e-4, rtol=1e-4)


def test_training_in_two_stages(host, words, pictures, tmp_path, host_environment):
    """LLaVA's own `train()` on eight samples, started by the runner: the projector, then the language model."""
    if host.is_next:
        pytest.skip("LLaVA-NeXT's training program requires deepspeed and CUDA")
    try:
        importlib.import_module("llava.train.train")
    except ImportError as error:
        pytest.skip(f"LLaVA's training program cannot be imported: {error}")
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    host.language_model().save_pretrained(base)
    AutoTokenizer.from_pretrained(words, use_fast=False).save_pretrained(base)
    records(tmp_path, pictures)
    if importlib.util.find_spec("deepspeed") is None:
        stand_in_for_deepspeed(tmp_path / "stand_in")
        host_environment["PYTHONPATH"] += os.pathsep + str(tmp_path / "stand_in")
    shared = [
        "--vision_tower", TOWER, "--data_path", tmp_path / "data.json", "--image_folder", tmp_path,
        "--mm_projector_type", "mlp2x_gelu", "--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False",
        "--bf16", "True", "--use_cpu", "True", "--num_train_epochs", "1", "--per_device_train_batch_size", "4",
        "--save_strategy", "no", "--learning_rate", "1e-3", "--logging_steps", "1", "--model_max_length", "256",
        "--dataloader_num_workers", "0", "--lazy_preprocess", "True", "--report_to", "none",
    ]  # fmt: skip
    stage_1 = [
        "--model_name_or_path", base, "--version", "plain", "--tune_mm_mlp_adapter", "True",
        "--output_dir", tmp_path / "llava-stage-1",
    ]  # fmt: skip
    stage_2 = [
        "--model_name_or_path", base, "--version", "v1", "--pretrain_mm_mlp_adapter",
        tmp_path / "llava-stage-1" / "mm_projector.bin", "--image_aspect_ratio", "pad",
        "--output_dir", tmp_path / "llava-stage-2",
    ]  # fmt: skip
    for arguments in (stage_1, stage_2):
        command = [sys.executable, "-m", "evotok_plugin.llava", "-m", "llava.train.train", *arguments, *shared]
        done = subprocess.run(list(map(str, command)), env=host_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("'loss'") == 2, done.stdout
    trained = host.model_class.from_pretrained(tmp_path / "llava-stage-2")
    tower = trained.get_vision_tower()
    tower.load_model()
    images = pixels(trained, pictures)
    torch.testing.assert_close(tower(images), EvoTokVisionTower(TOWER)(images))
