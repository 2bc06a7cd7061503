"""The contract of transformers' models: keywords and outputs of `forward`, Auto classes, image features, `Trainer`."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Cache,
    Trainer,
    TrainingArguments,
)

from evotok_plugin.scenes.scene import render, sample_scene
from llava_ext import EvoTokLlavaForConditionalGeneration, EvoTokLlavaModel
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import Sample


def chat(rng, answer: str | None = "a ring", num_images: int = 1) -> list[dict]:
    images = [{"type": "image", "image": render(sample_scene(rng, "two_object"))} for _ in range(num_images)]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def encode(processor, chats):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.fixture
def batch(tiny_mllm, rng):
    """Two conversations of different lengths, the first with two images."""
    return encode(tiny_mllm[1], [chat(rng, num_images=2), chat(rng, "a red ring above a blue square")])


@pytest.fixture
def labels(tiny_mllm, batch):
    ids = batch["input_ids"]
    return ids.masked_fill((ids == tiny_mllm[0].config.image_token_id) | (batch["attention_mask"] == 0), -100)


# Losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_placeholders_and_padding_are_never_learned(tiny_mllm, batch, labels):
    model, _ = tiny_mllm
    assert int((batch["input_ids"] != labels).sum()) > 27  # 9 placeholders an image, and padding
    everything, masked = model(**batch, labels=batch["input_ids"]), model(**batch, labels=labels)
    assert torch.equal(everything.loss, masked.loss)
    assert everything.num_text_tokens == masked.num_text_tokens


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(tiny_mllm, batch, labels):
    model, _ = tiny_mllm
    output = model(**batch, labels=labels)
    starts = batch["attention_mask"].argmax(dim=1)
    wanted = labels.scatter(1, starts[:, None], -100)[:, 1:]  # nothing precedes the first token
    summed = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum")
    count = (wanted != -100).sum()
    torch.testing.assert_close(output.loss, summed / count)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=3 * count).loss, summed / count / 3)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=100).loss, summed / 100)


@torch.no_grad()
def test_num_items_in_batch_counts_every_residual_token(any_mllm):
    model, processor = any_mllm
    codes = torch.randint(0, model.vocabulary.codebook_size, (9, 8))
    messages = [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": "here: <image>"}]
    encoded = processor.encode_conversation(messages, [codes])
    inputs = Collator(processor)([Sample(encoded.input_ids, encoded.labels, [])])
    mean = model(**inputs)
    summed = model(**inputs, num_items_in_batch=1).loss
    count = int((inputs["labels"] != -100).sum())
    assert count == mean.num_text_tokens + 9 * 4
    torch.testing.assert_close(summed, mean.text_loss * mean.num_text_tokens + mean.image_loss * 9 * 4)


@pytest.mark.parametrize("training", [True, False])
def test_logits_come_with_the_loss_unless_they_are_skipped(any_mllm, training):
    model, processor = any_mllm
    inputs = processor(["hello", "a longer text"])
    model.train(training)
    try:
        with torch.no_grad():
            output = model(**inputs, labels=inputs["input_ids"])
            skipped = model(**inputs, labels=inputs["input_ids"], skip_logits=True)
    finally:
        model.eval()
    assert output.logits.shape == (*inputs["input_ids"].shape, model.config.text_config.vocab_size)
    assert skipped.logits is None and torch.equal(skipped.loss, output.loss)


# Keywords and outputs --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tuples_begin_like_those_of_transformers_models(tiny_mllm, batch):
    model, _ = tiny_mllm
    named = model(**batch, use_cache=True, output_hidden_states=True)
    logits, cache, hidden, *_ = model(**batch, use_cache=True, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, named.logits) and isinstance(cache, Cache)
    assert len(hidden) == model.config.text_config.num_hidden_layers + 1
    loss, logits, *_ = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert loss.ndim == 0 and logits.ndim == 3


@torch.no_grad()
def test_attentions_come_on_request(model_folder, batch):
    model = EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder, attn_implementation="eager").eval()
    output = model(**batch, output_attentions=True)
    steps = batch["input_ids"].shape[1]
    assert [tuple(one.shape[2:]) for one in output.attentions] == [(steps, steps)] * len(output.attentions)
    assert len(output.attentions) == model.config.text_config.num_hidden_layers


@torch.no_grad()
def test_token_types_of_other_models_are_accepted_and_unknown_keywords_are_not(tiny_mllm, batch):
    model, _ = tiny_mllm
    kinds = (batch["input_ids"] == model.config.image_token_id).long()
    assert torch.equal(model(**batch, mm_token_type_ids=kinds).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="unknown keyword 'pixel_value'; did you mean 'pixel_values'"):
        model(input_ids=batch["input_ids"], pixel_value=batch["pixel_values"])


@torch.no_grad()
def test_embeddings_with_labels_and_images_equal_tokens(any_mllm, rng):
    model, processor = any_mllm
    batch = encode(processor, [chat(rng, num_images=2), chat(rng, "a red ring")])
    ids = batch.pop("input_ids")
    expected = model(input_ids=ids, **batch, labels=ids)
    found = model(inputs_embeds=model.get_input_embeddings()(ids), **batch, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    if model.config.image_head == "depth":
        with pytest.raises(ValueError, match="labels of residual tokens need input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 32), labels=torch.full((1, 4), model.vocabulary.offset))


@torch.no_grad()
def test_generation_from_embeddings_equals_that_from_tokens(tiny_mllm, rng):
    model, processor = tiny_mllm
    inputs = processor.apply_chat_template(chat(rng, None), add_generation_prompt=True, tokenize=True)
    expected = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(**inputs, inputs_embeds=embeddings, max_new_tokens=6), expected)


# Classes and features --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_auto_classes_load_the_model_and_its_backbone(tiny_mllm, model_folder, batch):
    model, _ = tiny_mllm
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        assert isinstance(auto_class.from_pretrained(model_folder), EvoTokLlavaForConditionalGeneration)
    backbone = AutoModel.from_pretrained(model_folder).eval()
    assert type(backbone) is EvoTokLlavaModel and type(AutoModel.from_config(model.config)) is EvoTokLlavaModel
    output = backbone(**batch, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, model(**batch).last_hidden_state)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.image_hidden_states.shape == (3, 9, 32)
    assert not backbone.can_generate() and set(backbone.state_dict()) == set(model.state_dict()) - {"lm_head.weight"}


@torch.no_grad()
def test_image_features_are_a_model_output(tiny_mllm, batch):
    model, _ = tiny_mllm
    pixels = batch["pixel_values"]
    output = model.get_image_features(pixels, output_hidden_states=True)
    assert [tuple(one.shape) for one in output.pooler_output] == [(9, 32)] * 3
    assert torch.equal(torch.stack(list(output.pooler_output)), model.embed_read(pixels))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    features, pooled = model.get_image_features(pixel_values=pixels, return_dict=False)
    assert torch.equal(features, output.last_hidden_state) and torch.equal(pooled[1], output.pooler_output[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_language_model_and_pixels_of_it_give_the_same_features(
    tiny_mllm, model_folder, batch, dtype
):
    model, _ = tiny_mllm
    half = EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder, dtype=dtype)
    assert half.dtype == half.language_model.dtype == dtype and half.vision_tower.dtype == torch.float32
    pixels = batch["pixel_values"]
    assert not torch.equal(pixels.to(dtype).float(), pixels)
    assert torch.equal(model.embed_read(pixels.to(dtype)), model.embed_read(pixels))
    between = pixels + 0.3 / 127.5  # not the rounding of an 8-bit level in every pixel
    rounded = between.to(dtype)
    assert torch.equal(model.embed_read(rounded.float().clone()), model.embed_read(rounded)) or dtype == torch.bfloat16


# Trainer ---------------------------------------------------------------------------------------------------------


def test_trainer_evaluates_on_logits(tiny_mllm, model_folder, rng, tmp_path):
    _, processor = tiny_mllm
    chats = [chat(rng), chat(rng, "a red ring"), chat(rng, "a blue square", num_images=2)]

    def collate(messages):
        batch = encode(processor, messages)
        return batch | {"labels": batch["input_ids"]}

    seen = {}

    def metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"seen": 1.0}

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder)
    trainer = Trainer(model, settings, collate, train_dataset=chats, eval_dataset=chats, compute_metrics=metrics)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = model.eval()(**encode(processor, chats)).logits
    torch.testing.assert_close(torch.from_numpy(seen["logits"]), expected)
    assert seen["labels"].shape == seen["logits"].shape[:2]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
