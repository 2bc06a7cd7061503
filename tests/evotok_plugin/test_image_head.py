"""The discrete image head on any model's hidden states."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from evotok_plugin import (
    DepthTransformerConfig,
    DepthTransformerHead,
    EvoTokModel,
    SamplingOptions,
    image_head,
    uniform_noise,
)
from evotok_plugin.errors import UserError
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy

CONFIG = DepthTransformerConfig(
    llm_hidden_size=10, codebook_dim=6, codebook_size=12, num_levels=3, hidden_size=16, num_layers=2, num_heads=4
)


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = DepthTransformerHead(CONFIG)
    for classifier in head.classifiers:
        classifier[1].weight.data *= 8  # a distribution far from uniform
    return head.eval()


@pytest.fixture(scope="module")
def codebooks():
    torch.manual_seed(1)
    return torch.randn(5, CONFIG.codebook_size, CONFIG.codebook_dim)  # more levels than are drawn


@pytest.fixture(scope="module")
def hidden():
    torch.manual_seed(2)
    return torch.randn(4, CONFIG.llm_hidden_size)


def noise_of(count):
    return torch.stack([uniform_noise(seed, CONFIG.num_levels) for seed in range(count)])


def latents_of(codebooks, codes):
    return codebooks[torch.arange(codes.shape[1]), codes]


def drawn_without_cache(head, hidden, codebooks, options, noise, guidance=None, scale=1.0):
    """Draw level by level with the teacher-forced forward pass, recomputing everything for each level."""
    codes = torch.zeros(hidden.shape[0], CONFIG.num_levels, dtype=torch.long)
    for level in range(CONFIG.num_levels):
        latents = latents_of(codebooks, codes)  # code 0 for later levels, which earlier ones do not see
        logits = head(hidden, latents)[level]
        if guidance is not None:
            without = head(guidance, latents)[level]
            logits = without + scale * (logits - without)
        for row, row_logits in enumerate(logits):
            if options.temperature == 0:
                codes[row, level] = row_logits.argmax()
                continue
            sums = (row_logits / options.temperature).softmax(-1).cumsum(-1)
            codes[row, level] = int((sums <= noise[row, level]).sum())
    return codes


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_sampling_equals_recomputing_every_level(head, codebooks, hidden, temperature, scale):
    options, without = SamplingOptions(temperature=temperature), hidden.flip(0)
    rows = hidden if scale == 1 else torch.cat([hidden, without])
    drawn = head.sample(rows, codebooks, noise_of(4), options, scale)
    guidance = None if scale == 1 else without
    expected = drawn_without_cache(head, hidden, codebooks, options, noise_of(4), guidance, scale)
    assert torch.equal(drawn, expected)


@torch.no_grad()
def test_a_row_depends_only_on_its_hidden_state_and_noise(head, codebooks, hidden):
    together = head.sample(hidden, codebooks, noise_of(4))
    for row in range(4):
        alone = head.sample(hidden[row : row + 1], codebooks, noise_of(4)[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, head.sample(hidden, codebooks, noise_of(5)[1:]))


@torch.no_grad()
def test_draws_follow_the_distribution_of_the_joint_codes(head, codebooks, hidden):
    """Compares frequencies of the first two levels with the product of the teacher-forced probabilities."""
    count, size = 5000, CONFIG.codebook_size
    rows = hidden[:1].expand(count, -1)
    drawn = head.sample(rows, codebooks, noise_of(count))
    found = torch.bincount(drawn[:, 0] * size + drawn[:, 1], minlength=size * size) / count
    firsts = torch.stack([torch.arange(size), torch.zeros(size).long(), torch.zeros(size).long()], dim=1)
    first, second, _ = head(hidden[:1].expand(size, -1), latents_of(codebooks, firsts))
    expected = first[0].softmax(-1)[:, None] * second.softmax(-1)
    assert (found - expected.flatten()).abs().sum() / 2 < 0.08  # total variation


@torch.no_grad()
def test_a_level_does_not_see_itself_or_later_ones(head, codebooks, hidden):
    codes = torch.randint(0, CONFIG.codebook_size, (4, CONFIG.num_levels))
    before = head(hidden, latents_of(codebooks, codes))
    codes[:, 1] = (codes[:, 1] + 1) % CONFIG.codebook_size
    after = head(hidden, latents_of(codebooks, codes))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_loss_is_the_mean_over_levels_and_positions(head, codebooks, hidden):
    codes = torch.randint(0, CONFIG.codebook_size, (4, CONFIG.num_levels))
    latents = latents_of(codebooks, codes)
    logits = head(hidden, latents)
    terms = [F.cross_entropy(logits[level][row], codes[row, level]) for level in range(3) for row in range(4)]
    torch.testing.assert_close(head.loss(hidden, latents, codes), torch.stack(terms).mean())


def test_the_head_learns_codes_from_hidden_states(tiny_evotok_folder):
    """Uses a tokenizer's codes and, instead of a model, a table of hidden states."""
    torch.manual_seed(0)
    tokenizer = EvoTokModel.from_pretrained(tiny_evotok_folder)
    sizes = tokenizer.config
    codes = torch.randint(0, sizes.codebook_size, (16, sizes.pixel_depth))
    hidden = F.one_hot(torch.arange(16)).float()
    head = DepthTransformerHead(
        DepthTransformerConfig(16, sizes.codebook_dim, sizes.codebook_size, sizes.pixel_depth, 32, 2, 4)
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    latents = tokenizer.level_latents(codes[None])[0]
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(hidden, latents, codes).backward()
        optimizer.step()
    greedy, noise = SamplingOptions(temperature=0), torch.zeros(16, sizes.pixel_depth)
    assert torch.equal(head.sample(hidden, tokenizer.quantizer.codebooks, noise, greedy), codes)


def test_half_precision_draws_valid_codes(head, codebooks, hidden):
    half = DepthTransformerHead(CONFIG).to(torch.bfloat16)
    codes = half.sample(hidden.to(torch.bfloat16), codebooks, noise_of(4))
    assert codes.shape == (4, 3) and codes.dtype == torch.long and 0 <= codes.min() and codes.max() < 12
    guided = half.sample(hidden.to(torch.bfloat16), codebooks, noise_of(2), guidance_scale=torch.tensor(2.0))
    assert torch.equal(guided, half.sample(hidden.to(torch.bfloat16), codebooks, noise_of(2), guidance_scale=2.0))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30}, "width of the depth transformer must be a multiple of its 4 heads, got 30"),
        ({"num_layers": 0}, "at least 1, got num_layers 0"),
    ],
)
def test_impossible_sizes_are_rejected(sizes, message):
    with pytest.raises(UserError, match=message):
        DepthTransformerConfig(**(vars(CONFIG) | sizes))


@pytest.mark.parametrize(
    ("noise_shape", "codebooks_shape", "message"),
    [
        ((3, 3), (5, 12, 6), r"4 hidden states for noise of shape \(3, 3\)"),
        ((4, 2), (5, 12, 6), r"4 hidden states for noise of shape \(4, 2\)"),
        ((0, 3), (5, 12, 6), r"noise of shape \(0, 3\)"),
        ((4, 3), (2, 12, 6), r"expected codebooks \(3 or more, 12, 6\), got \(2, 12, 6\)"),
        ((4, 3), (5, 13, 6), "made for another tokenizer"),
    ],
)
def test_mismatched_shapes_are_explained(head, hidden, noise_shape, codebooks_shape, message):
    with pytest.raises(ValueError, match=message):
        head.sample(hidden, torch.zeros(codebooks_shape), torch.zeros(noise_shape))


@torch.no_grad()
def test_a_cache_can_be_reused_for_all_positions(head, codebooks, hidden):
    cache = head.new_cache(4)
    for seed in range(3):
        noise = uniform_noise(seed, 4, CONFIG.num_levels)
        again = head.sample(hidden, codebooks, noise, cache=cache)
        assert torch.equal(again, head.sample(hidden, codebooks, noise))


def test_latents_of_another_shape_are_explained(head, hidden):
    with pytest.raises(ValueError, match=r"expected level_latents \(B, 3, 6\).*got \(4, 4, 6\) and \(4, 10\)"):
        head(hidden, torch.zeros(4, 4, 6))


def test_the_loss_in_chunks_equals_that_of_all_logits(monkeypatch):
    torch.manual_seed(0)
    head = DepthTransformerHead(DepthTransformerConfig(16, 8, 40, 4, 32, 2, 2))
    hidden, latents = torch.randn(11, 16, requires_grad=True), torch.randn(11, 4, 8)
    codes = torch.randint(40, (11, 4))
    plain = torch.stack([F.cross_entropy(x, codes[:, i]) for i, x in enumerate(head(hidden, latents))]).mean()
    monkeypatch.setattr(image_head, "chunked_cross_entropy", partial(chunked_cross_entropy, max_logits=3 * 40))
    chunked = head.loss(hidden, latents, codes)
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-6)
    leaves = [hidden, *head.parameters()]
    found, expected = torch.autograd.grad(chunked, leaves), torch.autograd.grad(plain, leaves)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
