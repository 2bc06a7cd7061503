import copy
import inspect

import pytest
import torch
from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.generation import PromptReader, ReadingJudge
from llava_ext.rewards import Reward

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square", "a photo of a ring", "an <image> of two"]


@pytest.fixture
def codes(any_mllm):
    """Random codes (4, N, drawn levels)."""
    vision = any_mllm[0].config.vision_config
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vision.codebook_size, (4, vision.num_positions, vision.pixel_depth), generator=generator)


def naive_log_probability(model, processor, prompt, instruction, codes=None):
    """One conversation alone: the sum over the answer's tokens, from all logits."""
    image = [] if codes is None else [{"type": "image"}]
    user = {"role": "user", "content": [*image, {"type": "text", "text": instruction}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": prompt}]}
    asked = processor.encode_conversation([user], [None] * len(image), add_generation_prompt=True).input_ids
    whole = processor.encode_conversation([user, answer], [None] * len(image)).input_ids
    assert torch.equal(whole[: len(asked)], asked)
    end = len(processor.tokenizer.encode(prompt, add_special_tokens=False)) + 1  # of the answer, with the end of turn
    images = {} if codes is None else {"image_codes": codes[None]}
    with torch.no_grad():
        logits = model(whole[None], **images).logits[0].double().log_softmax(dim=-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(asked), len(asked) + end))


def test_scores_equal_a_naive_loop(any_mllm, codes):
    model, processor = any_mllm
    plain = [prompt for prompt in PROMPTS if "<" not in prompt]
    scores = PromptReader(model, processor, "What is it?").scores(plain, codes[: len(plain)])
    for index, prompt in enumerate(plain):
        with_image = naive_log_probability(model, processor, prompt, "What is it?", codes[index])
        without = naive_log_probability(model, processor, prompt, "What is it?")
        assert scores.with_image[index].item() == pytest.approx(with_image, abs=1e-4)
        assert scores.without_image[index].item() == pytest.approx(without, abs=1e-4)
        assert scores.total[index].item() == pytest.approx(with_image - without, abs=1e-4)


def test_scores_do_not_depend_on_the_batch(any_mllm, codes):
    model, processor = any_mllm
    together = PromptReader(model, processor).scores(PROMPTS, codes)
    for max_tokens in (1, 60):
        split = PromptReader(model, processor, max_tokens=max_tokens).scores(PROMPTS, codes)
        torch.testing.assert_close(split.with_image, together.with_image, atol=1e-4, rtol=0)
        torch.testing.assert_close(split.without_image, together.without_image, atol=1e-4, rtol=0)
    backwards = PromptReader(model, processor).scores(PROMPTS[::-1], codes.flip(0))
    torch.testing.assert_close(backwards.total.flip(0), together.total, atol=1e-4, rtol=0)


def test_a_prompt_without_its_image_is_scored_once(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    reader, rows = PromptReader(model, processor), []
    run = reader._run
    monkeypatch.setattr(reader, "_run", lambda m, r, c: rows.append((c is None, len(r))) or run(m, r, c))
    codes = torch.zeros(4, 9, 4, dtype=torch.long)
    reader.scores(PROMPTS, codes)
    reader.scores(PROMPTS, codes)
    assert rows == [(True, 3), (False, 4), (False, 4)]


def test_the_image_and_the_instruction_matter(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    codes = torch.arange(2).view(2, 1, 1).expand(2, 9, 4)
    first, second = PromptReader(model, processor).scores(["a ring"] * 2, codes).with_image
    assert abs(first - second) > 1e-3
    own = PromptReader(model, processor, "Describe the image.").scores(["a ring"] * 2, codes)
    assert abs(own.without_image[0] - PromptReader(model, processor).scores(["a ring"], codes[:1]).without_image) > 1e-3
    settings = {"instruction": "Describe the image."}
    monkeypatch.setattr(model.generation_config, "image_selection", settings, raising=False)
    assert torch.equal(PromptReader(model, processor).scores(["a ring"] * 2, codes).total, own.total)


def test_a_model_in_training_mode_scores_the_same(tiny_mllm):
    model, processor = tiny_mllm
    training = copy.deepcopy(model).train()
    codes = torch.zeros(2, 9, 4, dtype=torch.long)
    expected = PromptReader(model, processor).scores(PROMPTS[:2], codes).total
    assert torch.equal(PromptReader(training, processor).scores(PROMPTS[:2], codes).total, expected)
    assert training.training and not expected.requires_grad


def test_the_judge_reads_all_levels(tiny_mllm):
    model, processor = tiny_mllm
    judge: Reward = ReadingJudge(model, processor)
    images = [Image.new("RGB", (48, 48), color) for color in ("red", "white", "blue")]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    codes = model.vision_tower.encode(pixels).codes
    assert codes.shape[2] == model.config.vision_config.num_quantizers
    expected = PromptReader(model, processor).scores(PROMPTS[:3], codes).total
    assert judge(PROMPTS[:3], images) == pytest.approx(expected.tolist(), abs=1e-4)
    assert judge([], []) == []
    assert list(inspect.signature(judge).parameters) == ["prompts", "images"]


def test_prompts_and_images_must_match(tiny_mllm):
    model, processor = tiny_mllm
    codes = torch.zeros(2, 9, 4, dtype=torch.long)
    with pytest.raises(UserError, match="one prompt per image, got 1 prompts and 2 images"):
        PromptReader(model, processor).scores(["a ring"], codes)
    with pytest.raises(UserError, match="the language model has"):
        PromptReader(model, processor).scores(["ring " * 33000] * 2, codes)
