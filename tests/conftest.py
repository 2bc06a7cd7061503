"""Fixtures of the entire suite: tiny random models, created once; a single thread, because tests are small."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=300, help="damaged inputs of each kind in the slow tests")


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer trained on scene texts, saved to a folder."""
    from evotok_plugin.scenes.records import text_records
    from llava_ext.embedded.text_backbone import train_text_tokenizer

    texts = [turn["value"] for record in text_records(200, seed=0) for turn in record["conversations"]]
    folder = tmp_path_factory.mktemp("text_tokenizer")
    train_text_tokenizer(texts, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone_folder(tiny_tokenizer_folder, tmp_path_factory):
    """A random two-layer causal LM of type Qwen2 with its BPE tokenizer."""
    return write_backbone(tiny_tokenizer_folder, tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def make_backbone():
    """A function `make_backbone(tokenizer_folder, folder, model_type, **settings)` that saves a random causal LM."""
    return write_backbone


def write_backbone(tokenizer_folder, folder, model_type: str = "qwen2", **settings):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    extra = {"head_dim": 16} if model_type in ("qwen3", "gemma2") else {}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_evotok_folder(tmp_path_factory):
    """A random tiny EvoTok tokenizer with its image processor."""
    from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel

    torch.manual_seed(0)
    config = EvoTokConfig.preset("tiny")
    folder = tmp_path_factory.mktemp("evotok")
    EvoTokModel(config).save_pretrained(folder)
    EvoTokImageProcessor(size=config.image_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mllm(tiny_backbone_folder, tiny_evotok_folder):
    """A random EvoTok-LLaVA model and its processor; tests must not change its weights."""
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    model, processor = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2)
    return model.eval(), processor


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """A small scene corpus."""
    from evotok_plugin.scenes.corpus import write_corpus

    folder = tmp_path_factory.mktemp("scenes")
    write_corpus(folder, num_train=24, num_val=6, seed=3)
    return folder


@pytest.fixture
def rng():
    return np.random.default_rng(0)
