"""Export a model with the flat head as a GGUF file for llama.cpp.

The weights and the tokens are those of the plain causal LM. A grammar beside the file forces one whole image in level
order.
"""

import json
from pathlib import Path
from typing import Any

import torch

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.templates import open_template
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from llava_ext.export.causal_lm import (
    as_causal_lm,
    card_facts,
    load_flat_model,
    save_image_tokenizer,
    with_residual_tokens,
)
from llava_ext.export.gguf_model import DTYPES, check_backbone, write_gguf
from llava_ext.export.gguf_vocabulary import GgufVocabulary, gguf_vocabulary, rivals_of_residual_tokens
from llava_ext.processing_evotok_llava import IMAGE_END_TOKEN
from llava_ext.vocabulary import ResidualVocabulary

MODEL_FILE, GRAMMAR_FILE = "model.gguf", "image.gbnf"
_NEVER = -1000  # a bias that no logit outweighs


def export_gguf(folder: str | Path, output: str | Path, dtype: str = "auto") -> None:
    """Write a trained model with the flat head as a folder with a GGUF file, a grammar and the image tokenizer.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of the matrices, a key of `DTYPES`; "auto" is float32.

    Raises:
        UserError: the package gguf is not installed, the folder is not a complete model or has another head, llama.cpp
            cannot compute its language model or tokenize as its tokenizer does, or the output exists or cannot be
            written.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf: pip install 'evotok[gguf]'") from error
    model, processor = load_flat_model(folder, "gguf", torch.float32)
    check_backbone(model.config.text_config)
    tokenizer, residual = processor.tokenizer, model.vocabulary
    with_residual_tokens(tokenizer, residual)  # checks that words of the vocabulary are single tokens
    facts = card_facts(model, processor)  # `model` is not whole after `as_causal_lm`
    ends = torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist()
    grammar = image_grammar(model.config.vision_config, residual)
    causal = as_causal_lm(model)
    vocabulary = gguf_vocabulary(tokenizer, residual, causal.config.vocab_size)
    stored = "float32" if dtype == "auto" else dtype
    card = _card(facts, vocabulary, residual, stored)

    def write(out: Path) -> None:
        write_gguf(out / MODEL_FILE, causal, vocabulary, tokenizer, ends, DTYPES[stored])
        save_image_tokenizer(model, processor, out)
        (out / GRAMMAR_FILE).write_text(grammar, encoding="utf-8")
        (out / "README.md").write_text(card, encoding="utf-8")

    write_whole_folder(output, write)


def image_grammar(vision: EvoTokConfig, residual: ResidualVocabulary) -> str:
    """GBNF grammar of one whole image: the residual tokens of all positions in level order, then the end token.

    Rows and positions are separate rules because llama.cpp limits the number of repetitions in one rule.
    """
    levels = range(residual.num_levels)
    rules = [
        f'root ::= row{{{vision.grid_size}}} "{IMAGE_END_TOKEN}"',
        f"row ::= position{{{vision.grid_size}}}",
        f"position ::= {' '.join(f'level-{level}' for level in levels)}",
        *(f'level-{level} ::= "<|evo:{level}:" [0-9]+ "|>"' for level in levels),
    ]
    return "\n".join(rules) + "\n"


def _card(facts: dict[str, Any], vocabulary: GgufVocabulary, residual: ResidualVocabulary, dtype: str) -> str:
    firsts = (residual.to_text(residual.offset + i * residual.codebook_size) for i in range(residual.num_levels))
    rivals = rivals_of_residual_tokens(vocabulary, [*firsts, IMAGE_END_TOKEN])
    bias = json.dumps([[token_id, _NEVER] for token_id in rivals])
    return open_template("llava_ext.export", "gguf_card.md.jinja").render(facts, rivals=rivals, bias=bias, dtype=dtype)
