"""Prompts kept after they were run: limits, keys, and answers that share a prompt."""

import pytest
import torch

from llava_ext.generation import DrawingOptions
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.generation.answer_settings import text_settings
from llava_ext.generation.answers import Answers
from llava_ext.generation.events import Finished, ImageDrawn
from llava_ext.generation.prompt_cache import PromptCache, prompt_keys
from llava_ext.generation.steps import Steps

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]


@torch.no_grad()
def run(model, ids, mask):
    embeddings = model.get_input_embeddings()(ids)
    return Steps(model.language_model, embeddings, mask, ids.shape[1])


@torch.no_grad()
def test_split_and_joined_steps_go_on_as_before(tiny_mllm):
    model, processor = tiny_mllm
    inputs = processor.drawing_prompts(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = Steps(model.language_model, model.get_input_embeddings()(ids), mask, ids.shape[1] + 3)
    parts = run(model, ids, mask).split()
    assert [part.taken for part in parts] == mask.sum(dim=1).tolist()
    again = Steps.joined([parts[1], parts[0], parts[1]], 3)
    following = model.get_input_embeddings()(torch.arange(20, 23))
    for number in range(3):
        whole.step(following[number].expand(2, -1))
        again.step(following[number].expand(3, -1))
    torch.testing.assert_close(again.hidden, whole.hidden[[1, 0, 1]])
    at_once = Steps.joined([parts[1], parts[0]], 3)
    at_once.run(following.expand(2, -1, -1))
    torch.testing.assert_close(at_once.hidden, whole.hidden[[1, 0]])


def test_the_least_recently_used_prompts_are_dropped(tiny_mllm):
    model, processor = tiny_mllm
    inputs = processor.drawing_prompts(PROMPTS[:1])
    steps = run(model, inputs["input_ids"], inputs["attention_mask"])
    cache = PromptCache(max_bytes=3 * steps.num_bytes)
    for key in "abc":
        cache.put(key, steps)
    assert cache.get("a") is steps
    cache.put("d", steps)
    assert cache.get("b") is None and cache.get("a") and len(cache) == 3
    cache.put("a", steps)
    assert cache.num_bytes == 3 * steps.num_bytes
    few = PromptCache(max_prompts=1)
    few.put("a", steps)
    few.put("b", steps)
    assert len(few) == 1 and few.get("b") is steps
    tiny = PromptCache(max_bytes=steps.num_bytes - 1)
    tiny.put("a", steps)
    assert len(tiny) == 0 and tiny.num_bytes == 0


def test_keys_tell_prompts_and_images_apart(tiny_mllm):
    model, processor = tiny_mllm
    plain = processor.user_turns(["a ring", "a ring", "another and longer question"])
    keys = prompt_keys(model, plain)
    assert keys[0] == keys[1] != keys[2]
    count = model.config.vision_config.num_positions
    ids = torch.full((3, count + 1), model.config.image_token_id)
    ids[:, -1] = 20
    images = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 48, 48)
    keys = prompt_keys(model, {"input_ids": ids, "attention_mask": ids * 0 + 1, "pixel_values": images})
    assert keys[0] == keys[1] != keys[2]


def answers(model, processor, inputs, seeds, engine=None, **options):
    engine = engine or Answers(model, processor, text_settings(model))
    own = AnswerOptions(image_first=True, **options).complete(model, text_settings(model), inputs["input_ids"].shape[1])
    first = engine.admit(inputs, [own] * len(seeds), seeds)[0]
    events = list(engine.run())
    drawn = {event.row - first: event.codes for event in events if isinstance(event, ImageDrawn)}
    assert sum(isinstance(event, Finished) for event in events) == len(seeds)
    return [drawn[row] for row in range(len(seeds))]


@pytest.mark.parametrize("interval", [(0, 1), (0.4, 0.8)])
def test_requests_share_their_prompts(tiny_mllm, monkeypatch, interval):
    model, processor = tiny_mllm
    drawing = DrawingOptions(3.0, guidance_interval=interval, negative_prompt="a square")
    inputs = processor.user_turns([PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    alone = [
        answers(model, processor, processor.user_turns([text]), [seed], drawing=drawing)[0]
        for text, seed in zip([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [1, 2, 3], strict=True)
    ]
    seen = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **given: seen.append(tuple(given["inputs_embeds"].shape[:2])) or forward(**given),
    )
    engine = Answers(model, processor, text_settings(model))
    together = answers(model, processor, inputs, [1, 2, 3], engine, drawing=drawing)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    widths = [rows for rows, tokens in seen if tokens > 1]
    assert widths[:2] == [1, 2]  # the negative prompt, and two different prompts of three
    expected = 0 if interval == (0, 1) else 1  # the partners' steps before the interval
    assert len(widths) == 2 + expected
    assert seen.count((6, 1)) == (8 if interval == (0, 1) else 3)  # between all 9 positions, or between 4 to 7
    seen.clear()
    again = answers(model, processor, inputs, [1, 2, 3], engine, drawing=drawing)
    assert all(torch.equal(one, other) for one, other in zip(again, together, strict=True))
    assert sum(tokens > 1 for _, tokens in seen) == expected
