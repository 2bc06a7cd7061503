"""The code base `llava` of this environment, tiny models of it, and images; without it all checks are skipped.

The vision tower is that of the included model: a real folder that needs no other version of transformers.
"""

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOWER = ROOT / "llava_ext" / "pretrained" / "scenes"
KINDS = {"llama": "Llama", "qwen": "Qwen"}
TEXT = "What is in this image? A red circle is above a blue square; the ring is left of it. USER: ASSISTANT: two"


def reason_to_skip(kind: str) -> str:
    """Why no model of this kind can be tested here; empty if it can."""
    from evotok_plugin import register_llava

    try:
        register_llava()
    except ImportError as error:
        return str(error)
    try:
        importlib.import_module(f"llava.model.language_model.llava_{kind}")
    except ImportError as error:
        return f"this llava has no working llava_{kind}: {error}"
    return ""


@dataclass
class Host:
    """A kind of LLaVA model and its classes."""

    kind: str
    config_class: type
    model_class: type

    @property
    def is_next(self) -> bool:
        """Whether the code base is LLaVA-NeXT."""
        return importlib.util.find_spec("llava.model.multimodal_resampler") is not None

    def language_model(self, **settings):
        """A tiny random model without a tower."""
        torch.manual_seed(0)
        config = self.config_class(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            **settings,
        )  # fmt: skip
        config.tokenizer_padding_side, config.tokenizer_model_max_length = "right", 4096
        return self.model_class(config).eval()

    def model(self, tower=TOWER, **settings):
        """A tiny random model with the vision tower, as the code base builds it in training."""
        model = self.language_model()
        options = {"mm_patch_merge_type": "flat", **settings}
        model.get_model().initialize_vision_modules(
            SimpleNamespace(
                vision_tower=str(tower), mm_vision_select_layer=-1, mm_vision_select_feature="patch",
                pretrain_mm_mlp_adapter=None, mm_projector_type="mlp2x_gelu", add_faster_video=False, **options,
            )
        )  # fmt: skip
        for name, value in options.items():
            setattr(model.config, name, value)
        model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
        return model


@pytest.fixture(scope="session", params=list(KINDS))
def host(request):
    kind = request.param
    if reason := reason_to_skip(kind):
        pytest.skip(reason)
    module = importlib.import_module(f"llava.model.language_model.llava_{kind}")
    config = module.LlavaConfig if kind == "llama" else module.LlavaQwenConfig
    return Host(kind, config, getattr(module, f"Llava{KINDS[kind]}ForCausalLM"))


@pytest.fixture
def words(host, tmp_path):
    """The folder of a small text tokenizer for the kind of model."""
    from transformers import AutoTokenizer

    folder = tmp_path / "words"
    folder.mkdir()
    if host.kind == "llama":
        sentencepiece = pytest.importorskip("sentencepiece")
        (folder / "text.txt").write_text("\n".join([TEXT] * 20))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300, byte_fallback=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    else:
        from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

        symbols = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values()]
        (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": "<pad>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        AutoTokenizer.from_pretrained(folder, use_fast=False)
    except Exception as error:  # transformers 5 converts this file, which depends on protobuf
        pytest.skip(f"the transformers of this environment cannot read a sentencepiece tokenizer: {error}")
    return folder


@pytest.fixture(scope="session")
def pictures():
    """A square, a wide and a tall image."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((48, 48), (60, 120), (130, 70))
    ]


@pytest.fixture
def host_environment():
    """Environment variables of a process that imports the same code."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
