"""Several positions per step: the codes and the distribution of drawing one position per step."""

import copy
import itertools

import numpy as np
import pytest
import torch

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel, SamplingOptions
from evotok_plugin.errors import UserError
from evotok_plugin.guidance import guided_logits
from evotok_plugin.scenes.captions import scene_prompts
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.assembly import assemble
from llava_ext.generation import DrawingOptions
from llava_ext.generation import images as drawing
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.prompt_cache import PromptCache
from llava_ext.generation.speculative_steps import SpeculativeSteps
from llava_ext.generation.steps import Steps
from llava_ext.model_folder import INCLUDED_MODEL, load_model

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]
SETTINGS = {
    "not guided": DrawingOptions(1.0),
    "guided": DrawingOptions(3.0),
    "linear, negative prompt": DrawingOptions(5.0, "linear", "a photo of a blue cross"),
    "interval at the start": DrawingOptions(4.0, guidance_interval=(0, 0.3)),
    "interval in the middle": DrawingOptions(4.0, guidance_interval=(0.4, 0.7)),
    "interval at the end": DrawingOptions(4.0, "cosine", guidance_interval=(0.6, 1)),
    "interval without positions": DrawingOptions(9.0, guidance_interval=(0.5, 0.51)),
    "scale per level, rescale": DrawingOptions([4.0, 1.0, 2.0, 1.0], guidance_rescale=0.7),
    "top-k, top-p, min-p": DrawingOptions(2.0, top_k=20, top_p=0.9, min_p=0.02),
    "sampling per level": DrawingOptions(2.0, sampling=SamplingOptions([1.0, 0.5, 0.0, 2.0], [0, 5, 0, 3], 0.9, 0.01)),
    "greedy": DrawingOptions(1.0, temperature=0),
}


def drawn(model, processor, prompts, seeds, options=None, speculate=1):
    """The codes (R, N, L) of finished images."""
    return list(model.draw_codes(prompts, processor, seeds, options, speculate=speculate))[-1]


@pytest.fixture(scope="module")
def included():
    model, processor = load_model(INCLUDED_MODEL)
    return model.eval(), processor


@pytest.fixture(scope="module")
def sharp_mllm(tiny_mllm):
    """A random model that often repeats codes, so that some drafts are right and others are not."""
    model, processor = tiny_mllm
    return sharpened(model, 60), processor


@pytest.fixture(scope="module")
def constant_mllm(tiny_mllm):
    """A model that draws code 5 everywhere, so that all drafts are right."""
    model, processor = tiny_mllm
    model = copy.deepcopy(model)
    with torch.no_grad():
        for _, linear in model.image_head.classifiers:
            linear.weight.zero_()
            linear.bias.zero_()
            linear.bias[5] = 100
    return model, processor


def sharpened(model, factor):
    """A copy with the logits of the image head multiplied by a factor."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for _, linear in model.image_head.classifiers:
            linear.weight.mul_(factor)
            linear.bias.mul_(factor)
    return model


def scenes(count):
    """`count` prompts of each skill."""
    rng = np.random.default_rng(0)
    return [record["prompt"] for skill in SKILLS for record in scene_prompts(skill, count, rng)]


def steps_of(model, monkeypatch):
    """A list that receives the numbers of rows and positions of every call of the language model."""
    seen, forward = [], model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **inputs: seen.append(tuple(inputs["inputs_embeds"].shape[:2])) or forward(**inputs),
    )
    return seen


# The same codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 50])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_codes_equal_those_of_single_steps(tiny_mllm, sharp_mllm, options, window):
    for model, processor in (tiny_mllm, sharp_mllm):
        texts, seeds = [*PROMPTS, PROMPTS[0]], [1, 2, 3]
        expected = drawn(model, processor, texts, seeds, options)
        assert torch.equal(drawn(model, processor, texts, seeds, options, window), expected)


def test_many_images_of_the_included_model_are_equal(included):
    model, processor = included
    prompts = scenes(4)
    for options in (None, DrawingOptions(3.0, "linear", guidance_interval=(0.2, 0.8)), DrawingOptions(temperature=0)):
        expected = drawn(model, processor, prompts, range(len(prompts)), options)
        assert torch.equal(drawn(model, processor, prompts, range(len(prompts)), options, 4), expected)


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3"])
def test_codes_are_equal_for_other_backbones(
    make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path, backbone
):
    settings = {"sliding_window": 6} if backbone == "mistral" else {}
    model, processor = assemble(
        make_backbone(tiny_tokenizer_folder, tmp_path, backbone, **settings), tiny_evotok_folder, 32, 2, 2
    )
    model = sharpened(model.eval(), 60)
    expected = drawn(model, processor, PROMPTS, [4, 5], DrawingOptions(3.0))
    assert torch.equal(drawn(model, processor, PROMPTS, [4, 5], DrawingOptions(3.0), 4), expected)


@pytest.mark.gpu
def test_codes_are_equal_on_a_gpu(included):
    model, processor = included
    model = copy.deepcopy(model).to("cuda")
    expected = drawn(model, processor, PROMPTS, [4, 5], DrawingOptions(3.0))
    assert torch.equal(drawn(model, processor, PROMPTS, [4, 5], DrawingOptions(3.0), 4), expected)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0, 1 / 3), [(2, 2)] + [(1, 2)] * 3),
        ((1 / 3, 2 / 3), [(1, 2)] + [(1, 2), (2, 2)] + [(2, 2)] + [(1, 2)]),
        ((2 / 3, 1), [(1, 2)] * 2 + [(1, 4), (2, 2)] + [(2, 2)]),
        ((0.5, 0.51), [(1, 2)] * 4),
    ],
    ids=["start", "middle", "end", "nowhere"],
)
def test_the_unconditional_row_runs_only_in_the_interval(constant_mllm, monkeypatch, interval, expected):
    """Its steps before the interval are computed at once."""
    model, processor = constant_mllm
    seen = steps_of(model, monkeypatch)
    drawn(model, processor, PROMPTS[:1], [1], DrawingOptions(3.0, guidance_interval=interval), 2)
    assert seen[1:] == expected  # after the prompts


# The same distribution ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enumerable(tiny_backbone_folder, tmp_path_factory):
    """A random model of images with 4 positions of 2 levels with 2 codes: 256 images."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "codebook_size": 2, "num_quantizers": 2, "pixel_depth": 2, "semantic_depth": 2}
    config, folder = EvoTokConfig.preset("tiny", **sizes), tmp_path_factory.mktemp("two_codes")
    EvoTokModel(config).save_pretrained(folder)
    EvoTokImageProcessor(size=config.image_size).save_pretrained(folder)
    model, processor = assemble(tiny_backbone_folder, folder, 32, 2, 2)
    return sharpened(model.eval(), 20), processor


@torch.no_grad()
def teacher_forced(model, processor, images, options):
    """Probability of code 0 at every position and level, given the codes before it: images (B, 4, 2) -> (B, 4, 2)."""
    vision, count = model.config.vision_config, len(images)
    written = model.embed_written(images.flatten(0, 1), torch.arange(4).repeat(count)).unflatten(0, (count, 4))
    logits = []
    for text in (PROMPTS[0], None):
        ids = processor.drawing_prompts([text])["input_ids"]
        prompt = model.get_input_embeddings()(ids).expand(count, -1, -1)
        states = model.language_model(inputs_embeds=torch.cat([prompt, written], dim=1)).last_hidden_state
        hidden = states[:, ids.shape[1] - 1 : -1].flatten(0, 1)
        latents = model.vision_tower.level_latents(images)[..., : vision.pixel_depth, :].flatten(0, 1)
        logits.append(torch.stack(model.image_head(hidden, latents), dim=1).unflatten(0, (count, 4)))
    guided = torch.empty_like(logits[0])
    for position in range(4):
        both = torch.cat([one[:, position].flatten(0, 1) for one in logits])
        guided[:, position] = guided_logits(both, options.scale_at(position, 4)).unflatten(0, (count, 2))
    return guided.double().softmax(dim=-1)[..., 0]


def all_images():
    return torch.tensor(list(itertools.product(range(2), repeat=8))).view(-1, 4, 2)


def p_value(statistic, freedom):
    """Probability of a larger chi-square statistic."""
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def chi_square(counts, expected):
    """p value of counts; cells with an expected count below 5 are joined."""
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    assert len(expected) > 5
    return p_value(float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()), len(expected) - 1)


GUIDED = {"not guided": DrawingOptions(1.0), "guided": DrawingOptions(3.0, "linear", guidance_interval=(0.2, 0.8))}


@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_every_image_has_its_exact_probability(enumerable, monkeypatch, options):
    """The noise that gives an image is a box, whose volume is the image's probability by teacher forcing.

    The boxes of all images fill the space of noise. A random point of each one must give its image.
    """
    model, processor = enumerable
    images, options = all_images(), options.for_model(model)
    first = teacher_forced(model, processor, images, options)
    low = torch.where(images == 0, torch.zeros_like(first), first)
    high = torch.where(images == 0, first, torch.ones_like(first))
    volumes = (high - low).flatten(1).prod(dim=1)
    assert volumes.sum() == pytest.approx(1) and volumes.max() > 0.02
    fractions = torch.rand(first.shape, generator=torch.Generator().manual_seed(0)) * 0.998 + 0.001
    noise = (low + fractions * (high - low)).float()
    monkeypatch.setattr(drawing, "uniform_noise", lambda seed, *shape: noise[seed])
    inside = [n for n in range(256) if (high - low)[n].min() > 1e-4]  # wide enough for float32
    assert len(inside) > 200
    codes = drawn(model, processor, [PROMPTS[0]] * len(inside), inside, options, 3)
    assert torch.equal(codes, images[inside])


def test_frequencies_of_all_images_agree_with_their_probabilities(enumerable):
    model, processor = enumerable
    images, options, count = all_images(), DrawingOptions(2.0).for_model(model), 600
    first = teacher_forced(model, processor, images, options)
    probabilities = torch.where(images == 0, first, 1 - first).flatten(1).prod(dim=1)
    codes = drawn(model, processor, [PROMPTS[0]] * count, range(count), options, 4)
    numbers = (codes.flatten(1) * 2 ** torch.arange(7, -1, -1)).sum(dim=1)
    counts = numbers.bincount(minlength=256)
    assert chi_square(counts, count * probabilities) > 0.001
    wrong = torch.full_like(probabilities, 1 / 256)
    assert p_value(float(((counts - count * wrong) ** 2 / (count * wrong)).sum()), 255) < 1e-6  # the test can fail


def test_codes_of_the_included_model_have_the_distribution_of_single_steps(included):
    """Two samples with different seeds: the first levels of the center, and of the position after it."""
    model, processor = included
    count, prompts = 160, ["a photo of three rings"] * 160
    plain = drawn(model, processor, prompts, range(count))
    found = drawn(model, processor, prompts, range(count, 2 * count), speculate=4)
    for position in (4, 5):
        counts = torch.stack([codes[:, position, 0].bincount(minlength=32) for codes in (plain, found)])
        counts = counts[:, counts.sum(dim=0).argsort(descending=True)]
        common = int((counts.sum(dim=0) >= 10).sum())
        assert common >= 2
        table = torch.cat([counts[:, :common], counts[:, common:].sum(dim=1, keepdim=True)], dim=1).double()
        table = table[:, table.sum(dim=0) > 0]
        expected = table.sum(dim=0, keepdim=True) / 2
        assert p_value(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1) > 0.001


# Steps --------------------------------------------------------------------------------------------------------------


def test_half_the_steps_suffice_for_the_included_model(included, monkeypatch):
    model, processor = included
    prompts = scenes(4)
    seen = steps_of(model, monkeypatch)
    drawn(model, processor, prompts, range(len(prompts)), speculate=4)
    assert seen[0][0] == len(prompts) and {rows for rows, _ in seen[1:]} == {1}
    assert len(seen[1:]) <= 8 * len(prompts) / 2


@torch.no_grad()
def test_steps_after_dropped_ones_equal_a_fresh_run(tiny_mllm):
    model, _ = tiny_mllm
    inputs = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 4)
    mask[1, :2] = 0  # padding
    fresh, other = (Steps(model.language_model, inputs[:, :4], mask, 10) for _ in range(2))
    fresh.run(inputs[:, 4:6])
    expected = fresh.run(inputs[:, 6:9])
    states = other.run(torch.cat([inputs[:, 4:6], inputs[:, 9:12]], dim=1))
    other.drop_last(3, states[:, 1])
    torch.testing.assert_close(other.hidden, states[:, 1])
    assert other.taken == 6 and other.num_free == 4
    torch.testing.assert_close(other.run(inputs[:, 6:9]), expected)
    for one, two in zip(other.split(), fresh.split(), strict=True):
        torch.testing.assert_close(one.hidden, two.hidden)
        for mine, theirs in zip(one._cache.slot_layers, two._cache.slot_layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys)
            torch.testing.assert_close(mine.values, theirs.values)


@pytest.mark.parametrize(("window", "num_steps"), [(2, 4), (3, 3), (4, 2), (8, 1), (20, 1)])
def test_right_drafts_are_all_kept(constant_mllm, window, num_steps):
    model, processor = constant_mllm
    after, options = model._run_prompts([PROMPTS[0]], processor, PromptCache(), 8), DrawingOptions(1.0)
    noise = torch.full((1, 9, 4), 0.5)
    steps = SpeculativeSteps(
        stepper_for(model), Steps.joined(after, 8), noise, options.for_model(model), window=window, grid_size=3
    )
    assert torch.equal(torch.cat(list(steps)), torch.full((9, 4), 5)) and steps.num_steps == num_steps


# Interface ----------------------------------------------------------------------------------------------------------


def test_progress_and_previews_are_those_of_single_steps(sharp_mllm):
    model, processor = sharp_mllm
    found = []
    for speculate in (1, 4):
        progress, shown = [], []
        images = model.generate_images(
            PROMPTS,
            processor,
            on_progress=lambda *seen: progress.append(seen),  # noqa: B023
            on_preview=shown.extend,
            preview_every=3,
            speculate=speculate,
        )
        found.append((progress, [np.asarray(one) for one in [*shown, *images]]))
    (progress, pictures), (expected, others) = found
    assert progress == expected and len(progress) == 9 and len(pictures) == 6
    for one, two in zip(pictures, others, strict=True):
        np.testing.assert_array_equal(one, two)


def test_candidates_are_the_same(sharp_mllm):
    model, processor = sharp_mllm
    kept = []
    for speculate in (1, 3):
        model.generate_images(PROMPTS, processor, best_of=2, batch_size=3, on_choice=kept.append, speculate=speculate)
    codes = [one.codes for choices in kept for one in choices]
    assert len(codes) == 4
    assert torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])


@pytest.mark.parametrize("speculate", [0, -3])
def test_a_number_below_1_is_rejected(tiny_mllm, speculate):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match=f"speculate must be at least 1, got {speculate}"):
        model.generate_images("a ring", processor, speculate=speculate)
    with pytest.raises(UserError, match=f"speculate must be at least 1, got {speculate}"):
        list(model.draw_codes(["a ring"], processor, [0], speculate=speculate))


def test_graphs_are_rejected(tiny_mllm):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match="speculate and use_graphs exclude each other"):
        model.generate_images("a ring", processor, speculate=2, use_graphs=True)


def test_the_flat_head_is_rejected(flat_mllm):
    model, processor = flat_mllm
    with pytest.raises(UserError, match="expected the depth head, got the flat head"):
        model.generate_images("a ring", processor, speculate=2)
    assert len(model.generate_images("a ring", processor, speculate=1)) == 1


def test_rotary_embeddings_that_change_with_the_length_are_rejected(tiny_mllm):
    model, processor = tiny_mllm
    model = copy.deepcopy(model)
    model.config.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="rotary embeddings of this language model change with the length"):
        model.generate_images("a ring", processor, speculate=2)
