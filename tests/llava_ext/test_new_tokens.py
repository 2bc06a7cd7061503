"""Rows of the image tokens on a backbone without them: initial values, training, and every way to save them."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from stage_runs import run, run_forked, write_recipe

from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import Sample
from llava_ext.export.causal_lm import export_causal_lm
from llava_ext.model_folder import load_model
from llava_ext.new_tokens import ROWS_FILE, add_new_token_rows, initialize_new_rows, merge_new_token_rows
from llava_ext.processing_evotok_llava import IMAGE_TOKENS
from llava_ext.training.adapters import merge

STAGE_1 = {"tune_language_model": "false", "learning_rate": 1e-2}
LORA = {"lora_enable": "true", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-2}
EMBEDDINGS, OUTPUTS = "language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def backbone(request, foreign_backbone_folder, foreign_tokenizer_folder, make_backbone, tmp_path_factory):
    if request.param:
        return foreign_backbone_folder
    return make_backbone(
        foreign_tokenizer_folder, tmp_path_factory.mktemp("untied"), "llama", tie_word_embeddings=False
    )


@pytest.fixture(scope="module")
def recipe(backbone, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), backbone, tiny_evotok_folder, scene_folder)


@pytest.fixture(scope="module")
def start(backbone, tiny_evotok_folder):
    """Initial model of a run on the backbone, and its processor."""
    return assemble(backbone, tiny_evotok_folder, 32, 2, 2)


@pytest.fixture(scope="module")
def stage_1(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage_1"
    run_forked(run, recipe, output, {**STAGE_1, "weight_decay": 0.1, "max_steps": 40, "save_steps": 20})
    return output


def weights(folder):
    return load_file(folder / "model.safetensors")


def check_rows(found, start):
    """Check that the three rows are learned independently, and that all other rows are bit-identical."""
    model, processor = start
    new = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    tables = [EMBEDDINGS] if model.config.tie_word_embeddings else [EMBEDDINGS, OUTPUTS]
    for name in tables:
        before, after = model.state_dict()[name], found[name]
        others = torch.ones(len(before), dtype=torch.bool)
        others[new] = False
        assert torch.equal(before[others], after[others]), name
        learned = new[1:] if name == EMBEDDINGS and len(tables) == 2 else new  # the placeholder is never embedded
        for token in learned:
            assert not torch.equal(before[token], after[token]), (name, token)
        assert len(torch.unique(after[new], dim=0)) == 3
    assert not any("new_token_rows" in name for name in found)
    assert set(found) == set(model.state_dict()) - ({OUTPUTS} if len(tables) == 1 else set())


def test_the_backbone_has_no_image_tokens_and_pads_with_its_end_of_turn_token(start, foreign_backbone_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(foreign_backbone_folder)
    assert not set(IMAGE_TOKENS) & set(tokenizer.get_vocab()) and tokenizer.pad_token_id == tokenizer.eos_token_id
    assert start[0].get_input_embeddings().num_embeddings == len(tokenizer) + 3


# Initial values ----------------------------------------------------------------------------------------------


def test_new_rows_differ_and_are_near_the_mean_of_the_others():
    torch.manual_seed(0)
    table = torch.randn(20_000, 8) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) + 5
    before, new = table.clone(), [3, 9_000, 19_999]
    initialize_new_rows(table, new)
    others = torch.ones(len(table), dtype=torch.bool)
    others[new] = False
    assert torch.equal(table[others], before[others])
    distances = (table[new] - before[others].mean(dim=0)) / before[others].std(dim=0)
    assert distances.abs().max() < 0.5 and distances.std() > 0.02
    assert len(torch.unique(table[new], dim=0)) == 3
    again = before.clone()
    initialize_new_rows(again, new)
    assert torch.equal(again, table)


def test_new_tokens_are_unlikely_before_training(start):
    model, processor = start
    with torch.no_grad():
        chances = model(**processor.user_turns("What is it?")).logits[0, -1].softmax(dim=-1)
    new = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert chances[new].max() < 5 / len(chances) and len(torch.unique(chances[new])) == 3


# Separate rows -----------------------------------------------------------------------------------------------


def draw_sample(model, processor) -> Sample:
    vision = model.config.vision_config
    codes = torch.randint(
        vision.codebook_size, (vision.num_positions, vision.num_quantizers), generator=torch.Generator().manual_seed(0)
    )
    messages = [
        {"role": "user", "content": "<image>\nDraw it again."},
        {"role": "assistant", "content": "here: <image>"},
    ]
    encoded = processor.encode_conversation(messages, [None, codes])
    return Sample(encoded.input_ids, encoded.labels, [codes])


def test_separate_rows_give_the_losses_logits_and_gradients_of_rows_in_the_tables(backbone, tiny_evotok_folder):
    torch.manual_seed(0)
    model, processor = assemble(backbone, tiny_evotok_folder, 32, 2, 2)
    batch, new = Collator(processor)([draw_sample(model, processor)]), [model.config.image_token_id]
    new += [model.config.image_start_token_id, model.config.image_end_token_id]
    model.train()
    whole = model(**batch)
    tables = [model.get_input_embeddings().weight, model.lm_head.weight]
    expected = [gradient[new] for gradient in torch.autograd.grad(whole.loss, tables)]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    add_new_token_rows(model)
    for table in tables:
        table.requires_grad_(False)
    apart, rows = model(**batch), model.new_token_rows
    torch.testing.assert_close((apart.text_loss, apart.image_loss), (whole.text_loss, whole.image_loss))
    found = torch.autograd.grad(apart.loss, list(rows.parameters()))
    if model.config.tie_word_embeddings:
        expected = expected[:1]
    torch.testing.assert_close(list(found), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        rows.inputs[1] += 1
        moved = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        assert not torch.allclose(moved, logits)
        merge_new_token_rows(model)
        assert model.new_token_rows is None
        again = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        torch.testing.assert_close(again, moved)


def test_a_batch_without_new_tokens_still_reduces_their_gradients(backbone, tiny_evotok_folder):
    model, processor = assemble(backbone, tiny_evotok_folder, 32, 2, 2)
    add_new_token_rows(model)
    encoded = processor.encode_conversation(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], []
    )
    loss = model.train()(**Collator(processor)([Sample(encoded.input_ids, encoded.labels, [])])).loss
    found = torch.autograd.grad(loss, list(model.new_token_rows.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in found)


# Stage 1 -----------------------------------------------------------------------------------------------------


def test_stage_1_learns_the_rows_of_the_image_tokens_and_no_others(stage_1, start):
    found = weights(stage_1)
    check_rows(found, start)
    for name, tensor in start[0].state_dict().items():
        if name.startswith(("language_model.layers", "language_model.norm", "vision_tower.")):
            assert torch.equal(tensor, found[name]), name
    assert not (stage_1 / ROWS_FILE).exists()


def test_stage_1_learns_to_begin_a_drawing(stage_1, start):
    def chance(model, processor):
        """Mean probability of starting an image where the training samples start one."""
        chances = []
        for prompt in ("a red circle", "a photo of a blue square", "two green triangles"):
            logits = model(**processor.user_turns(prompt)).logits[0, -1]
            chances.append(float(F.softmax(logits, dim=-1)[model.config.image_start_token_id]))
        return sum(chances) / len(chances)

    with torch.no_grad():
        before, after = chance(*start), chance(*load_model(stage_1))
    assert before < 0.02 < 0.1 < after
    lines = [json.loads(line) for line in (stage_1 / "metrics.jsonl").read_text().splitlines()]
    texts = [line["text_loss"] for line in lines if "text_loss" in line]
    assert sum(texts[-8:]) < 0.9 * sum(texts[:8])


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_a_resumed_stage_1_equals_the_uninterrupted_one(recipe, tmp_path, engine):
    import shutil

    overrides = {**STAGE_1, "deepspeed": engine}
    run_forked(run, recipe, tmp_path / "whole", overrides)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_forked(run, recipe, tmp_path / "again", overrides)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "again")[name], tensor), name


def test_rows_are_resumed_in_their_training_precision(start, tmp_path):
    from llava_ext.new_tokens import load_rows, save_rows

    model = assemble_like(start)
    with torch.no_grad():
        model.new_token_rows.inputs += 1e-7
    save_rows(model, tmp_path, model.state_dict())
    expected = model.new_token_rows.inputs.clone()
    other = assemble_like(start)
    load_rows(other, tmp_path)
    assert torch.equal(other.new_token_rows.inputs, expected)
    with pytest.raises(UserError, match="cannot be read"):
        load_rows(other, tmp_path / "absent")


def assemble_like(start):
    import copy

    model = copy.deepcopy(start[0])
    add_new_token_rows(model)
    return model


@pytest.mark.parametrize("method", [STAGE_1, pytest.param(LORA, marks=pytest.mark.slow)], ids=["stage_1", "lora"])
def test_zero3_on_two_processes_gives_the_rows_of_zero2(recipe, start, tmp_path, method):
    for engine in ("zero2", "zero3"):
        overrides = {**method, "deepspeed": engine, "max_steps": 2}
        run_forked(run, recipe, tmp_path / engine, overrides, world_size=2)
    expected, found = weights(tmp_path / "zero2"), weights(tmp_path / "zero3")
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        # The first steps of Adam follow the sign of a gradient, and the sign of one near zero is rounding.
        differs = ~torch.isclose(found[name], tensor, atol=1e-5, rtol=1e-4)
        assert differs.float().mean() < 1e-3, f"{name}: {int(differs.sum())} of {differs.numel()}"
    check_rows(found, start)


def test_stage_2_continues_from_the_learned_rows(stage_1, recipe, tmp_path):
    overrides = {"model_name_or_path": str(stage_1), "max_steps": 1, "learning_rate": 1e-6}
    run_forked(run, recipe, tmp_path / "full", overrides)
    before, after = weights(stage_1)[EMBEDDINGS], weights(tmp_path / "full")[EMBEDDINGS]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert (after != before).any(dim=1).sum() > 3  # full training updates all rows that are used


# LoRA --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "lora"
    run_forked(run, recipe, output, LORA)
    return output


def test_lora_learns_the_rows_of_the_image_tokens_and_no_others(lora, start):
    check_rows(weights(lora), start)


def test_merge_reproduces_the_rows_of_the_lora_run(lora, backbone, tiny_evotok_folder, tmp_path):
    merge(backbone, lora / "adapter", tmp_path / "merged", tiny_evotok_folder)
    for name, tensor in weights(lora).items():
        assert torch.equal(tensor, weights(tmp_path / "merged")[name]), name


def test_peft_alone_loads_the_rows(lora, backbone, tiny_evotok_folder):
    from peft import PeftModel

    model, _ = assemble(backbone, tiny_evotok_folder, 32, 2, 2)
    merged = PeftModel.from_pretrained(model, lora / "adapter").merge_and_unload()
    expected = weights(lora)
    torch.testing.assert_close(merged.get_input_embeddings().weight.data, expected[EMBEDDINGS])
    torch.testing.assert_close(merged.lm_head.weight.data, expected.get(OUTPUTS, expected[EMBEDDINGS]))


def test_a_resumed_lora_run_equals_the_uninterrupted_one(lora, recipe, tmp_path):
    import shutil

    shutil.copytree(lora / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_forked(run, recipe, tmp_path / "again", LORA)
    for name, tensor in weights(lora).items():
        assert torch.equal(weights(tmp_path / "again")[name], tensor), name


def test_qlora_learns_the_rows_and_merge_puts_them_into_the_base(recipe, backbone, tiny_evotok_folder, start, tmp_path):
    run_forked(run, recipe, tmp_path / "run", {**LORA, "bits": 4, "max_steps": 2})
    merge(backbone, tmp_path / "run" / "adapter", tmp_path / "merged", tiny_evotok_folder)
    check_rows(weights(tmp_path / "merged"), start)


# The flat head -----------------------------------------------------------------------------------------------


def test_the_causal_lm_export_of_a_flat_model_contains_the_learned_rows(recipe, tmp_path):
    run_forked(run, recipe, tmp_path / "flat", {**STAGE_1, "image_head": "flat", "max_steps": 2})
    export_causal_lm(tmp_path / "flat", tmp_path / "causal")
    model, processor = load_model(tmp_path / "flat")
    exported = load_file(tmp_path / "causal" / "model.safetensors")
    new = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert torch.equal(exported["model.embed_tokens.weight"][new], model.get_input_embeddings().weight.data[new])
    assert torch.equal(exported["lm_head.weight"][new], model.lm_head.weight.data[new])


# Padding with the end-of-turn token --------------------------------------------------------------------------


def test_the_end_of_turn_token_is_learned_and_attended_even_if_it_is_also_the_padding(start):
    model, processor = start
    end = processor.tokenizer.eos_token_id
    assert processor.pad_id == end
    texts = ("ho", "a much longer answer to the same question")
    samples = []
    for text in texts:
        encoded = processor.encode_conversation(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], []
        )
        samples.append(Sample(encoded.input_ids, encoded.labels, []))
        assert int(encoded.labels[-1]) == end
    batch = Collator(processor)(samples)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sample.input_ids) for sample in samples]
    together, alone = model(**batch), [model(**Collator(processor)([sample])) for sample in samples]
    total = sum(one.text_loss * one.num_text_tokens for one in alone)
    torch.testing.assert_close(together.text_loss * together.num_text_tokens, total, atol=1e-4, rtol=1e-5)
    inputs = processor.user_turns(list(texts))
    lengths = [len(processor.user_turns(text)["input_ids"][0]) for text in texts]
    assert inputs["attention_mask"].sum(dim=1).tolist() == lengths
