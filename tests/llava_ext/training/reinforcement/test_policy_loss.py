"""Log-probabilities, divergence and gradients of drawn codes, against loops without caches and branches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from llava_ext.generation.options import DrawingOptions
from llava_ext.training.reinforcement import policy_loss as module
from llava_ext.training.reinforcement.advantages import group_advantages
from llava_ext.training.reinforcement.policy_loss import DrawnGroups, code_statistics, policy_loss, position_states
from llava_ext.training.reinforcement.rollout import draw, drawing_seed
from llava_ext.training.reinforcement.trainer import frozen_copy

PROMPTS = ["a ring", "a photo of two large red squares"]  # of different lengths
PLAIN = DrawingOptions(guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def drawn_groups(model, processor, count=2):
    rows = [prompt for prompt in PROMPTS for _ in range(count)]
    codes = draw(model, processor, rows, list(range(len(rows))), PLAIN, batch_size=3)
    inputs = processor.drawing_prompts(PROMPTS)
    return DrawnGroups(inputs["input_ids"], inputs["attention_mask"], codes.unflatten(0, (-1, count)))


@torch.no_grad()
def naive_log_probabilities(model, processor, prompt, codes):
    """Log-probabilities (N, L) of the codes (N, L) of an image: the whole sequence again for every code."""
    head, codebooks = model.image_head, model.vision_tower.quantizer.codebooks
    inputs = model.get_input_embeddings()(processor.drawing_prompts([prompt])["input_ids"])[0]
    result = torch.zeros(codes.shape)
    for position, row in enumerate(codes):
        for level, code in enumerate(row):
            hidden = model.language_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1:]
            if model.config.image_head == "flat":
                logits = head.logits(hidden, level, codebooks)
                inputs = torch.cat([inputs, head.embed_level(code[None], level, codebooks)])
            else:
                latents = torch.stack([F.embedding(one, codebooks[i]) for i, one in enumerate(row)])
                latents[level:] = 0.0  # not drawn yet
                logits = head(hidden, latents[None])[level]
            result[position, level] = logits.log_softmax(dim=-1)[0, code]
        if model.config.image_head == "depth":
            inputs = torch.cat([inputs, model.embed_written(row[None], torch.tensor([position]))])
    return result


@pytest.mark.parametrize("layout", ["branches", "rows"])
def test_log_probabilities_equal_a_naive_loop(any_mllm, layout, monkeypatch):
    model, processor = any_mllm
    if layout == "rows":
        monkeypatch.setattr(module, "can_use_fixed_steps", lambda language_model: False)
    groups = drawn_groups(model, processor)
    with torch.no_grad():
        states = position_states(model, groups)
        found = code_statistics(model, states, groups.codes.flatten(0, 2)).log_probabilities
    found = found.view(groups.codes.shape)
    for prompt, of_prompt, codes in zip(PROMPTS, found, groups.codes, strict=True):
        for one, drawn in zip(of_prompt, codes, strict=True):
            expected = naive_log_probabilities(model, processor, prompt, drawn)
            torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


def changed_copy(model):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*other.language_model.parameters(), *other.image_head.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    return other


def test_divergence_and_entropy_are_those_of_the_distributions(any_mllm):
    model, processor = any_mllm
    groups, start = drawn_groups(model, processor), changed_copy(model)
    codes = groups.codes.flatten(0, 2)
    with torch.no_grad():
        states, others = position_states(model, groups), position_states(start, groups)
        found = code_statistics(model, states, codes, 0.7, (start, others))
        policy = [Categorical(logits=one / 0.7) for one in module.level_logits(model, states, codes)]
        reference = [Categorical(logits=one / 0.7) for one in module.level_logits(start, others, codes)]
    assert float(found.divergence.min()) > 0
    for level, (one, other) in enumerate(zip(policy, reference, strict=True)):
        torch.testing.assert_close(found.divergence[:, level], kl_divergence(one, other), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.entropy[:, level], one.entropy(), atol=1e-5, rtol=1e-4)
        chosen = one.log_prob(codes[:, level])
        torch.testing.assert_close(found.log_probabilities[:, level], chosen, atol=1e-5, rtol=1e-4)


def gradients(model, groups, advantages, reference):
    model.zero_grad()
    loss = policy_loss(model, groups, advantages, reference=reference)
    (loss.policy + 0.3 * loss.divergence).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, loss


def test_the_loss_is_the_mean_over_drawings_and_chunks_do_not_change_it(any_mllm, monkeypatch):
    shared, processor = any_mllm
    model = copy.deepcopy(shared)
    groups, start = drawn_groups(model, processor), changed_copy(model)
    advantages = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    whole, loss = gradients(model, groups, advantages, start)
    with torch.no_grad():
        states = position_states(model, groups)
        chosen = code_statistics(model, states, groups.codes.flatten(0, 2)).log_probabilities.view(groups.codes.shape)
    expected = -(advantages * chosen.sum(dim=(2, 3)) / groups.codes.shape[2]).mean()
    torch.testing.assert_close(loss.policy.detach(), expected)
    monkeypatch.setattr(code_statistics, "__defaults__", (1.0, None, 1000))  # a few positions per chunk
    chunked, again = gradients(model, groups, advantages, start)
    torch.testing.assert_close(again.divergence, loss.divergence)
    assert set(chunked) == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_the_better_of_two_arms_wins(any_mllm):
    """The arms are the halves of the codebook; only the first code of an image decides."""
    shared, processor = any_mllm
    model = copy.deepcopy(shared)
    model.requires_grad_(True).vision_tower.requires_grad_(False)
    half, shares = model.config.vision_config.codebook_size // 2, []
    inputs, count = processor.drawing_prompts(PROMPTS[:1]), 16
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        seeds = [drawing_seed(0, step, 0, PROMPTS[0], index) for index in range(count)]
        codes = draw(model, processor, PROMPTS[:1] * count, seeds, PLAIN, batch_size=count)[None]
        rewards = (codes[:, :, 0, 0] < half).double()
        shares.append(float(rewards.mean()))
        optimizer.zero_grad()
        groups = DrawnGroups(inputs["input_ids"], inputs["attention_mask"], codes)
        policy_loss(model, groups, group_advantages(rewards)).policy.backward()
        optimizer.step()
    assert shares[0] < 0.9 and sum(shares[-3:]) / 3 > 0.95, shares


def test_a_frozen_copy_keeps_the_starting_values_and_shares_what_is_not_trained(tiny_mllm):
    shared, processor = tiny_mllm
    model = copy.deepcopy(shared)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("image_head."))
    frozen = frozen_copy(model)
    assert frozen.vision_tower is model.vision_tower and not any(p.requires_grad for p in frozen.parameters())
    for name, parameter in frozen.named_parameters():
        assert (parameter is model.get_parameter(name)) == (not name.startswith("image_head.")), name
    before = {name: parameter.clone() for name, parameter in frozen.image_head.named_parameters()}
    with torch.no_grad():
        for parameter in model.image_head.parameters():
            parameter += 1
    for name, parameter in frozen.image_head.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_reference_of_adapters_is_the_model_without_them(tiny_mllm):
    from llava_ext.training.adapters import add_lora
    from llava_ext.training.config import StageConfig

    shared, processor = tiny_mllm
    model = copy.deepcopy(shared)
    adapted = add_lora(model, StageConfig(lora_enable=True, lora_r=4))
    reference, groups = frozen_copy(adapted.get_base_model()), drawn_groups(model, processor)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter += 0.1
        trained = position_states(model, groups)
        with adapted.disable_adapter():
            expected = position_states(model, groups)
        torch.testing.assert_close(position_states(reference, groups), expected)
    assert not torch.allclose(trained, expected, atol=1e-3)
