"""Groups of drawings: advantages, diversity, seeds, and the prompts of each step."""

from collections import Counter

import pytest
import torch

from llava_ext.data.prompt_files import Prompt
from llava_ext.training.reinforcement.advantages import diversity, group_advantages, is_mixed
from llava_ext.training.reinforcement.prompt_order import PromptOrder
from llava_ext.training.reinforcement.rollout import drawing_seed


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 9.0]], dtype=torch.float64)
    found = group_advantages(rewards)
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 1, 1, -1], dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.std(dim=1, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)


def test_equal_rewards_have_no_advantage():
    rewards = torch.full((1, 7), 0.1)  # its mean is not exactly 0.1
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 7)) and not is_mixed(rewards).any()


def test_diversity_is_the_mean_over_pairs():
    codes = torch.randint(3, (2, 4, 5, 2), generator=torch.Generator().manual_seed(0))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    for group, found in zip(codes, diversity(codes), strict=True):
        shares = [float((group[i, :, 0] != group[j, :, 0]).float().mean()) for i, j in pairs]
        assert float(found) == pytest.approx(sum(shares) / len(pairs))


def test_every_prompt_is_used_equally_and_in_another_order_per_epoch():
    prompts = [Prompt(str(number)) for number in range(7)]
    order = PromptOrder(prompts, seed=3)
    taken = [prompt.text for start in range(0, 21, 3) for prompt in order.take(start, 3)]
    epochs = [taken[:7], taken[7:14], taken[14:]]
    assert all(sorted(epoch) == [str(number) for number in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.text for p in PromptOrder(prompts, seed=3).take(10, 4)] == taken[10:14]  # as after resuming
    assert [p.text for p in PromptOrder(prompts, seed=4).take(0, 21)] != taken


def test_steps_are_balanced_over_tags():
    prompts = [
        Prompt(f"{tag} {number}", tag) for tag, count in (("a", 9), ("b", 2), ("c", 5)) for number in range(count)
    ]
    order = PromptOrder(prompts, seed=0)
    for step in range(6):
        assert Counter(prompt.tag for prompt in order.take(step * 6, 6)) == {"a": 2, "b": 2, "c": 2}


def test_seeds_differ_in_every_argument():
    seeds = {
        drawing_seed(0, 0, 0, "a", 0), drawing_seed(1, 0, 0, "a", 0), drawing_seed(0, 1, 0, "a", 0),
        drawing_seed(0, 0, 1, "a", 0), drawing_seed(0, 0, 0, "b", 0), drawing_seed(0, 0, 0, "a", 1),
    }  # fmt: skip
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert drawing_seed(0, 7, 2, "a ring", 3) == drawing_seed(0, 7, 2, "a ring", 3)
