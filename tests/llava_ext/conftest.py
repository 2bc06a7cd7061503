"""Tiny random models with each image head, and backbones without image tokens."""

import pytest
import torch


def make_mllm(backbone, evotok, head: str):
    """Build a random model and its processor; `head` is "depth", "flat, tied" or "flat, free"."""
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    image_head, _, rows = head.partition(", ")
    model, processor = assemble(backbone, evotok, 32, 2, 2, image_head=image_head, residual_embeddings=rows or "tied")
    return model.eval(), processor


@pytest.fixture(scope="session", params=["flat, tied", "flat, free"])
def flat_mllm(request, tiny_backbone_folder, tiny_evotok_folder):
    """A model with each type of the flat head in turn; tests must not change its weights."""
    return make_mllm(tiny_backbone_folder, tiny_evotok_folder, request.param)


@pytest.fixture(scope="session", params=["depth", "flat, tied", "flat, free"])
def any_mllm(request, tiny_backbone_folder, tiny_evotok_folder):
    """A model with each image head in turn; tests must not change its weights."""
    return make_mllm(tiny_backbone_folder, tiny_evotok_folder, request.param)


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    """Folder of a saved random model with its processor."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign_tokenizer_folder(tiny_tokenizer_folder, tmp_path_factory):
    """Folder of a tokenizer like those of real LLMs: without image tokens, and padding with the end-of-turn token."""
    import json

    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from llava_ext.processing_evotok_llava import IMAGE_TOKENS

    known = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    facts = json.loads(known.backend_tokenizer.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] not in IMAGE_TOKENS]
    words = [word for word, _ in sorted(facts["model"]["vocab"].items(), key=lambda item: item[1])]
    kept = [word for word in words if word not in IMAGE_TOKENS]
    facts["model"]["vocab"] = {word: number for number, word in enumerate(kept)}
    for token in facts["added_tokens"]:
        token["id"] = facts["model"]["vocab"][token["content"]]
    end = known.eos_token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)),
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = known.chat_template
    folder = tmp_path_factory.mktemp("foreign_tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign_backbone_folder(foreign_tokenizer_folder, make_backbone, tmp_path_factory):
    """Folder of a causal LM without image tokens, with tied embeddings, that pads with the end-of-turn token."""
    folder = tmp_path_factory.mktemp("foreign_backbone")
    return make_backbone(foreign_tokenizer_folder, folder, "llama", tie_word_embeddings=True)
