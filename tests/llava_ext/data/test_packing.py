"""Packed rows: assignment of samples to rows, and losses equal to those of separate samples."""

import copy

import numpy as np
import pytest
import torch
from mixed_samples import CONVERSATIONS, gradients, make_sample, naive_sums, pooled
from torch.utils.data import DataLoader

from llava_ext.data.collators import Collator, PackedCollator
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.packing import PackedDataset, pack_lengths
from llava_ext.data.records import Record
from llava_ext.data.samplers import PackingSampler
from llava_ext.folding import fold_residual_tokens, segment_starts
from llava_ext.packed_attention import find_segments

KINDS = list(CONVERSATIONS)


# Assignment of samples to rows ----------------------------------------------------------------------------------


def naive_best_fit(lengths, capacity):
    """Best fit that tries every row for every sample."""
    rows, room = [], []
    for index in range(len(lengths)):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[index]]
        if not fitting:
            rows.append([])
            room.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda r: room[r])
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_equals_a_naive_best_fit(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, size=300)
    rows = pack_lengths(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(300))
    sums = sorted(int(lengths[row].sum()) for row in rows)
    assert max(sums) <= 100
    assert sums == sorted(int(lengths[row].sum()) for row in naive_best_fit(lengths.tolist(), 100))


def test_rows_of_a_shuffled_order_are_mixtures_of_all_lengths(rng):
    lengths = rng.permutation(np.repeat([20, 25, 45, 61], 500))
    rows = pack_lengths(lengths, 1024)
    assert lengths.sum() > 0.98 * 1024 * len(rows)
    mixed = [len({*lengths[row]}) == 4 for row in rows]
    assert np.mean(mixed) > 0.95


def test_lengths_that_fill_rows_exactly_leave_no_padding():
    assert sorted(map(sorted, pack_lengths([3, 7, 5, 5, 10], 10))) == [[0, 1], [2, 3], [4]]
    assert pack_lengths([], 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_a_sample_that_does_not_fit_a_row_is_an_error(length):
    with pytest.raises(ValueError, match=f"sample 1 has {length} steps, but a row holds 1 to 10"):
        pack_lengths([5, length], 10)


def rows_of(lengths, epoch, seed=0, capacity=64):
    return list(PackingSampler(lengths, capacity, seed, lambda: epoch))


def test_epochs_have_the_same_number_of_rows_and_every_sample_equally_often(rng):
    lengths = rng.integers(5, 40, size=200)
    epochs = [rows_of(lengths, epoch) for epoch in range(3)]
    assert sorted(index for row in epochs[0] for index in row) == list(range(200))
    assert {len(rows) for rows in epochs} == {len(PackingSampler(lengths, 64, 0, lambda: 0))}
    times = np.bincount([index for rows in epochs for row in rows for index in row], minlength=200)
    assert times.min() >= 2 and times.max() <= 4 and np.mean(times == 3) > 0.9
    assert len({frozenset(map(frozenset, rows)) for rows in epochs}) == 3
    assert epochs[0] != rows_of(lengths, 0, seed=1)


def test_a_resumed_epoch_repeats_its_rows(rng):
    """The trainer's epoch is fractional; it skips finished rows by number."""
    lengths = rng.integers(5, 40, size=200)
    assert rows_of(lengths, 1.37) == rows_of(lengths, 1)


def test_efficiency_is_the_fraction_of_steps_that_hold_samples(rng):
    lengths = rng.integers(5, 40, size=200)
    sampler = PackingSampler(lengths, 64, 0, lambda: 0)
    assert sampler.efficiency == pytest.approx(lengths.sum() / (64 * len(list(sampler))))
    assert sampler.efficiency > 0.95


def test_rows_beyond_the_length_of_an_epoch_move_to_the_next():
    """With weighted sources, epochs have different samples, but no row is lost."""
    lengths, orders = [60, 60, 10, 10], {0: [0, 2, 2, 3], 1: [0, 1, 1, 2], 2: [0, 0, 1, 3]}
    apart = [
        list(PackingSampler(lengths, 64, 0, lambda: 0, lambda _, e=epoch: np.array(orders[e]))) for epoch in orders
    ]
    assert [len(rows) for rows in apart] == [2, 4, 4]
    cut = [list(PackingSampler(lengths, 64, 0, lambda e=e: e, lambda epoch: np.array(orders[epoch]))) for e in range(5)]
    assert all(len(rows) == 2 for rows in cut)
    used = sorted(index for rows in cut for row in rows for index in row)
    assert used == sorted(index for order in orders.values() for index in order)


class Codes:
    """A code cache of random codes."""

    def __init__(self, vision):
        self._vision = vision

    def codes(self, name):
        shape = (self._vision.num_positions, self._vision.num_quantizers)
        return torch.randint(self._vision.codebook_size, shape, generator=torch.Generator().manual_seed(len(name)))


def records():
    made = []
    for number, (kind, turns) in enumerate(CONVERSATIONS.items()):
        messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
        drawn = [m["role"] == "assistant" for m in messages for _ in range(m["content"].count("<image>"))]
        images = [f"{number}-{i}" * (i + 1) for i in range(len(drawn))]
        made.append(Record(kind, tuple(messages), tuple(images), tuple(drawn)))
    return made


# Losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lively(any_mllm):
    """The small model with weights so large that attention between samples changes their losses."""
    model, processor = copy.deepcopy(any_mllm[0]), any_mllm[1]
    with torch.no_grad():
        for module in model.language_model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(12)
    return model, processor


@pytest.fixture(scope="module")
def rows(lively):
    """Two rows of different lengths, the shorter one padded, with samples of every kind."""
    samples = [make_sample(*lively, kind, seed=index) for index, kind in enumerate(KINDS)]
    return [samples[:5], samples[5:]]


def num_steps(model, sample):
    fold = model.config.image_head == "depth"
    return fold_residual_tokens(model.vocabulary, sample.input_ids[None], None, None, fold=fold).input_ids.shape[1]


@torch.no_grad()
def test_packed_losses_equal_separate_losses(lively, rows):
    model, processor = lively
    batch = PackedCollator(processor)(rows)
    assert (batch["segment_ids"][:, -1] == 0).sum() == 1, "one row is padded"
    packed, flat = model(**batch), [sample for row in rows for sample in row]
    apart = model(**Collator(processor)(flat))
    for name in ("text_loss", "image_loss", "num_text_tokens", "num_image_positions"):
        torch.testing.assert_close(packed[name], apart[name], atol=1e-5, rtol=1e-5)
    naive = pooled([naive_sums(model, sample) for sample in flat])
    torch.testing.assert_close((packed.text_loss, packed.image_loss), naive, atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_separate_gradients(lively, rows):
    model, processor = lively
    packed = gradients(model, model(**PackedCollator(processor)(rows)).loss)
    apart = gradients(model, model(**Collator(processor)([sample for row in rows for sample in row])).loss)
    for name, gradient in apart.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(packed[name], gradient, atol=1e-5 * scale + 1e-8, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_sample_does_not_see_the_previous_one(lively, rows):
    model, processor = lively
    before, sample = rows[0][KINDS.index("text")], rows[1][0]
    other = copy.deepcopy(before)
    other.input_ids[2:5] = 9
    states = [model(**PackedCollator(processor)([[b, sample]])).last_hidden_state[0] for b in (before, other)]
    cut = num_steps(model, before)
    assert (states[0][cut - 1] - states[1][cut - 1]).abs().max() > 0.01, "the change is seen within its own sample"
    torch.testing.assert_close(states[0][cut:], states[1][cut:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_segments_the_samples_would_see_each_other(lively, rows):
    """Attention between samples changes the losses by far more than the tolerance of the tests above."""
    model, processor = lively
    batch = PackedCollator(processor)(rows)
    packed = model(**batch)
    leaking = model(**batch | {"segment_ids": None, "attention_mask": (batch["segment_ids"] > 0).long()})
    assert abs(packed.text_loss - leaking.text_loss) > 1e-4 and abs(packed.image_loss - leaking.image_loss) > 1e-4


@torch.no_grad()
def test_the_first_token_of_a_sample_is_not_learned_from_the_previous_one(lively, rows):
    model, processor = lively
    all_learned = [[copy.deepcopy(sample) for sample in row] for row in rows]
    for row in all_learned:
        for sample in row:
            sample.labels = sample.input_ids.clone()
    flat = [sample for row in all_learned for sample in row]
    packed = model(**PackedCollator(processor)(all_learned))
    apart = model(**Collator(processor)(flat))
    for sample in flat:  # placeholders are never learned
        sample.labels[sample.input_ids == model.config.image_token_id] = -100
    assert int(packed.num_text_tokens) == sum(naive_sums(model, sample).num_text for sample in flat)
    torch.testing.assert_close(packed.text_loss, apart.text_loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("backbone", "window"), [("qwen3", None), ("llama", None), ("mistral", None), ("mistral", 12)])
def test_packed_losses_equal_separate_losses_for_other_backbones_and_attentions(
    backbone, attention, window, make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path
):
    """Attention per sample with SDPA, a block-diagonal mask otherwise, and a window shorter than a sample."""
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    model, processor = assemble(make_backbone(tiny_tokenizer_folder, tmp_path, backbone), tiny_evotok_folder, 32, 2, 2)
    model.language_model.set_attn_implementation(attention)
    if backbone == "mistral":
        model.language_model.config.sliding_window = window
    samples = [make_sample(model, processor, kind) for kind in KINDS]
    packed = model.eval()(**PackedCollator(processor)([samples[:6], samples[6:]]))
    torch.testing.assert_close(packed.loss, model(**Collator(processor)(samples)).loss, atol=1e-5, rtol=1e-5)


def test_segments_are_the_samples_and_the_padding_of_each_row():
    starts = segment_starts(torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]]))
    assert find_segments(starts) == [(0, 0, 2), (0, 2, 3), (0, 3, 4), (1, 0, 1), (1, 1, 4)]


def test_no_step_is_attended_to_from_another_sample(lively, rows, monkeypatch):
    """SDPA runs per sample; a block-diagonal mask over the row would take memory quadratic in its length."""
    from llava_ext import packed_attention

    model, processor = lively
    seen, forward = [], packed_attention.sdpa_attention_forward

    def watch(module, query, key, value, mask, **kwargs):
        seen.append((query.shape[2], key.shape[2], mask))
        return forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", watch)
    with torch.no_grad():
        model(**PackedCollator(processor)(rows))
    longest = max(num_steps(model, sample) for row in rows for sample in row)
    assert seen and all(mask is None and num_keys <= longest for _, num_keys, mask in seen)


def test_gradient_checkpointing_keeps_samples_separate(lively, rows):
    model, processor = lively
    batch = PackedCollator(processor)(rows)
    expected = gradients(model, model(**batch).loss)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    found = gradients(checkpointed, checkpointed(**batch).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_packed_losses_equal_separate_losses_with_adapters(lively, rows):
    from peft import LoraConfig, get_peft_model

    model, processor = copy.deepcopy(lively[0]), lively[1]
    of_head = {"tied": ["outputs.0"], "free": ["inputs.1", "classifiers.0"]}[model.config.residual_embeddings]
    if model.config.image_head == "depth":
        of_head = ["from_hidden", "classifiers.0.1"]
    layers = ["q_proj", "down_proj", "lm_head", *of_head]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers, init_lora_weights=False)).eval()
    packed = adapted(**PackedCollator(processor)(rows))
    apart = adapted(**Collator(processor)([sample for row in rows for sample in row]))
    torch.testing.assert_close(packed.loss, apart.loss, atol=1e-5, rtol=1e-5)
    assert abs(packed.loss - lively[0](**PackedCollator(processor)(rows)).loss) > 1e-2


@torch.no_grad()
def test_packed_batches_do_not_change_later_generation(tiny_mllm, rows):
    fresh, (packed, processor) = tiny_mllm[0], (copy.deepcopy(tiny_mllm[0]), tiny_mllm[1])
    packed(**PackedCollator(processor)(rows))
    inputs = processor.user_turns(["What is a ring?", "What is a blue square, and where?"])
    answers = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for model in (fresh, packed)]
    assert torch.equal(*answers)
    pictures = [np.asarray(model.generate_images("a ring", processor)[0]) for model in (fresh, packed)]
    assert (pictures[0] == pictures[1]).all()


def flash_reference(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **kwargs):
    """A naive version of the varlen kernel of flash-attention, which takes one row without padding."""
    assert attention_mask is None and query.shape[0] == 1 and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert cu_seq_lens_q.dtype == torch.int32 and int(cu_seq_lens_q[-1]) == query.shape[2]
    assert max_length_q == int(cu_seq_lens_q.diff().max())
    groups, outputs = query.shape[1] // key.shape[1], []
    for start, end in cu_seq_lens_q.unfold(0, 2, 1).tolist():
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@torch.no_grad()
def test_flash_attention_gets_one_row_with_sample_boundaries(lively, rows, monkeypatch):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    model, processor = lively
    AttentionInterface.register("flash_reference", flash_reference)
    AttentionMaskInterface.register("flash_reference", flash_attention_mask)
    batch = PackedCollator(processor)(rows)
    expected = model(**batch)
    # Past the setter, which would look for an installed kernel of that name.
    monkeypatch.setattr(model.language_model.config, "_attn_implementation_internal", "flash_reference")
    found = model(**batch)
    assert found.last_hidden_state.shape[:2] == (1, sum(num_steps(model, s) for row in rows for s in row))
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_segments_and_a_mask_together_are_rejected(lively, rows):
    model, processor = lively
    batch = PackedCollator(processor)(rows)
    with pytest.raises(ValueError, match="segment_ids replace attention_mask"):
        model(**batch, attention_mask=(batch["segment_ids"] > 0).long())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_packed_batches(tiny_mllm, num_workers):
    model, processor = tiny_mllm
    dataset = ConversationDataset(records() * 4, processor, Codes(model.config.vision_config), prompt_dropout=0.5)
    loader = DataLoader(
        PackedDataset(dataset),
        sampler=PackingSampler(dataset.lengths, 100, seed=0, epoch_of=lambda: 0),
        batch_size=2,
        collate_fn=PackedCollator(processor),
        num_workers=num_workers,
    )
    num_samples = 0
    for batch in loader:
        folded = fold_residual_tokens(model.vocabulary, batch["input_ids"], None, None, batch["segment_ids"])
        assert folded.input_ids.shape[1] <= 100
        num_samples += int(batch["segment_ids"].amax(dim=1).sum())
        with torch.no_grad():
            assert torch.isfinite(model(**batch).loss)
    assert num_samples == len(dataset)
