"""Tiny random models with every image head."""

import pytest
import torch


def make_mllm(backbone, evotok, head: str):
    """A random model and its processor; `head` is "depth", "flat, tied" or "flat, free"."""
    from llava_ext.checkpointing import assemble

    torch.manual_seed(0)
    image_head, _, rows = head.partition(", ")
    model, processor = assemble(backbone, evotok, 32, 2, 2, image_head=image_head, residual_embeddings=rows or "tied")
    return model.eval(), processor


@pytest.fixture(scope="session", params=["flat, tied", "flat, free"])
def flat_mllm(request, tiny_backbone_folder, tiny_evotok_folder):
    """A model with the flat head, of either kind; tests must not change its weights."""
    return make_mllm(tiny_backbone_folder, tiny_evotok_folder, request.param)


@pytest.fixture(scope="session", params=["depth", "flat, tied", "flat, free"])
def any_mllm(request, tiny_backbone_folder, tiny_evotok_folder):
    """A model with each image head in turn; tests must not change its weights."""
    return make_mllm(tiny_backbone_folder, tiny_evotok_folder, request.param)


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    """A random model with its processor, saved."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder
