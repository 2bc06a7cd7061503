"""Answers that are one image, selected among candidates, compared with candidates that are drawn one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.generation import (
    AnswerOptions,
    Finished,
    ImageDrawn,
    ImagePreview,
    ImageStarted,
    PromptReader,
    best_answers,
)
from llava_ext.generation.selection import candidate_seed

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]
ONE_IMAGE = AnswerOptions(image_first=True)


def drawn_in(events):
    return [event for event in events if isinstance(event, ImageDrawn)]


def test_an_answer_is_the_image_that_generate_images_selects(any_mllm):
    model, processor = any_mllm
    choices = []
    model.generate_images(PROMPTS, processor, seed=[11, 5], best_of=4, on_choice=choices.extend)
    inputs = processor.user_turns(PROMPTS)
    options = AnswerOptions(image_first=True, best_of=4)
    drawn = drawn_in(model.stream(inputs, processor, options, seed=[11, 5], prompts=PROMPTS))
    assert [event.row for event in drawn] == [0, 1]
    assert [event.choice.candidate for event in drawn] == [one.candidate for one in choices]
    assert all(torch.equal(event.codes, one.codes) for event, one in zip(drawn, choices, strict=True))
    arguments = {**inputs, "processor": processor, "seed": [11, 5], "prompts": PROMPTS}
    ids = model.generate(**arguments, modalities="image", best_of=4)[:, inputs["input_ids"].shape[1] :]
    expected = [processor.vocabulary.to_ids(one.codes).flatten() for one in choices]
    assert torch.equal(ids[:, 1:-1], torch.stack(expected))


def test_candidates_see_the_images_of_their_conversation(tiny_mllm, monkeypatch):
    monkeypatch.setattr(best_answers, "_CANDIDATES_PER_BATCH", 2)
    model, processor = tiny_mllm
    red, blue = (Image.new("RGB", (48, 48), color) for color in ("red", "blue"))
    inputs = processor.user_turns(
        ["<image>\nDraw it again.", "<image>\n<image>\nDraw both."], images=[[red], [blue, red]]
    )
    options = AnswerOptions(image_first=True, best_of=3, preview_every=4)
    events = list(model.stream(inputs, processor, options, seed=[1, 2], prompts=PROMPTS))
    alone = []  # the codes of each candidate, drawn without the others
    for number in range(3):
        seeds = [candidate_seed(seed, number) for seed in (1, 2)]
        alone.append([event.codes for event in drawn_in(model.stream(inputs, processor, ONE_IMAGE, seed=seeds))])
    for row, prompt in enumerate(PROMPTS):
        codes = torch.stack([one[row] for one in alone])
        best = int(PromptReader(model, processor).scores([prompt] * 3, codes).total.argmax())
        (drawn,) = (event for event in drawn_in(events) if event.row == row)
        assert drawn.choice.candidate.number == best and torch.equal(drawn.codes, codes[best])
        kinds = [type(event) for event in events if event.row == row]
        # Two batches of candidates have two previews each.
        assert kinds == [ImageStarted, *[ImagePreview] * 4, ImageDrawn, Finished]


def test_one_candidate_is_the_answer_itself(tiny_mllm):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS[0])
    plain, once = (
        drawn_in(model.stream(inputs, processor, options, seed=3))[0]
        for options in (ONE_IMAGE, AnswerOptions(image_first=True, best_of=1))
    )
    assert torch.equal(plain.codes, once.codes) and once.choice is None
    assert np.array_equal(np.asarray(plain.image), np.asarray(once.image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"modalities": "auto", "prompts": ["a ring"]},
            'best_of=2 needs answers that are one image: .*modalities="image"',
        ),
        ({"modalities": "image"}, "expected 1, one per conversation and none empty, got prompts=None"),
        ({"modalities": "image", "prompts": [" "]}, "one per conversation and none empty"),
        ({"modalities": "image", "prompts": ["a ring", "a square"]}, "expected 1, one per conversation"),
        (
            {"modalities": "image", "prompts": ["a ring"], "best_of": 2000},
            "best_of must be a whole number from 1 to 1024",
        ),
    ],
)
def test_candidates_without_a_prompt_or_an_image_are_rejected(tiny_mllm, arguments, message):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match=message):
        model.generate(**processor.user_turns("a ring"), processor=processor, **{"best_of": 2, **arguments})
