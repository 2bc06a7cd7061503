"""The data set of a stage: samples from records and cached codes, and building it from `data_path`."""

import base64
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.encode import encode_images
from evotok_plugin.data.sources import FileSource
from evotok_plugin.errors import UserError
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.records import KINDS, parse_record
from llava_ext.data.samplers import EpochSampler
from llava_ext.processing_evotok_llava import TooLong
from llava_ext.training.build_data import build_dataset
from llava_ext.training.config import StageConfig
from llava_ext.training.launch import prepare_processes

READ_ONLY = {"tune_write_projector": False, "tune_image_head": False}  # for data without drawings


@pytest.fixture(scope="module")
def cache_folder(tiny_mllm, scene_folder, tmp_path_factory):
    model, processor = tiny_mllm
    folder, root = tmp_path_factory.mktemp("cache"), scene_folder / "train"
    names = sorted(f"images/{path.name}" for path in (root / "images").iterdir())
    encode_images(folder, FileSource(root, names), model.vision_tower, processor.image_processor.size)
    return folder


@pytest.fixture
def dataset_of(tiny_mllm, scene_folder, cache_folder):
    model, processor = tiny_mllm
    rows = json.loads((scene_folder / "train" / "finetune.json").read_text())
    records = [parse_record(row, scene_folder / "train") for row in rows]
    cache = CodeCache(cache_folder, model.vision_tower.fingerprint())
    return lambda **options: ConversationDataset(records, processor, cache, **options)


# Samples -----------------------------------------------------------------------------------------------------


def test_prompt_dropout_empties_the_user_turn_of_drawing_samples(tiny_mllm, dataset_of):
    _, processor = tiny_mllm
    always, never = dataset_of(prompt_dropout=0.999), dataset_of(prompt_dropout=0.0)
    unconditional = processor.drawing_prompts([""])["input_ids"][0]
    drawing, reading = (int(np.flatnonzero(always.kinds == KINDS.index(kind))[0]) for kind in ("draw", "read"))
    drawn = always[drawing].input_ids
    assert torch.equal(drawn[: len(unconditional)], unconditional)
    assert torch.equal(always[reading].input_ids, never[reading].input_ids)
    assert len(never[drawing].input_ids) > len(drawn)


def test_questions_after_the_last_drawing_are_never_dropped(tiny_mllm, scene_folder, cache_folder):
    model, processor = tiny_mllm
    talk = ["draw a ring", "<image>", "once more", "<image>", "What is it?", "a ring"]
    row = {
        "image": ["images/000000.png"] * 2,
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(talk)],
    }
    records = [parse_record(row, scene_folder / "train")]
    cache = CodeCache(cache_folder, model.vision_tower.fingerprint())
    dataset = ConversationDataset(records, processor, cache, prompt_dropout=0.999)
    text = processor.decode(dataset[0].input_ids)
    assert "draw a ring" not in text and "once more" not in text and "What is it?" in text


def test_an_image_shown_in_an_assistant_turn_is_read_and_not_learned(tiny_mllm, scene_folder, cache_folder):
    model, processor = tiny_mllm
    rows = json.loads((scene_folder / "train" / "interleaved.json").read_text())
    cache = CodeCache(cache_folder, model.vision_tower.fingerprint())
    records = [parse_record(row, scene_folder / "train") for row in rows[3:6]]
    asked, following, copied = (ConversationDataset(records, processor, cache, prompt_dropout=0)[n] for n in range(3))
    assert len(asked.read_codes) == 1 and not model.vocabulary.is_residual(asked.input_ids).any()
    shown = asked.input_ids == processor.image_token_id
    assert shown.sum() == 9 and (asked.labels[shown] == -100).all() and (asked.labels != -100).any()
    assert len(following.read_codes) == 1 and model.vocabulary.is_residual(following.labels).sum() == 36
    assert len(copied.read_codes) == 1 and model.vocabulary.is_residual(copied.labels).sum() == 36


def test_dropped_prompts_are_determined_by_the_epoch(dataset_of):
    dataset, again = dataset_of(prompt_dropout=0.5), dataset_of(prompt_dropout=0.5)
    first = [len(dataset[i].input_ids) for i in range(len(dataset))]
    dataset.set_epoch(1)
    second = [len(dataset[i].input_ids) for i in range(len(dataset))]
    again.set_epoch(1)
    assert second == [len(again[i].input_ids) for i in range(len(again))] != first


def test_persistent_data_loading_processes_see_the_new_epoch(dataset_of):
    dataset = dataset_of(prompt_dropout=0.5)
    loader = DataLoader(dataset, batch_size=None, collate_fn=_length, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert list(loader) == [len(dataset[i].input_ids) for i in range(len(dataset))]


def _length(sample):
    return len(sample.input_ids)


def test_samples_have_the_announced_lengths(tiny_mllm, dataset_of):
    model, processor = tiny_mllm
    for max_length in (60, 2048):
        dataset = dataset_of(max_length=max_length, prompt_dropout=0.0)
        samples = [dataset[i] for i in range(8)]
        vocabulary = processor.vocabulary
        folded = [vocabulary.is_residual(s.input_ids) & (vocabulary.levels(s.input_ids) > 0) for s in samples]
        steps = [len(s.input_ids) - int(one.sum()) for s, one in zip(samples, folded, strict=True)]
        assert steps == dataset.lengths[:8].tolist() and max(steps) <= max_length
        assert torch.isfinite(model(**Collator(processor)(samples)).loss)


def test_an_image_that_does_not_fit_is_an_error(dataset_of):
    dataset = dataset_of(max_length=10)
    with pytest.raises(TooLong, match="first 10 do not include all images completely"):
        dataset[int(np.flatnonzero(dataset.kinds)[0])]


# Order -------------------------------------------------------------------------------------------------------


def test_an_ungrouped_epoch_has_the_order_of_the_data_set(dataset_of):
    dataset, epoch = dataset_of(seed=4), 2.3
    sampler = EpochSampler(dataset.order, len(dataset), lambda: epoch)
    assert list(sampler) == dataset.order(2).tolist() and len(sampler) == len(dataset)


# From data_path to a data set --------------------------------------------------------------------------------


@pytest.fixture
def config_of(tmp_path, scene_folder):
    def build(**options):
        values = {
            "model_name_or_path": "unused",
            "data_path": [str(scene_folder / "train" / "finetune.json")],
            "image_folder": str(scene_folder / "train"),
            "output_dir": str(tmp_path / "out"),
            "code_cache": str(tmp_path / "codes"),
            "disable_tqdm": True,
            "report_to": "none",
        }
        config = StageConfig(**values | options)
        prepare_processes(config)
        return config

    return build


def reported(config, name):
    return [json.loads(line) for line in open(f"{config.output_dir}/{name}.jsonl")]


def test_a_data_set_is_built_and_no_image_is_encoded_twice(tiny_mllm, config_of, scene_folder, monkeypatch):
    config = config_of()
    dataset = build_dataset(config, *tiny_mllm)
    assert len(dataset) == len(json.loads((scene_folder / "train" / "finetune.json").read_text()))
    assert sorted(dataset.order(0)) == list(range(len(dataset)))
    assert sum(dataset.count_kinds().values()) == len(dataset)
    monkeypatch.setattr(type(tiny_mllm[0].vision_tower), "encode", lambda *_: pytest.fail("encoded again"))
    again = build_dataset(config, *tiny_mllm)
    assert torch.equal(again[0].input_ids, dataset[0].input_ids)
    images = {name for record in dataset.records for name in record.images}
    assert 0 < len(CodeCache(config.code_cache)) == len(images) < len(dataset), "no image is encoded twice"


def test_cached_codes_are_those_of_the_images(tiny_mllm, config_of, scene_folder):
    model, processor = tiny_mllm
    dataset = build_dataset(config_of(prompt_dropout=0.0), model, processor)
    record = dataset.records[int(np.flatnonzero(dataset.kinds == KINDS.index("read"))[0])]
    picture = Image.open(scene_folder / "train" / record.images[0])
    expected = model.vision_tower.encode(processor.image_processor(picture, return_tensors="pt").pixel_values).codes
    sample = dataset[list(dataset.records).index(record)]
    assert torch.equal(sample.read_codes[0], expected[0])


def test_weighted_sources_get_their_shares(tiny_mllm, config_of, scene_folder, tmp_path):
    text = [
        {"conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "gpt", "value": "ho"}]} for i in range(9)
    ]
    (tmp_path / "text.json").write_text(json.dumps(text))
    paths = [str(scene_folder / "train" / "pretrain.json"), str(tmp_path / "text.json")]
    dataset = build_dataset(config_of(data_path=paths, data_weights=[1.0, 3.0]), *tiny_mllm)
    kinds = np.concatenate([dataset.kinds[dataset.order(epoch)] for epoch in range(24)])[:1024]
    assert (kinds == KINDS.index("text")).sum() == 768
    with pytest.raises(UserError, match="data_weights: expected 2 above 0"):
        build_dataset(config_of(data_path=paths, data_weights=[1.0]), *tiny_mllm)


def broken_copy(scene_folder, tmp_path):
    import shutil

    shutil.copytree(scene_folder / "train", tmp_path / "images")
    (tmp_path / "images" / "images" / "000003.png").write_bytes(b"not a picture")
    rows = json.loads((scene_folder / "train" / "finetune.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*rows, {"id": "empty"}]))
    options = {"image_folder": str(tmp_path / "images"), "data_path": [str(tmp_path / "data.json")]}
    return options, sum(row.get("image") == "images/000003.png" for row in rows), len(rows)


def test_bad_records_and_broken_images_are_left_out_by_name(tiny_mllm, config_of, scene_folder, tmp_path):
    options, num_broken, num_rows = broken_copy(scene_folder, tmp_path)
    config = config_of(**options, max_bad_fraction=0.2)
    for _ in range(2):  # the second time the cache knows what is broken
        dataset = build_dataset(config, *tiny_mllm)
        assert len(dataset) == num_rows - num_broken
        assert all("images/000003.png" not in record.images for record in dataset.records)
        lines = reported(config, "bad_samples")
        assert len(lines) == num_broken + 1 and f"data.json:{num_rows} (empty)" in lines[0]["sample"]
        assert all("000003.png" in line["reason"] for line in lines[1:])


def test_a_repaired_image_is_used_again(tiny_mllm, config_of, scene_folder, tmp_path):
    options, num_broken, num_rows = broken_copy(scene_folder, tmp_path)
    config = config_of(**options, max_bad_fraction=0.2)
    assert len(build_dataset(config, *tiny_mllm)) == num_rows - num_broken
    whole = scene_folder / "train" / "images" / "000003.png"
    (tmp_path / "images" / "images" / "000003.png").write_bytes(whole.read_bytes())
    assert len(build_dataset(config, *tiny_mllm)) == num_rows


def test_two_image_folders_with_equal_names_keep_separate_codes(tiny_mllm, config_of, scene_folder, tmp_path, caplog):
    """In one code cache, as in the recipes."""
    model, processor = tiny_mllm
    images = sorted((scene_folder / "train" / "images").iterdir())[:8]
    row = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "data.json").write_text(json.dumps([row | {"image": f"{number}.png"} for number in range(4)]))
    caplog.set_level(logging.INFO, "llava_ext")
    for name, chosen in (("a", images[:4]), ("b", images[4:]), ("a", images[:4])):
        (tmp_path / name).mkdir(exist_ok=True)
        for number, image in enumerate(chosen):
            (tmp_path / name / f"{number}.png").write_bytes(image.read_bytes())
        config = config_of(data_path=[str(tmp_path / "data.json")], image_folder=str(tmp_path / name), **READ_ONLY)
        dataset = build_dataset(config, model, processor)
        for number, image in enumerate(chosen):
            pixels = processor.image_processor(Image.open(image), return_tensors="pt").pixel_values
            assert torch.equal(dataset[number].read_codes[0], model.vision_tower.encode(pixels).codes[0])
    assert len(CodeCache(config.code_cache)) == 8
    assert f"code cache {config.code_cache} contains 4 images, 0 of 4 from this source; 4 to read" in caplog.text


def test_each_source_can_have_its_own_image_folder(tiny_mllm, config_of, scene_folder, tmp_path):
    model, processor = tiny_mllm
    images = sorted((scene_folder / "train" / "images").iterdir())[:2]
    row = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    for name, image in zip("ab", images, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(image.read_bytes())
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    folders = [str(tmp_path / name) for name in "ab"]
    dataset = build_dataset(config_of(data_path=paths, image_folder=folders, **READ_ONLY), model, processor)
    for number, image in enumerate(images):
        pixels = processor.image_processor(Image.open(image), return_tensors="pt").pixel_values
        assert torch.equal(dataset[number].read_codes[0], model.vision_tower.encode(pixels).codes[0])
    with pytest.raises(UserError, match="expected one folder, or one for each of 3 entries of data_path, got 2"):
        build_dataset(config_of(data_path=[*paths, paths[0]], image_folder=folders), model, processor)


def test_descriptions_of_llava_also_draw_and_are_logged(tiny_mllm, config_of, scene_folder, tmp_path, caplog):
    rows = [
        {
            "image": f"images/{number:06d}.png",
            "conversations": [
                {"from": "human", "value": "Describe the image concisely.\n<image>"},
                {"from": "gpt", "value": f"disc number {number}"},
            ],
        }
        for number in range(5)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    caplog.set_level(logging.INFO, "llava_ext")
    dataset = build_dataset(config_of(data_path=[str(tmp_path / "data.json")], draw_share=1.0), *tiny_mllm)
    assert dataset.count_kinds() == {"text": 0, "read": 5, "draw": 5}
    assert "5 read, 5 draw" in caplog.text and caplog.text.count("draw: 'disc number") == 3


def test_images_in_rows_are_encoded_and_have_short_names(tiny_mllm, config_of, scene_folder, tmp_path):
    model, processor = tiny_mllm
    image = next((scene_folder / "train" / "images").iterdir())
    uris = [base64.b64encode(content).decode() for content in (image.read_bytes(), bytes(3_000_000))]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": f"data:image/png;base64,{uri}", "conversations": turns} for uri in uris]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = config_of(data_path=[str(tmp_path / "data.json")], max_bad_fraction=0.5, **READ_ONLY)
    dataset = build_dataset(config, model, processor)
    pixels = processor.image_processor(Image.open(image), return_tensors="pt").pixel_values
    assert len(dataset) == 1
    assert torch.equal(dataset[0].read_codes[0], model.vision_tower.encode(pixels).codes[0])
    assert len(json.dumps(reported(config, "bad_samples"))) < 500


def test_too_many_bad_samples_are_an_error(tiny_mllm, config_of, scene_folder, tmp_path):
    options, num_broken, num_rows = broken_copy(scene_folder, tmp_path)
    limit = (num_broken + 0.5) / (num_rows + 1)
    with pytest.raises(UserError, match=f"{num_broken + 1} of {num_rows + 1} samples are unusable.*max_bad_fraction"):
        build_dataset(config_of(**options, max_bad_fraction=limit), *tiny_mllm)


def test_samples_that_are_too_long_are_reported_without_an_error(tiny_mllm, config_of, tmp_path, scene_folder, caplog):
    rows = json.loads((scene_folder / "train" / "finetune.json").read_text())
    long = {"id": "long", "conversations": [{"from": "human", "value": "a " * 900}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "data.json").write_text(json.dumps([*rows, long]))
    config = config_of(data_path=[str(tmp_path / "data.json")], model_max_length=300, max_bad_fraction=0.0)
    assert len(build_dataset(config, *tiny_mllm)) == len(rows)
    assert "(long)" in reported(config, "too_long_samples")[0]["sample"]
    assert "1 of" in caplog.text and "1 are left out" in caplog.text


def test_a_maximum_length_below_all_samples_is_an_error(tiny_mllm, config_of):
    with pytest.raises(UserError, match="none of .* samples fits model_max_length 2; raise it .an image takes 11"):
        build_dataset(config_of(model_max_length=2), *tiny_mllm)
