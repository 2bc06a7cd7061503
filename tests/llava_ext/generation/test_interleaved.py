"""Answers with text and images, compared with a naive loop without a cache or a batch."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin import SamplingOptions, uniform_noise
from evotok_plugin.errors import UserError
from llava_ext.generation import (
    AnswerOptions,
    DrawingOptions,
    Finished,
    ImageDrawn,
    ImagePreview,
    ImageStarted,
    TextDelta,
)

ASKED = ["a photo of a ring", "What is a circle? And then, what is a square?", "draw"]


class BiasedLayer(torch.nn.Module):
    """An output layer that adds a bias to the logits."""

    def __init__(self, layer, bias):
        super().__init__()
        self.weight, self.bias = layer.weight, torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight) + self.bias


@pytest.fixture(scope="module")
def talker(tiny_mllm):
    """A model that often starts an image and never ends an answer by itself."""
    model, processor = tiny_mllm
    model = copy.deepcopy(model)
    spread = model.lm_head.weight.norm(dim=1).mean()
    bias = torch.randn(model.lm_head.weight.shape[0], generator=torch.Generator().manual_seed(5)) * spread
    bias[processor.image_start_id] = 4.1 * spread
    bias[model.generation_config.eos_token_id] = -1e9
    model.lm_head = BiasedLayer(model.lm_head, bias)
    return model.eval(), processor


def asked(processor, texts, images=None):
    return processor.user_turns(texts, images=images)


def answer(model, processor, inputs, **options):
    return model.generate(**inputs, modalities=options.pop("modalities", "auto"), processor=processor, **options)


def hidden_after(model, ids, pixel_values=None, drawn=()):
    """Hidden state (1, D) after ids (T,) and the first positions of an image, a list of codes (1, L)."""
    embeddings, _ = model.embed_prompt(ids[None], torch.ones_like(ids)[None], pixel_values)
    if drawn:
        written = model.embed_written(torch.cat(drawn), torch.arange(len(drawn)))
        embeddings = torch.cat([embeddings, written[None]], dim=1)
    return model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1]


def naive_image(model, processor, ids, drawing, seed, pixel_values=None):
    """The residual ids of an image that follows ids (T,)."""
    drawing = drawing.completed()
    unprompted = processor.drawing_prompts([drawing.negative_prompt])["input_ids"][0]
    codebooks, drawn = model.vision_tower.quantizer.codebooks, []
    for place, noise in enumerate(uniform_noise(seed, 9, 4)):
        hidden = hidden_after(model, ids, pixel_values, drawn)
        if drawing.guided:
            hidden = torch.cat([hidden, hidden_after(model, unprompted, None, drawn)])
        scales, rescale = [drawing.scale_at(place, 9, level) for level in range(4)], drawing.guidance_rescale
        sample = model.image_head.sample(hidden, codebooks, noise[None], drawing.sampling, scales, None, rescale)
        drawn.append(sample)
    return processor.vocabulary.to_ids(torch.cat(drawn)).flatten()


def naive(model, processor, ids, drawing, max_new_tokens, max_images, seed):
    """The same answer step by step, with everything recomputed in each step."""
    prompt, count, images = ids, 0, 0
    while count < max_new_tokens:
        logits = model.lm_head(hidden_after(model, ids))[0]
        logits[[processor.image_token_id, processor.image_end_id]] = -torch.inf
        if images == max_images:
            logits[processor.image_start_id] = -torch.inf
        token = logits.argmax()[None]
        ids = torch.cat([ids, token])
        if token != processor.image_start_id:
            count += 1
            continue
        image = naive_image(model, processor, ids, drawing, seed + images)
        ids = torch.cat([ids, image, torch.tensor([processor.image_end_id])])
        images += 1
    return ids[len(prompt) :]


DRAWINGS = {
    "plain": DrawingOptions(guidance_scale=1.0),
    "guided": DrawingOptions(guidance_scale=4.0, sampling=SamplingOptions(top_k=9)),
    "limited": DrawingOptions((5.0, 3.0, 1.0, 1.0), guidance_interval=(0.2, 0.6), guidance_rescale=0.5),
    "away": DrawingOptions(4.0, "cosine", "a long description of things that are not to be seen at all, none of them"),
}


@torch.no_grad()
@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_a_batch_equals_the_naive_loop(talker, drawing):
    model, processor = talker
    inputs = asked(processor, ASKED)
    ids = answer(model, processor, inputs, drawing=drawing, max_new_tokens=6, max_images=2, seed=[3, 5, 9])
    seen = set()
    for row, seed in enumerate([3, 5, 9]):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        expected = naive(model, processor, prompt, drawing, 6, 2, seed)
        written = ids[row, inputs["input_ids"].shape[1] :]
        assert written[: len(expected)].tolist() == expected.tolist()
        assert (written[len(expected) :] == processor.pad_id).all()
        seen.add(tuple((expected == processor.image_start_id).nonzero().flatten().tolist()))
    assert len(seen) > 1 and all(len(starts) == 2 for starts in seen)  # the rows did not draw in the same steps


def test_rows_one_step_apart_draw_as_single_rows(talker):
    """With sampled texts, images of the rows start at many different steps."""
    model, processor = talker
    settings = {"do_sample": True, "temperature": 0.03, "max_new_tokens": 8, "max_images": 2}
    texts = [ASKED[row % 3] for row in range(8)]
    inputs = asked(processor, texts)
    ids = answer(model, processor, inputs, seed=list(range(8)), **settings)[:, inputs["input_ids"].shape[1] :]
    starts = [(row == processor.image_start_id).nonzero().flatten().tolist() for row in ids]
    assert any(abs(a - b) == 1 for one in starts for other in starts for a in one for b in other)
    for row, text in enumerate(texts):
        alone = asked(processor, text)
        expected = answer(model, processor, alone, seed=row, **settings)[0, alone["input_ids"].shape[1] :]
        assert ids[row, : len(expected)].tolist() == expected.tolist()


def test_rows_have_the_same_room_as_single_rows(talker, monkeypatch):
    model, processor = talker
    inputs = asked(processor, ASKED)
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", longest + 14)
    ids = answer(model, processor, inputs, max_new_tokens=40, max_images=1)[:, inputs["input_ids"].shape[1] :]
    for row, text in enumerate(ASKED):
        alone = asked(processor, text)
        expected = answer(model, processor, alone, seed=row, max_new_tokens=40, max_images=1)
        expected = expected[0, alone["input_ids"].shape[1] :]
        assert ids[row, : len(expected)].tolist() == expected.tolist()
        assert (ids[row, len(expected) :] == processor.pad_id).all()


def test_prompts_of_equal_length_with_images_in_some_equal_single_rows(talker):
    """Padding that only folding causes is on the left, like all other padding of prompts."""
    model, processor = talker
    drawn = processor.vocabulary.to_ids(torch.zeros(9, 4, dtype=torch.long)).flatten()
    before = processor.user_turns("draw")["input_ids"][0]
    first = torch.cat([before, torch.tensor([processor.image_start_id]), drawn, torch.tensor([processor.image_end_id])])
    ids = torch.stack([first, torch.full_like(first, 9)])
    together = answer(model, processor, {"input_ids": ids}, max_new_tokens=5, max_images=0)
    for row in range(2):
        alone = answer(model, processor, {"input_ids": ids[row : row + 1]}, max_new_tokens=5, max_images=0)
        assert torch.equal(together[row], alone[0])


@torch.no_grad()
def test_an_image_can_be_drawn_after_one_in_the_prompt(talker):
    model, processor = talker
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    inputs = asked(processor, "<image>\nDraw it again.", [picture])
    drawing = DRAWINGS["guided"]
    ids = answer(model, processor, inputs, modalities="image", drawing=drawing, seed=2)[0]
    written = ids[inputs["input_ids"].shape[1] :]
    start = torch.cat([inputs["input_ids"][0], torch.tensor([processor.image_start_id])])
    forced = naive_image(model, processor, start, drawing, 2, inputs["pixel_values"]).tolist()
    assert written.tolist() == [processor.image_start_id, *forced, processor.image_end_id]


def test_an_image_equals_that_of_generate_images(talker):
    model, processor = talker
    inputs = asked(processor, ASKED[0])
    events = list(model.stream(inputs, processor, AnswerOptions(image_first=True), seed=11))
    drawn = next(event for event in events if isinstance(event, ImageDrawn))
    (expected,) = model.generate_images(ASKED[0], processor, seed=11)
    np.testing.assert_allclose(np.asarray(drawn.image, int), np.asarray(expected, int), atol=1)


def test_events_are_complete_and_in_order(talker):
    model, processor = talker
    options = AnswerOptions(max_new_tokens=5, max_images=2, preview_every=4)
    events = list(model.stream(asked(processor, ASKED[0]), processor, options))
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    image = [ImageStarted, ImagePreview, ImagePreview, ImageDrawn]
    assert kinds == [*image, *image, Finished]
    ids = events[-1].ids
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text == processor.decode(ids, skip_special_tokens=True)
    assert [event.positions for event in events if isinstance(event, ImagePreview)] == [4, 8, 4, 8]


def test_the_parts_of_an_answer_can_be_part_of_the_next_prompt(talker):
    model, processor = talker
    inputs = asked(processor, ASKED[0])
    ids = answer(model, processor, inputs, max_new_tokens=4, max_images=1)[0, inputs["input_ids"].shape[1] :]
    parts = processor.decode(ids, images_from=model.vision_tower)
    assert sorted({part["type"] for part in parts}) == ["image", "text"]
    history = [
        {"role": "user", "content": ASKED[0]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "What is it?"},
    ]
    again = processor.apply_chat_template(history, add_generation_prompt=True, tokenize=True)
    assert again["pixel_values"].shape[0] == 1 and (again["input_ids"] == processor.image_token_id).sum() == 9
    assert answer(model, processor, again, max_new_tokens=2, max_images=0).shape[1] == again["input_ids"].shape[1] + 2


def test_text_without_images_equals_that_of_transformers(talker):
    model, processor = talker
    inputs = asked(processor, ASKED)
    expected = model.generate(
        **inputs, max_new_tokens=6, do_sample=False,
        suppress_tokens=[processor.image_start_id, processor.image_end_id, processor.image_token_id],
    )  # fmt: skip
    assert torch.equal(answer(model, processor, inputs, max_new_tokens=6, max_images=0), expected)


def test_an_answer_ends_with_the_models_end_token(talker):
    model, processor = talker
    inputs, start = asked(processor, ASKED[0]), asked(processor, ASKED[0])["input_ids"].shape[1]
    ids = answer(model, processor, inputs, max_new_tokens=8, max_images=0)[0, start:]
    ending = int(ids[3])
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [ending]
    try:
        cut = answer(model, processor, inputs, max_new_tokens=8, max_images=0)[0, start:]
    finally:
        model.generation_config.eos_token_id = before
    assert cut.tolist() == ids[: ids.tolist().index(ending) + 1].tolist()


def test_sampled_text_depends_only_on_its_seed(talker):
    model, processor = talker
    settings = {"do_sample": True, "max_new_tokens": 6, "max_images": 0}
    inputs = asked(processor, ASKED)
    together = answer(model, processor, inputs, seed=[1, 2, 3], **settings)[:, inputs["input_ids"].shape[1] :]
    alone = asked(processor, ASKED[1])
    one = answer(model, processor, alone, seed=2, **settings)[0, alone["input_ids"].shape[1] :]
    assert torch.equal(together[1], one)
    assert not torch.equal(one, answer(model, processor, alone, seed=7, **settings)[0, alone["input_ids"].shape[1] :])


def test_generation_continues_after_a_drawn_image_in_the_prompt(talker):
    """The ids of an answer, residual tokens included, can be a prompt."""
    model, processor = talker
    inputs = asked(processor, ASKED[0])
    whole = answer(model, processor, inputs, max_new_tokens=6, max_images=1)
    half = whole[:, : whole[0].tolist().index(processor.image_end_id) + 1]
    done = half.shape[1] - inputs["input_ids"].shape[1] - 38  # text tokens before the image
    assert torch.equal(answer(model, processor, {"input_ids": half}, max_new_tokens=6 - done, max_images=0), whole)
    with pytest.raises(UserError, match='modalities="auto"'):
        model.generate(half, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": "video"}, "expected 'text', 'image' or 'auto', got 'video'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_images": -1}, "max_images must be at least 0"),
        ({"num_beams": 4}, "does not take num_beams"),
        ({"seed": [1, 2]}, "2 seeds for 1 .one per conversation"),
        ({"drawing": DrawingOptions(sampling=SamplingOptions(top_k=[1, 2]))}, "top_k has 2 values, but 4 levels"),
    ],
)
def test_bad_settings_are_rejected(talker, settings, message):
    model, processor = talker
    with pytest.raises(UserError, match=message):
        answer(model, processor, asked(processor, "draw"), **settings)


def test_a_conversation_longer_than_the_context_is_rejected(talker):
    model, processor = talker
    limit = model.config.text_config.max_position_embeddings
    inputs = {"input_ids": torch.full((1, limit), 7)}
    with pytest.raises(UserError, match=f"language model has {limit} positions; shorten the prompt"):
        answer(model, processor, inputs)


def test_an_incomplete_image_is_rejected(talker):
    model, processor = talker
    ids = processor.vocabulary.to_ids(torch.zeros(9, 4, dtype=torch.long)).flatten()
    with pytest.raises(ValueError, match="9 positions with levels 0 to 3 each, got 35 residual tokens"):
        processor.decode(ids[:-1], images_from=model.vision_tower)
    with pytest.raises(ValueError, match="was it truncated"):
        processor.decode(ids.flip(0), images_from=model.vision_tower)
