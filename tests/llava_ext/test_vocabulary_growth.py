"""Tokens added to a model, processors of another model, and sequences longer than the positions."""

import copy
import json

import pytest
import torch
from stage_runs import run, run_forked, write_recipe

from evotok_plugin.errors import UserError
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor
from llava_ext.assembly import assemble
from llava_ext.generation import AnswerOptions
from llava_ext.model_folder import load_model

IN_THE_RANGE = r"tokens in the range .* the first is '<loc1>' with id .* model.resize_token_embeddings"


@pytest.fixture
def grown(any_mllm):
    """A copy of a model and its processor with an additional token in the tokenizer."""
    model, processor = (copy.deepcopy(part) for part in any_mllm)
    processor.tokenizer.add_tokens(["<loc1>"])
    return model, processor


def test_every_use_rejects_a_tokenizer_with_tokens_in_the_residual_range(grown, tmp_path):
    model, processor = grown
    for use in (
        lambda: processor.user_turns("a <loc1>"),
        lambda: processor.drawing_prompts(["a"]),
        lambda: processor.lay_out([{"role": "user", "content": "a"}]),
        lambda: processor.decode([1]),
        lambda: processor.save_pretrained(tmp_path),
        lambda: model.generate_images("a", processor),
    ):
        with pytest.raises(UserError, match=IN_THE_RANGE):
            use()


def test_loading_rejects_a_folder_whose_tokenizer_grew(tiny_mllm, tmp_path):
    model, processor = tiny_mllm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<loc1>"])
    tokenizer.save_pretrained(tmp_path)
    for load in (EvoTokLlavaProcessor.from_pretrained, load_model):
        with pytest.raises(UserError, match=IN_THE_RANGE):
            load(tmp_path)


def test_residual_tokens_move_after_added_tokens(grown, any_mllm, tmp_path):
    model, processor = grown
    before, old = any_mllm
    with torch.no_grad():
        expected = before.generate_images("a ring", old, seed=3, output_type="pt")
        logits = before(**old.user_turns("a ring")).logits
    rows = len(processor.tokenizer)
    model.resize_token_embeddings(rows)
    assert model.config.residual_token_offset == rows == model.vocabulary.offset
    with pytest.raises(UserError, match="tokens in the range"):
        processor.user_turns("a")
    processor.residual_token_offset = model.config.residual_token_offset
    inputs = processor.user_turns("a ring <loc1>")
    assert processor.decode(inputs["input_ids"][0]) == "<|user|>a ring <loc1><|assistant|>"
    assert rows - 1 in inputs["input_ids"]
    model.generate(**inputs, max_new_tokens=2)
    drawn = model.generate_images("a ring", processor, seed=3, output_type="pt")
    torch.testing.assert_close(drawn, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**processor.user_turns("a ring")).logits[..., : rows - 1], logits)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_model(tmp_path)
    assert again.vocabulary == loaded.vocabulary == model.vocabulary
    assert torch.equal(again.user_turns("a <loc1>")["input_ids"], processor.user_turns("a <loc1>")["input_ids"])
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_padding_the_rows_to_a_multiple_also_moves_the_residual_tokens(grown):
    model, processor = grown
    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    assert model.config.residual_token_offset == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size
    assert model.config.residual_token_offset % 64 == 0
    with pytest.raises(ValueError, match="the image tokens need"):
        model.resize_token_embeddings(3)


def test_a_resize_that_fits_before_the_residual_tokens_does_not_move_them(tiny_mllm):
    model = copy.deepcopy(tiny_mllm[0])
    model.config.residual_token_offset += 10
    offset = model.config.residual_token_offset
    model.resize_token_embeddings(offset - 2)
    assert model.config.residual_token_offset == offset


# Processors of another model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residual_token_offset", 5000),
        ("num_positions", 16),
        ("num_levels", 3),
        ("codebook_size", 64),
        ("image_head", "flat"),
    ],
)
def test_a_processor_of_another_model_is_rejected(tiny_mllm, name, value):
    model, processor = tiny_mllm
    other = copy.deepcopy(processor)
    inputs = processor.user_turns("a ring")
    setattr(other, name, value)
    for use in (
        lambda: model.generate_images("a ring", other),
        lambda: list(model.stream(inputs, other, AnswerOptions(max_new_tokens=1))),
        lambda: model.generate(**inputs, modalities="auto", processor=other),
    ):
        with pytest.raises(UserError, match=f"model and processor differ: {name} is .* and {value} in the processor"):
            use()


def test_images_of_another_size_and_tokens_without_rows_are_rejected(tiny_mllm):
    model, processor = tiny_mllm
    other = copy.deepcopy(processor)
    other.image_processor.size = 96
    with pytest.raises(UserError, match="images of 48 pixels, the processor makes images of 96"):
        model.config.check_processor(other)
    config = copy.deepcopy(model.config)
    config.residual_token_offset = 5000
    other = copy.deepcopy(processor)
    other.residual_token_offset = 5000
    other.tokenizer.add_tokens(["<loc1>"])
    with pytest.raises(UserError, match="call model.resize_token_embeddings"):
        config.check_processor(other)


# Positions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(tiny_tokenizer_folder, tiny_evotok_folder, make_backbone, tmp_path):
    """Folder of a backbone with 64 positions."""
    return make_backbone(tiny_tokenizer_folder, tmp_path / "short", max_position_embeddings=64)


def test_a_sequence_beyond_the_positions_is_rejected_and_padding_does_not_count(short, tiny_evotok_folder):
    model, processor = assemble(short, tiny_evotok_folder, 32, 2, 2)
    model.eval()
    ids = torch.full((1, 65), 60)
    for more in ({}, {"labels": ids}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(UserError, match="takes 65 steps, but the language model has 64 positions"):
            model(input_ids=ids, **more)
    assert model(input_ids=ids[:, :64]).logits.shape[1] == 64
    mask = torch.ones_like(ids)
    mask[:, 60:] = 0
    model(input_ids=ids, attention_mask=mask)
    packed = torch.arange(65)[None] // 33 + 1
    model(input_ids=ids, segment_ids=packed, labels=ids)
    with pytest.raises(UserError, match="has 64 positions"):
        model(input_ids=ids, segment_ids=torch.ones_like(ids), labels=ids)
    first = model(input_ids=ids[:, :64], use_cache=True)
    with pytest.raises(UserError, match="takes 65 steps"):
        model(input_ids=ids[:, :1], past_key_values=first.past_key_values)


def test_a_language_model_without_a_limit_accepts_any_length():
    config = EvoTokLlavaConfig(text_config={"model_type": "bloom"})
    assert config.max_positions is None
    config.check_length(10**9)


def test_assembly_rejects_an_image_that_does_not_fit(
    tiny_tokenizer_folder, tiny_evotok_folder, make_backbone, tmp_path
):
    tiny = make_backbone(tiny_tokenizer_folder, tmp_path, max_position_embeddings=10)
    with pytest.raises(UserError, match="an image takes 11 steps .* has 10 positions"):
        assemble(tiny, tiny_evotok_folder, 32, 2, 2)


def test_training_longer_than_the_positions_stops_before_any_work(short, tiny_evotok_folder, tmp_path, scene_folder):
    recipe = write_recipe(tmp_path, short, tiny_evotok_folder, scene_folder)
    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match="model_max_length 512 is more than the 64 positions"):
        run_forked(run, recipe, output, {"model_max_length": 512})
    assert not output.exists()


def test_training_with_a_grown_tokenizer_stops(tiny_mllm, tiny_evotok_folder, tmp_path, scene_folder):
    folder = tmp_path / "model"
    for part in tiny_mllm:
        part.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["residual_token_offset"] += 7
    (folder / "processor_config.json").write_text(json.dumps(settings))
    recipe = write_recipe(tmp_path, folder, tiny_evotok_folder, scene_folder)
    with pytest.raises(RuntimeError, match="model and processor differ: residual_token_offset"):
        run_forked(run, recipe, tmp_path / "out")
    assert isinstance(tiny_mllm[0], EvoTokLlavaForConditionalGeneration)
