"""Gradient checkpointing: less memory, the same gradients, and a single codebook update per step."""

import copy

import pytest
import torch

from evotok_plugin import EvoTokConfig, EvoTokModel

SIZES = {
    "image_size": 24, "patch_size": 6, "encoder_hidden_size": 64, "encoder_num_layers": 3, "encoder_num_heads": 2,
    "encoder_intermediate_size": 96, "codebook_dim": 6, "codebook_size": 20, "num_quantizers": 5, "pixel_depth": 4,
    "semantic_depth": 5, "pixel_latent_channels": 10, "decoder_channels": 16,
    "decoder_channel_multipliers": (1, 1, 2, 2), "decoder_num_res_blocks": 1, "decoder_norm_groups": 8,
    "semantic_hidden_size": 32, "semantic_num_layers": 2, "semantic_num_heads": 4, "semantic_head_dim": 8,
    "semantic_dim": 24, "codebook_warmup_steps": 0, "level_dropout": 0.5,
}  # fmt: skip


@pytest.fixture
def pair():
    """A model that stores its activations and a copy that recomputes them, in training mode."""
    torch.manual_seed(0)
    model = EvoTokModel(EvoTokConfig(**SIZES)).train()
    checkpointing = copy.deepcopy(model)
    checkpointing.gradient_checkpointing_enable()
    return model, checkpointing


def train_step(model):
    torch.manual_seed(1)  # dropped levels and restarted codes
    output = model(torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    loss = output.pixels.square().mean() + output.features.square().mean() + output.commitment_loss
    loss.backward()
    return loss


def saved_bytes(model):
    """Memory that the graph of a training step holds before the backward pass, without parameters."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps the storage alive, so that its address is not reused

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.rand(4, 3, 24, 24) * 2 - 1)
    assert output.pixels.requires_grad and output.features.requires_grad
    return sum(held.values())


def test_gradients_equal_those_with_stored_activations(pair):
    losses = [train_step(model) for model in pair]
    assert torch.equal(*losses)
    for (name, stored), recomputed in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert stored.grad is not None and torch.equal(stored.grad, recomputed.grad), name


def test_the_quantizer_learns_once_per_step(pair):
    for _ in range(2):
        for model in pair:
            train_step(model)
    before, after = (model.quantizer.learning_state() for model in pair)
    assert int(before["steps"]) == int(after["steps"]) == 2
    assert torch.equal(before["counts"], after["counts"])
    assert torch.equal(*(model.quantizer.codebooks for model in pair))


def test_fewer_activations_are_stored(pair):
    stored, checkpointed = map(saved_bytes, pair)
    assert checkpointed < 0.5 * stored


@pytest.mark.parametrize("part", ["encoder", "pixel_decoder", "semantic_decoder"])
def test_every_part_stores_less(pair, part):
    model, checkpointing = pair
    checkpointing.gradient_checkpointing_disable()
    before = saved_bytes(checkpointing)
    checkpointing.gradient_checkpointing_enable()
    for name, module in checkpointing.named_modules():
        if hasattr(module, "gradient_checkpointing") and not name.startswith(f"{part}."):
            module.gradient_checkpointing = False
    assert saved_bytes(checkpointing) < before == saved_bytes(model)


def test_weight_names_do_not_change(pair):
    model, checkpointing = pair
    assert list(model.state_dict()) == list(checkpointing.state_dict())
    checkpointing.load_state_dict(model.state_dict())


@torch.no_grad()
def test_evaluation_does_not_change(pair):
    pixel_values = torch.rand(2, 3, 24, 24) * 2 - 1
    outputs = [model.eval()(pixel_values) for model in pair]
    for name, value in outputs[0].items():
        assert torch.equal(value, outputs[1][name]), name
