import copy

import numpy as np
import pytest
import torch

from evotok_plugin import SamplingOptions, uniform_noise
from evotok_plugin.errors import UserError
from evotok_plugin.sampling import sample
from llava_ext.generation import DrawingOptions
from llava_ext.generation.head_steps import ImageHeadStepper
from llava_ext.generation.options import SCHEDULES
from llava_ext.generation.prompt_cache import PromptCache
from llava_ext.generation.steps import Steps
from llava_ext.packed_attention import SDPA_BY_SEGMENT

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]


GREEDY = DrawingOptions(guidance_scale=1.0, sampling=SamplingOptions(temperature=0))


def drawn(model, processor, prompts, seeds, options, use_graphs=False):
    """The codes (R, N, L) of finished images."""
    return list(model.draw_codes(prompts, processor, seeds, options, use_graphs))[-1]


def pixels(images):
    return [np.asarray(image, dtype=int) for image in images]


def test_an_image_depends_only_on_its_prompt_and_seed(tiny_mllm):
    model, processor = tiny_mllm
    together = model.generate_images(PROMPTS, processor, num_images=2, seed=[5, 6, 7, 8], batch_size=4)
    one_by_one = model.generate_images(PROMPTS, processor, num_images=2, seed=[5, 6, 7, 8], batch_size=1)
    alone = model.generate_images(PROMPTS[1], processor, seed=8)
    for a, b in zip(pixels(together), pixels(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, atol=1)  # the decoder's sums round differently in another batch
    np.testing.assert_allclose(pixels(together)[3], pixels(alone)[0], atol=1)
    assert (pixels(together)[2] != pixels(together)[3]).any()


def test_guidance_scale_1_equals_the_conditional_model(tiny_mllm):
    model, processor = tiny_mllm
    plain = drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(guidance_scale=1.0))
    nearly = drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(guidance_scale=1.0 + 1e-9))
    assert plain.shape == (2, 9, 4) and torch.equal(plain, nearly)


def test_greedy_drawing_equals_teacher_forcing(tiny_mllm):
    """With temperature 0 every drawn code is the arg-max of the training-time logits given the codes before it."""
    model, processor = tiny_mllm
    codes = drawn(model, processor, PROMPTS[:1], [0], GREEDY)[0]
    ids = processor.drawing_prompts(PROMPTS[:1])["input_ids"]
    with torch.no_grad():
        written = model.embed_written(codes, torch.arange(9))
        embeds = torch.cat([model.get_input_embeddings()(ids)[0], written])[None]
        hidden = model.language_model(inputs_embeds=embeds).last_hidden_state[0, ids.shape[1] - 1 : -1]
        logits = model.image_head(hidden, model.vision_tower.level_latents(codes[None])[0])
    for level in range(4):
        assert torch.equal(logits[level].argmax(-1), codes[:, level])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale must be at least 1 and at most"),
        ({"prompt": "x", "seed": 2**63}, "a seed has at most 63 bits"),
        ({"prompt": "x", "seed": [1, 2]}, "2 seeds for 1 "),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
        ({"prompt": "x", "num_images": 0}, "num_images"),
        ({"prompt": "x", "min_p": 1.5}, "min_p"),
        ({"prompt": "x", "temperature": [1.0, 0.5]}, "temperature has 2 values, but 4 levels"),
        ({"prompt": "x", "guidance_schedule": "steep"}, "expected constant, linear, cosine, got 'steep'"),
        ({"prompt": "x", "output_type": "np"}, "expected 'pil' or 'pt', got 'np'"),
        ({"prompt": "ring " * 33000}, "but the language model has"),
    ],
)
def test_bad_settings_are_rejected(tiny_mllm, arguments, message):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match=message):
        model.generate_images(processor=processor, **arguments)


def test_progress_counts_positions(tiny_mllm):
    model, processor = tiny_mllm
    seen = []
    model.generate_images("a ring", processor, num_images=3, batch_size=2, on_progress=lambda *s: seen.append(s))
    assert seen[-1] == (27, 27) and all(a[0] < b[0] for a, b in zip(seen, seen[1:], strict=False))


def naive_codes(model, processor, prompt, options, seed):
    """One image without a cache or a batch: both prompts are run from the start at every position."""
    options = options.completed()
    noise, written, codes = uniform_noise(seed, 9, 4), [], []
    for position in range(9):
        hidden = []
        for text in (prompt, options.negative_prompt):
            ids = processor.drawing_prompts([text])["input_ids"]
            embeddings = torch.cat([model.get_input_embeddings()(ids)[0], *written])[None]
            hidden.append(model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1])
        head, total, drawn = model.image_head, torch.zeros(2, model.config.vision_config.codebook_dim), []
        for level in range(4):
            before = torch.stack(
                [model.vision_tower.quantizer.codebooks[n, c] for n, c in enumerate(drawn)] or [total[0]]
            )
            latents = torch.zeros(2, 4, before.shape[1])
            latents[:, : len(drawn)] = before[: len(drawn)]
            conditional, unconditional = head(torch.cat(hidden), latents)[level]
            scale, (start, end) = options.guidance_scale, options.guidance_interval
            scale = options.scale_at(position, 9) if isinstance(scale, float) else scale[level]
            logits = conditional
            if start <= position / 9 < end:
                logits = unconditional + scale * (conditional - unconditional)
                spread = logits * conditional.std() / logits.std()
                logits = options.guidance_rescale * spread + (1 - options.guidance_rescale) * logits
            drawn.append(
                int(sample(logits[None], options.sampling.at_level(level), noise[position, level : level + 1]))
            )
        codes.append(torch.tensor(drawn))
        written.append(model.embed_written(codes[-1][None], torch.tensor([position])))
    return torch.stack(codes)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        DrawingOptions(3.0),
        DrawingOptions(5.0, "linear", "a photo of a blue cross and nothing else that anyone could name"),
        DrawingOptions(2.0, "cosine", sampling=SamplingOptions([1.0, 0.5, 0.0, 2.0], [0, 5, 0, 3], 0.9, 0.01)),
        DrawingOptions(5.0, guidance_interval=(1 / 3, 2 / 3)),
        DrawingOptions([4.0, 1.0, 2.0, 1.0], guidance_rescale=0.7, guidance_interval=(0.3, 1)),
    ],
    ids=["plain", "linear, negative", "cosine, a setting per level", "interval", "scale per level, rescale, interval"],
)
def test_a_batch_equals_the_naive_loop(tiny_mllm, options):
    model, processor = tiny_mllm
    codes = drawn(model, processor, [*PROMPTS, PROMPTS[0]], [1, 2, 3], options)
    for row, (prompt, seed) in enumerate([(PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[0], 3)]):
        assert torch.equal(codes[row], naive_codes(model, processor, prompt, options, seed))


def test_the_guidance_scale_follows_its_schedule():
    scales = {name: [DrawingOptions(5.0, name).scale_at(step, 9) for step in (0, 2, 4, 8)] for name in SCHEDULES}
    assert scales["constant"] == [5.0] * 4
    assert scales["linear"] == [1.0, 2.0, 3.0, 5.0]
    assert scales["cosine"] == pytest.approx([1.0, 1 + 4 * 0.1464466, 3.0, 5.0])


def test_guidance_applies_only_in_its_interval():
    options = DrawingOptions([5.0, 3.0], "linear", guidance_interval=(0.25, 0.75))
    assert [options.scale_at(step, 9, level=0) for step in (2, 3, 4, 6, 7)] == [1.0, 2.5, 3.0, 4.0, 1.0]
    assert [options.scale_at(step, 9, level=1) for step in (2, 4, 7)] == [1.0, 2.0, 1.0]


def test_positions_outside_the_interval_are_drawn_from_the_prompt_alone(tiny_mllm):
    model, processor = tiny_mllm
    plain = drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(1.0))
    late = drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(9.0, guidance_interval=(2 / 3, 1)))
    assert torch.equal(late[:, :6], plain[:, :6]) and not torch.equal(late[:, 6:], plain[:, 6:])
    never = drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(9.0, guidance_interval=(0.5, 0.51)))
    assert torch.equal(never, plain)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0, 1 / 3), [(4, 1)] * 2 + [(2, 1)] * 6),
        ((1 / 3, 2 / 3), [(2, 1)] * 3 + [(2, 3)] + [(4, 1)] * 2 + [(2, 1)] * 3),
        ((2 / 3, 1), [(2, 1)] * 6 + [(2, 6)] + [(4, 1)] * 2),
        ((0.5, 0.51), [(2, 1)] * 8),
    ],
    ids=["start", "middle", "end", "nowhere"],
)
def test_unconditional_rows_run_only_in_the_interval(tiny_mllm, monkeypatch, interval, expected):
    """Their steps before the interval are computed at once."""
    model, processor = tiny_mllm
    seen = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **inputs: seen.append(tuple(inputs["inputs_embeds"].shape[:2])) or forward(**inputs),
    )
    drawn(model, processor, PROMPTS, [1, 2], DrawingOptions(3.0, guidance_interval=interval))
    assert seen[1:] == expected  # after the prompts


@pytest.mark.parametrize("interval", [(0, 0.5), (0.4, 0.8), (0.5, 1)])
@pytest.mark.parametrize("sampling", [SamplingOptions(temperature=0), SamplingOptions()], ids=["greedy", "sampled"])
def test_skipped_unconditional_steps_change_no_code(any_mllm, monkeypatch, interval, sampling):
    model, processor = any_mllm
    options = DrawingOptions(4.0, guidance_interval=interval, sampling=sampling)
    codes = drawn(model, processor, PROMPTS, [1, 2], options)
    steps = model.config.vision_config.num_positions * (4 if model.config.image_head == "flat" else 1)
    monkeypatch.setattr(ImageHeadStepper, "guided_steps", lambda self, options: range(steps))
    assert torch.equal(codes, drawn(model, processor, PROMPTS, [1, 2], options))


def test_prompts_are_run_once_for_all_candidates_and_batches(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    seen = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **inputs: seen.append(tuple(inputs["inputs_embeds"].shape[:2])) or forward(**inputs),
    )
    images = model.generate_images(
        PROMPTS, processor, best_of=3, batch_size=2, judge=lambda prompts, images: [0.5] * len(prompts)
    )
    assert (
        len(images) == 2 and sum(tokens > 1 for _, tokens in seen) == 2
    )  # the second prompt is not in the first batch
    seen.clear()
    shared = PromptCache()
    codes = [list(model.draw_codes(PROMPTS, processor, [1, 2], GREEDY, prompt_cache=shared))[-1] for _ in range(2)]
    assert torch.equal(*codes) and len(shared) == 2 and sum(tokens > 1 for _, tokens in seen) == 1


def test_previews_are_gray_at_missing_positions(tiny_mllm):
    model, processor = tiny_mllm
    shown = []
    (whole,) = model.generate_images("a ring", processor, on_preview=shown.extend, preview_every=3)
    assert len(shown) == 2
    for thirds, image in enumerate(shown, 1):
        rows = np.asarray(image, int)
        assert image.size == whole.size and (abs(rows[16 * thirds :] - 127.5) < 1).all()
        assert (abs(rows[: 16 * thirds] - 127.5) > 1).any()


def test_pixels_equal_the_images(tiny_mllm):
    model, processor = tiny_mllm
    pixels = model.generate_images(PROMPTS, processor, output_type="pt", batch_size=1)
    assert pixels.shape == (2, 3, 48, 48)
    for image, expected in zip(
        processor.image_processor.to_pil(pixels), model.generate_images(PROMPTS, processor), strict=True
    ):
        np.testing.assert_allclose(np.asarray(image, int), np.asarray(expected, int), atol=1)


def test_every_prompt_is_run_once(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    seen = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **inputs: seen.append(inputs["inputs_embeds"].shape) or forward(**inputs),
    )
    model.generate_images(PROMPTS, processor, num_images=4)
    assert seen[0][0] == 3 and [shape[:2] for shape in seen[1:]] == [(16, 1)] * 8  # two prompts and none; 8 images


FIXED = {
    "guided": DrawingOptions(3.0, "linear"),
    "not": DrawingOptions(1.0),
    "per level": DrawingOptions([3.0, 2.0, 1.0, 1.0], guidance_interval=(0.2, 0.7), guidance_rescale=0.5),
}


@pytest.mark.parametrize("options", FIXED.values(), ids=FIXED)
def test_fixed_steps_draw_the_same(tiny_mllm, options):
    model, processor = tiny_mllm
    expected = drawn(model, processor, PROMPTS, [1, 2], options)
    assert torch.equal(drawn(model, processor, PROMPTS, [1, 2], options, use_graphs=True), expected)


@torch.no_grad()
def test_fixed_steps_of_a_model_that_has_seen_packed_rows_draw_the_same(tiny_mllm, monkeypatch):
    model, processor = copy.deepcopy(tiny_mllm[0]), tiny_mllm[1]
    expected = drawn(model, processor, PROMPTS, [1, 2], FIXED["guided"])
    inputs, made, to_fixed = processor.user_turns(PROMPTS), [], Steps.to_fixed
    model(inputs["input_ids"], segment_ids=inputs["attention_mask"])
    assert model.language_model.config._attn_implementation == SDPA_BY_SEGMENT
    monkeypatch.setattr(Steps, "to_fixed", lambda steps: made.append(1) or to_fixed(steps))
    assert torch.equal(drawn(model, processor, PROMPTS, [1, 2], FIXED["guided"], use_graphs=True), expected) and made


@pytest.mark.gpu
@pytest.mark.parametrize("options", FIXED.values(), ids=FIXED)
def test_replayed_graphs_draw_the_same(tiny_mllm, options):
    model, processor = tiny_mllm
    model = copy.deepcopy(model).to("cuda")
    expected = drawn(model, processor, PROMPTS, [1, 2], options)
    for _ in range(2):
        assert torch.equal(drawn(model, processor, PROMPTS, [1, 2], options, use_graphs=True), expected)


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3"])
def test_a_batch_equals_the_naive_loop_for_other_backbones(
    make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path, backbone
):
    from llava_ext.assembly import assemble

    settings = {"sliding_window": 6} if backbone == "mistral" else {}
    folder = make_backbone(tiny_tokenizer_folder, tmp_path, backbone, **settings)
    model, processor = assemble(folder, tiny_evotok_folder, 32, 2, 2)
    model.eval()
    together = drawn(model, processor, PROMPTS, [4, 5], DrawingOptions())
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            assert torch.equal(together[row], naive_codes(model, processor, prompt, DrawingOptions(), 4 + row))
