import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.teacher import load_teacher, teacher_features, train_teacher
from evotok_plugin.training.tokenizer_trainer import TokenizerTrainer


@pytest.fixture(scope="module")
def teacher_folder(scene_folder, tiny_tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher(scene_folder / "train", tiny_tokenizer_folder, folder, max_steps=2, batch_size=8)
    return folder


def config(scene_folder, output, **options):
    values = dict(
        data=str(scene_folder / "train"), output_dir=str(output), preset="tiny", max_steps=4, batch_size=4,
        learning_rate=1e-3, lpips_weight=0, gan_weight=0, semantic_weight=0, kmeans_images=8, augment=False,
        val_fraction=0.1, val_every=2, save_every=2, log_every=1,
    )  # fmt: skip
    return TokenizerTrainingConfig(**{**values, **options})


def test_training_lowers_the_loss_and_tells_its_story(scene_folder, teacher_folder, tmp_path):
    settings = {"max_steps": 25, "val_every": 25, "save_every": 25, "semantic_weight": 0.1, "pixel_weight": 20}
    TokenizerTrainer(config(scene_folder, tmp_path, teacher=str(teacher_folder), **settings)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    pixel = [line["pixel"] for line in lines if "pixel" in line]
    assert sum(pixel[-5:]) < 0.7 * sum(pixel[:5])
    final = next(line for line in lines if "val_psnr" in line)
    assert final["step"] == 25 and -1 <= final["val_semantic_cosine"] <= 1
    assert (tmp_path / "validation_0000025.png").is_file() and list((tmp_path / "tensorboard").iterdir())
    assert isinstance(EvoTokModel.from_pretrained(tmp_path), EvoTokModel)


@pytest.mark.parametrize("options", [{}, {"gan_weight": 0.5, "gan_start": 1}, {"augment": True}])
def test_two_and_two_resumed_steps_equal_four(scene_folder, tmp_path, options):
    TokenizerTrainer(config(scene_folder, tmp_path / "whole", **options)).run()
    half = TokenizerTrainer(config(scene_folder, tmp_path / "parts", **options))
    original, half_way = half.save_checkpoint, []

    def stop_after_two():
        original()
        half_way.append(half.step)
        raise KeyboardInterrupt

    half.save_checkpoint = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        half.run()
    assert half_way == [2]
    torch.manual_seed(99)
    TokenizerTrainer(config(scene_folder, tmp_path / "parts", **options)).run()
    for file in ("model.safetensors", "checkpoint.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), (file, name)


def test_a_loss_that_is_no_number_names_its_term(scene_folder, tmp_path):
    trainer = TokenizerTrainer(config(scene_folder, tmp_path))
    with torch.no_grad():
        trainer.model.pixel_decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 0: the pixel loss is nan"):
        trainer.run()


def test_a_checkpoint_of_another_shape_is_refused(scene_folder, tmp_path):
    TokenizerTrainer(config(scene_folder, tmp_path, max_steps=1)).run()
    with pytest.raises(ValueError, match="checkpoint of another model"):
        TokenizerTrainer(config(scene_folder, tmp_path, model={"codebook_size": 64})).run()
    TokenizerTrainer(config(scene_folder, tmp_path, model={"codebook_size": 64}, overwrite=True, max_steps=1)).run()


def test_the_encoder_starts_as_the_teacher(scene_folder, teacher_folder, tmp_path):
    trainer = TokenizerTrainer(config(scene_folder, tmp_path, semantic_weight=1.0, teacher=str(teacher_folder)))
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    teacher = load_teacher(str(teacher_folder))
    with torch.no_grad():
        features = trainer.model.encoder.features(images)
    torch.testing.assert_close(features, teacher_features(teacher, images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic_weight": 1.0}, "there is no teacher"),
        ({"semantic_weight": 1.0, "teacher": "nowhere"}, "teacher 'nowhere' cannot be loaded"),
        ({"pixel_loss": "huber"}, "pixel_loss must be l1 or l2"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"preset": "huge"}, "unknown preset"),
    ],
)
def test_settings_that_cannot_work_are_refused(scene_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerTrainer(config(scene_folder, tmp_path, **options))


def test_a_teacher_of_another_size_is_refused(scene_folder, teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="image_size is 48, the preset needs 64"):
        TokenizerTrainer(
            config(scene_folder, tmp_path, semantic_weight=1.0, teacher=str(teacher_folder), model={"image_size": 64})
        )


def test_damaged_weights_are_not_loaded_in_silence(tmp_path, tiny_evotok_folder):
    import shutil

    from evotok_plugin.cli import open_tokenizer

    for damage in ("drop", "shape"):
        folder = tmp_path / damage
        shutil.copytree(tiny_evotok_folder, folder)
        weights = load_file(folder / "model.safetensors")
        if damage == "drop":
            weights.pop("quantizer.codebooks")
        else:
            weights["quantizer.codebooks"] = torch.zeros(8, 4, 16)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="quantizer.codebooks|cannot be loaded"):
            open_tokenizer(str(folder))


def test_preset_and_teacher_shapes_agree():
    tiny = EvoTokConfig.preset("tiny")
    assert tiny.semantic_dim == tiny.encoder_hidden_size
