"""Weights that ZeRO-3 partitions among ranks are available where the forward pass of the model uses them."""

import os
from functools import partial

import pytest
import torch
from mixed_samples import make_sample
from stage_runs import run_forked

from llava_ext.assembly import assemble
from llava_ext.data.collators import Collator, PackedCollator

BATCHES = (["text", "draw two", "text"], ["read two", "text"])  # per rank: different kinds and numbers of chunks


def build(folders):
    from evotok_plugin import image_head
    from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
    from llava_ext import modeling_evotok_llava

    for module in (image_head, modeling_evotok_llava):
        module.chunked_cross_entropy = partial(chunked_cross_entropy, max_logits=2000)
    torch.manual_seed(0)
    model, processor = assemble(*folders, 32, 2, 2)
    return model.train(), processor


def make_batch(model, processor, rank, packed):
    samples = [make_sample(model, processor, kind, seed=i) for i, kind in enumerate(BATCHES[rank])]
    return PackedCollator(processor)([samples]) if packed else Collator(processor)(samples)


def train_partitioned(folders, packed):
    """Two steps of SGD by DeepSpeed; returns the losses and the complete weights."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model, processor = build(folders)
    batch = make_batch(model, processor, deepspeed.comm.get_rank(), packed)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    losses = []
    for _ in range(2):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {}
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters(weight):
            weights[name] = weight.detach().clone().numpy()
    return losses, weights


@pytest.mark.parametrize("packed", [False, True])
def test_two_ranks_with_partitioned_weights_equal_one_process(packed, tiny_backbone_folder, tiny_evotok_folder):
    folders = (tiny_backbone_folder, tiny_evotok_folder)
    losses, weights = run_forked(train_partitioned, folders, packed, world_size=2)
    model, processor = build(folders)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    expected = []
    for _ in range(2):
        parts = [model(**make_batch(model, processor, rank, packed)).loss for rank in range(2)]
        optimizer.zero_grad()
        torch.stack(parts).mean().backward()
        optimizer.step()
        expected.append(float(parts[0].detach()))
    assert losses == pytest.approx(expected, abs=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(weights[name]), weight.detach(), atol=1e-5, rtol=1e-4, msg=name)
