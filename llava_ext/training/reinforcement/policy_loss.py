"""Log-probabilities of drawn codes under teacher forcing, and the loss of group-relative policy optimization.

G prompts (groups), n drawings each, T tokens of a prompt, N positions, L levels, P = G n N drawn positions, K codes,
D width of the language model, S steps of an image (N, or N L with the flat head), M = S / N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evotok_plugin import DepthTransformerHead
from evotok_plugin.losses.cross_entropy import MAX_LOGITS
from llava_ext.flat_head import FlatHead
from llava_ext.generation.steps import can_use_fixed_steps
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration

Run = Callable[..., Any]  # the forward pass of the model, or of an engine around it


@dataclass(frozen=True)
class DrawnGroups:
    """Drawings of prompts.

    Attributes:
        input_ids, attention_mask: prompts, padded on the left, (G, T).
        codes: (G, n, N, L).
    """

    input_ids: Tensor
    attention_mask: Tensor
    codes: Tensor


@dataclass(frozen=True)
class CodeStatistics:
    """Log-probabilities (P, L) of drawn codes, KL divergence (P, L) to the reference, entropy (P, L) in nats."""

    log_probabilities: Tensor
    divergence: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The policy loss and the mean KL divergence of a position, both scalars; the mean entropy per level, (L,)."""

    policy: Tensor
    divergence: Tensor
    entropy: Tensor


def position_states(model: EvoTokLlavaForConditionalGeneration, groups: DrawnGroups, run: Run | None = None) -> Tensor:
    """Hidden states (P, M, D) before the codes of every position.

    Where attention allows it, the drawings of a prompt are branches of one sequence, so that the prompt is computed
    once per group.

    Args:
        run: computes the forward pass instead of the model: the engine around it.
    """
    count, positions = groups.codes.shape[1], groups.codes.shape[2]
    ids, mask = groups.input_ids, groups.attention_mask.bool()
    prompts = model.get_input_embeddings()(ids)
    if model.new_token_rows is not None:
        prompts = model.new_token_rows.put_into(prompts, ids)
    place = torch.arange(positions, device=ids.device).repeat(len(ids) * count)
    written = model.embed_written(groups.codes.flatten(0, 2), place).unflatten(0, (len(ids), count, -1))
    written = written[:, :, :-1].to(prompts.dtype)  # nothing follows the last step
    layout = _branches if can_use_fixed_steps(model.language_model) else _rows
    hidden = layout(run or model, prompts, mask, written)  # (G, n, S, D)
    return hidden.reshape(len(ids) * count * positions, -1, hidden.shape[-1])


def _branches(run: Run, prompts: Tensor, mask: Tensor, written: Tensor) -> Tensor:
    """Hidden states (G, n, S, D) of prompts (G, T, D), each followed by its drawings (G, n, S - 1, D) as branches."""
    count, steps, length = written.shape[1], written.shape[2], prompts.shape[1]
    branch = torch.arange(count * steps, device=mask.device) // max(1, steps)
    branch = torch.cat([branch.new_full((length,), -1), branch])
    order = torch.arange(len(branch), device=mask.device)
    sees = (order[:, None] >= order) & ((branch == branch[:, None]) | (branch == -1))
    real = torch.cat([mask, mask.new_ones(len(mask), count * steps)], dim=1)
    sees = (sees & real[:, None]) | (order[:, None] == order)  # padding sees itself: a softmax over nothing is NaN
    place = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    after = (place[:, -1:] + 1 + torch.arange(steps, device=mask.device)).repeat(1, count)
    hidden = _run(run, torch.cat([prompts, written.flatten(1, 2)], dim=1), sees[:, None], torch.cat([place, after], 1))
    first = hidden[:, length - 1, None, None].expand(-1, count, -1, -1)
    return torch.cat([first, hidden[:, length:].unflatten(1, (count, steps))], dim=2)


def _rows(run: Run, prompts: Tensor, mask: Tensor, written: Tensor) -> Tensor:
    """Like `_branches`, with one row per drawing."""
    count, length = written.shape[1], prompts.shape[1]
    embeddings = torch.cat([prompts.repeat_interleave(count, dim=0), written.flatten(0, 1)], dim=1)
    real = mask.repeat_interleave(count, dim=0)
    real = torch.cat([real, real.new_ones(len(real), written.shape[2])], dim=1).long()
    hidden = _run(run, embeddings, real, (real.cumsum(dim=1) - 1).clamp(min=0))
    return hidden[:, length - 1 :].unflatten(0, (-1, count))


def _run(run: Run, embeddings: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    no_steps = position_ids.new_empty(0)  # no text is predicted
    return run(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=no_steps,
    ).last_hidden_state


def level_logits(model: EvoTokLlavaForConditionalGeneration, hidden: Tensor, codes: Tensor) -> list[Tensor]:
    """Teacher-forced logits of positions: hidden (P, M, D), codes (P, L) -> L tensors (P, K)."""
    tower = model.vision_tower
    if model.config.image_head == "flat":
        flat, codebooks = cast(FlatHead, model.image_head), tower.quantizer.codebooks
        return [flat.logits(hidden[:, level], level, codebooks) for level in range(codes.shape[1])]
    latents = tower.level_latents(codes[None])[0]
    return cast(DepthTransformerHead, model.image_head)(hidden[:, 0], latents.to(hidden.dtype))


def code_statistics(
    model: EvoTokLlavaForConditionalGeneration,
    hidden: Tensor,
    codes: Tensor,
    temperature: float = 1.0,
    reference: tuple[EvoTokLlavaForConditionalGeneration, Tensor] | None = None,
    max_logits: int = MAX_LOGITS,
) -> CodeStatistics:
    """Statistics of drawn codes (P, L) after hidden states (P, M, D), with about `max_logits` logits in memory.

    Args:
        temperature: that of the drawings.
        reference: the starting model and its hidden states (P, M, D); without it the divergence is 0.
    """
    rows = max(1, max_logits // (codes.shape[1] * model.config.vision_config.codebook_size))

    def compute(hidden: Tensor, codes: Tensor, of_reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = [one.float() / temperature for one in level_logits(model, hidden, codes)]
        others: list[Tensor] | list[None] = [None] * len(logits)
        if of_reference is not None:
            assert reference is not None
            with torch.no_grad():
                others = [one.float() / temperature for one in level_logits(reference[0], of_reference, codes)]
        columns = [_of_level(*each) for each in zip(logits, others, codes.unbind(1), strict=True)]
        chosen, divergence, entropy = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
        return chosen, divergence, entropy

    parts = []
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        of_reference = None if reference is None else reference[1][part]
        if len(codes) <= rows:
            parts.append(compute(hidden, codes, of_reference))
        else:
            parts.append(checkpoint(compute, hidden[part], codes[part], of_reference, use_reentrant=False))
    return CodeStatistics(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _of_level(logits: Tensor, of_reference: Tensor | None, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the codes, KL(policy || reference) and entropy of logits (P, K), each (P,)."""
    scores = logits.log_softmax(dim=-1)
    chosen = scores.gather(1, codes[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(scores.exp() * scores).sum(dim=-1)
    if of_reference is None:
        return chosen, torch.zeros_like(entropy), entropy
    divergence = (scores.exp() * (scores - of_reference.log_softmax(dim=-1))).sum(dim=-1)
    return chosen, divergence, entropy


def policy_loss(
    model: EvoTokLlavaForConditionalGeneration,
    groups: DrawnGroups,
    advantages: Tensor,
    temperature: float = 1.0,
    reference: EvoTokLlavaForConditionalGeneration | None = None,
    run: Run | None = None,
) -> PolicyLoss:
    """The loss of one update per drawing, so that the ratio to the policy that drew is 1.

    It is the mean over drawings of -advantage * log-probability of all codes / N.

    Args:
        advantages: (G, n).
        reference, run: as in `code_statistics` and `position_states`.
    """
    hidden, codes = position_states(model, groups, run), groups.codes.flatten(0, 2)
    start = None
    if reference is not None:
        with torch.no_grad():
            start = reference, position_states(reference, groups)
    statistics = code_statistics(model, hidden, codes, temperature, start)
    positions = groups.codes.shape[2]
    chosen = statistics.log_probabilities.sum(dim=1).view(-1, positions).mean(dim=1)  # per position of a drawing
    return PolicyLoss(
        policy=-(advantages.flatten().to(chosen) * chosen).mean(),
        divergence=statistics.divergence.sum(dim=1).mean(),
        entropy=statistics.entropy.mean(dim=0),
    )
