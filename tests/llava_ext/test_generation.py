import numpy as np
import pytest
import torch

from llava_ext.generation import SamplingOptions, sample

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]


def pixels(images):
    return [np.asarray(image, dtype=int) for image in images]


def test_an_image_depends_on_its_prompt_and_seed_alone(tiny_mllm):
    model, processor = tiny_mllm
    together = model.generate_images(PROMPTS, processor, num_images=2, seed=[5, 6, 7, 8], batch_size=4)
    one_by_one = model.generate_images(PROMPTS, processor, num_images=2, seed=[5, 6, 7, 8], batch_size=1)
    alone = model.generate_images(PROMPTS[1], processor, seed=8)
    for a, b in zip(pixels(together), pixels(one_by_one)):
        np.testing.assert_allclose(a, b, atol=1)  # the decoder's sums round differently in another batch
    np.testing.assert_allclose(pixels(together)[3], pixels(alone)[0], atol=1)
    assert (pixels(together)[2] != pixels(together)[3]).any()


def test_guidance_one_is_the_conditional_model(tiny_mllm):
    model, processor = tiny_mllm
    options, seeds = SamplingOptions(), [1, 2]
    plain = model.generate_codes(PROMPTS, processor, 1.0, seeds, options)
    nearly = model.generate_codes(PROMPTS, processor, 1.0 + 1e-9, seeds, options)
    assert plain.shape == (2, 9, 4) and torch.equal(plain, nearly)


def test_drawing_equals_teacher_forcing_greedily(tiny_mllm):
    """With temperature 0 every drawn code is the arg-max of the training-time logits given the codes before it."""
    model, processor = tiny_mllm
    codes = model.generate_codes(PROMPTS[:1], processor, 1.0, [0], SamplingOptions(temperature=0))[0]
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
        ({"prompt": "x", "seed": [1, 2]}, "2 seeds for 1 images"),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
        ({"prompt": "x", "num_images": 0}, "num_images"),
    ],
)
def test_bad_settings_are_refused(tiny_mllm, arguments, message):
    model, processor = tiny_mllm
    with pytest.raises(ValueError, match=message):
        model.generate_images(processor=processor, **arguments)


def test_sampling_follows_the_distribution_and_its_filters():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    rows = logits.expand(4000, -1)
    share = torch.bincount(sample(rows, SamplingOptions(), generators), minlength=4) / 4000
    torch.testing.assert_close(share, logits.softmax(-1)[0], atol=0.03, rtol=0)
    assert set(sample(rows, SamplingOptions(top_k=2), generators).tolist()) == {0, 1}
    assert set(sample(rows, SamplingOptions(top_p=0.6), generators).tolist()) == {0}
    assert set(sample(rows, SamplingOptions(temperature=0), generators).tolist()) == {0}


def test_progress_counts_positions(tiny_mllm):
    model, processor = tiny_mllm
    seen = []
    model.generate_images("a ring", processor, num_images=3, batch_size=2, on_progress=lambda *s: seen.append(s))
    assert seen[-1] == (27, 27) and all(a[0] < b[0] for a, b in zip(seen, seen[1:]))
