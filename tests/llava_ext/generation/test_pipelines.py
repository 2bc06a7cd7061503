"""transformers' pipelines on a saved model, and image generation in the form that they ask for."""

import pytest
import torch
from transformers import pipeline

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.scene import render, sample_scene


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def pipe(request, model_folder):
    return pipeline(request.param, model=str(model_folder), max_new_tokens=4)


@pytest.fixture
def picture(rng):
    return render(sample_scene(rng, "two_object"))


def chat(picture, *more):
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}, *more]


def test_chats_are_answered_alone_and_together(pipe, tiny_mllm, picture):
    model, processor = tiny_mllm
    inputs = processor.apply_chat_template(chat(picture), add_generation_prompt=True, tokenize=True)
    ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True)
    assert pipe(text=chat(picture), return_full_text=False)[0]["generated_text"] == expected
    answered = pipe(text=chat(picture))[0]["generated_text"][-1]
    assert answered == {"role": "assistant", "content": expected}
    both = pipe(text=[chat(picture), chat(picture)], batch_size=2, return_full_text=False)
    assert [one[0]["generated_text"] for one in both] == [expected, expected]
    copies = pipe(text=chat(picture), generate_kwargs={"num_return_sequences": 2, "do_sample": True})
    assert len(copies) == 2


def test_texts_with_images_are_answered(pipe, picture):
    alone = pipe(text="<image>\nWhat is it?", images=picture)
    assert alone[0]["generated_text"].startswith("<image>\nWhat is it?")
    both = pipe(text=["<image>\nWhat is it?"] * 2, images=[picture, picture])
    assert [one[0]["generated_text"] if isinstance(one, list) else one["generated_text"] for one in both] == [
        alone[0]["generated_text"]
    ] * 2
    assert pipe(text="hello")[0]["generated_text"].startswith("hello")
    assert pipe(text="hello", return_tensors=True)[0]["generated_token_ids"].ndim == 1


def test_a_started_answer_is_continued_and_stop_strings_end_it(pipe, picture):
    started = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    answer = pipe(text=chat(picture, started))[0]["generated_text"][-1]
    assert answer["content"][0]["text"].startswith("It is")
    assert pipe(text=chat(picture), stop_sequence="zzz")


def test_generation_mode_draws_an_image_with_the_processor_of_the_folder(model_folder, tiny_mllm):
    from llava_ext import EvoTokLlavaForConditionalGeneration

    _, processor = tiny_mllm
    model = EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder)
    inputs = processor(["a ring", "a longer text of a ring"])
    ids = model.generate(**inputs, generation_mode="image", seed=5)
    assert torch.equal(ids, model.generate(**inputs, modalities="image", processor=processor, seed=5))
    pixels = model.decode_image_tokens(ids)
    assert pixels.shape == (2, 3, 48, 48)
    parts = processor.decode(ids, images_from=model.vision_tower)
    pixels = torch.cat([model.decode_image_tokens(row[None]) for row in ids])  # the rounding of a batch differs
    assert processor.image_processor.to_pil(pixels) == [
        part["image"] for row in parts for part in row if "image" in part
    ]
    with pytest.raises(UserError, match=r"rows \[0, 1\] contain no whole drawn image"):
        model.decode_image_tokens(inputs["input_ids"])
    with pytest.raises(UserError, match="generation_mode='image' and modalities='auto' differ"):
        model.generate(**inputs, generation_mode="image", modalities="auto")
