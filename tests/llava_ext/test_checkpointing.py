import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ext.checkpointing import assemble, load_model
from llava_ext.cli import main
from llava_ext.data.code_cache import CodeCache, write_code_cache
from llava_ext.data.dataset import Collator, ConversationDataset, ModalityGroupedSampler
from llava_ext.data.records import BadSamples, load_records
from llava_ext.processing_evotok_llava import IMAGE_TOKENS


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_mllm
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_new_tokens_start_from_the_mean_of_all_others(tiny_backbone_folder, tiny_mllm):
    model, processor = tiny_mllm
    ids = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    weight = model.get_input_embeddings().weight
    others = torch.ones(len(weight), dtype=torch.bool)
    others[ids] = False
    torch.testing.assert_close(weight[ids], weight[others].mean(0).expand(3, -1))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, tiny_backbone_folder, tiny_evotok_folder):
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="holds a qwen2 model, expected evotok_llava"):
        load_model(tiny_backbone_folder)
    with pytest.raises(ValueError, match="no EvoTok tokenizer"):
        assemble(tiny_backbone_folder, tiny_backbone_folder, 32, 2, 2)


def test_weights_that_are_missing_or_of_another_shape_are_errors(model_folder, tmp_path):
    for damage in ("drop", "shape"):
        folder = tmp_path / damage
        shutil.copytree(model_folder, folder)
        weights = load_file(folder / "model.safetensors")
        name = "image_head.from_hidden.weight"
        if damage == "drop":
            weights.pop(name)
        else:
            weights[name] = torch.zeros(7, 7)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="image_head.from_hidden.weight|cannot be loaded"):
            load_model(folder)


def test_draw_writes_images_and_a_grid(model_folder, tmp_path, capsys):
    assert (
        main(["draw", "a photo of a ring", "-n", "2", "-o", str(tmp_path), "--model", str(model_folder), "--seed", "3"])
        == 0
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a_photo_of_a_ring_grid.png", "a_photo_of_a_ring_seed3.png", "a_photo_of_a_ring_seed4.png"]
    assert str(tmp_path / names[0]) in capsys.readouterr().out


def test_chat_answers_about_an_image(model_folder, scene_folder, capsys):
    image = next((scene_folder / "val" / "images").iterdir())
    assert (
        main(["chat", "What is it?", "--image", str(image), "--model", str(model_folder), "--max_new_tokens", "3"]) == 0
    )
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "x", "--image", "absent.png"], "'absent.png' does not exist"),
        (["draw", "x", "--model", "nowhere"], "'nowhere' does not exist"),
        (["draw", " "], "prompt"),
        (["draw", "x", "--guidance_scale", "0"], "guidance_scale must be at least 1"),
    ],
)
def test_cli_errors_are_one_line(arguments, message, model_folder, capsys):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model_folder)]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.fixture(scope="module")
def cache_folder(tiny_mllm, scene_folder, tmp_path_factory):
    model, processor = tiny_mllm
    folder, root = tmp_path_factory.mktemp("cache"), scene_folder / "train"
    names = sorted(f"images/{path.name}" for path in (root / "images").iterdir())
    write_code_cache(folder, root, names, model.vision_tower, processor.image_processor, 5, show_progress=False)
    return folder


def test_the_code_cache_holds_the_tokenizer_s_codes(tiny_mllm, scene_folder, cache_folder):
    from PIL import Image

    model, processor = tiny_mllm
    cache = CodeCache(cache_folder, model.vision_tower.fingerprint())
    assert len(cache) == 24
    pixels = processor.image_processor(Image.open(scene_folder / "train" / "images/000007.png")).pixel_values
    assert torch.equal(cache.codes("images/000007.png"), model.vision_tower.encode(pixels).codes[0])
    with pytest.raises(ValueError, match="made by tokenizer"):
        CodeCache(cache_folder, "another tokenizer")


def dataset_of(tiny_mllm, scene_folder, cache_folder, **options):
    model, processor = tiny_mllm
    records = load_records([scene_folder / "train" / "finetune.json"], scene_folder / "train", BadSamples(None))
    return ConversationDataset(records, processor, CodeCache(cache_folder, model.vision_tower.fingerprint()), **options)


def test_prompt_dropout_empties_the_user_turn_of_drawing_samples(tiny_mllm, scene_folder, cache_folder):
    _, processor = tiny_mllm
    always = dataset_of(tiny_mllm, scene_folder, cache_folder, prompt_dropout=0.999)
    unconditional = processor.drawing_prompts([""])["input_ids"][0]
    kinds = [record.kind for record in always.records]
    drawn = always[kinds.index("draw")].input_ids
    assert torch.equal(drawn[: len(unconditional)], unconditional)
    never = dataset_of(tiny_mllm, scene_folder, cache_folder, prompt_dropout=0.0)
    reading = kinds.index("read")
    assert torch.equal(always[reading].input_ids, never[reading].input_ids)
    assert len(never[kinds.index("draw")].input_ids) > len(drawn)
    half = dataset_of(tiny_mllm, scene_folder, cache_folder, prompt_dropout=0.5)
    first = [len(half[i].input_ids) for i in range(len(half))]
    half.set_epoch(1)
    assert first != [len(half[i].input_ids) for i in range(len(half))]


def test_truncation_never_cuts_an_image(tiny_mllm, scene_folder, cache_folder):
    model, processor = tiny_mllm
    for length in (10, 30, 60, 100):
        dataset = dataset_of(tiny_mllm, scene_folder, cache_folder, max_length=length, prompt_dropout=0.0)
        samples = [dataset[i] for i in range(8)]
        assert all(len(sample.input_ids) <= length for sample in samples)
        assert torch.isfinite(model(**Collator(processor)(samples)).loss)


def test_grouped_batches_hold_one_kind_and_every_sample_once():
    kinds = ["read"] * 10 + ["draw"] * 7 + ["text"] * 4
    sampler = ModalityGroupedSampler(kinds, batch_size=3, seed=1, epoch_of=lambda: 0)
    order = list(sampler)
    assert sorted(order) == list(range(21)) and order == list(sampler)
    for start in range(0, 18, 3):
        assert len({kinds[i] for i in order[start : start + 3]}) == 1
    assert order != list(ModalityGroupedSampler(kinds, 3, seed=1, epoch_of=lambda: 1))


def test_saved_files_name_no_path_of_this_machine(model_folder):
    for file in model_folder.glob("*.json"):
        assert str(model_folder.parent.parent) not in file.read_text(), file.name
