"""Export a model with the flat head as a plain causal LM, for transformers' `AutoModelForCausalLM` or any LLM server.

The embedding and output tables hold the rows of the residual tokens at their ids, and the BPE of the tokenizer has them
as tokens. Weights cannot express the order of levels, so the README in the folder explains it.

V rows of the backbone's tables, L levels, K codebook_size, D LLM width.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.templates import open_template
from evotok_plugin.errors import UserError
from llava_ext.export import residual_tokenizer
from llava_ext.flat_head import FlatHead
from llava_ext.generation.options import DrawingOptions, store_settings
from llava_ext.model_folder import load_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.vocabulary import ResidualVocabulary

EVOTOK_FOLDER = "evotok"  # subfolder of the image tokenizer, which decodes residual tokens to images
# Our logits are plain products with the output rows; these settings would make the backbone's class scale them.
_SCALES_OF_LOGITS = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
_TEXT_FORM = r"<\|evo:[0-9]+:[0-9]+\|>"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel


def export_causal_lm(folder: str | Path, output: str | Path, dtype: torch.dtype | str = "auto") -> None:
    """Write a trained model with the flat head as a plain causal LM.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of the weights; "auto" keeps the saved dtype.

    Raises:
        UserError: the folder is not a complete model or has another head, residual tokens cannot be added to its
            language model or tokenizer, or the output exists or cannot be written.
    """
    model, processor = load_flat_model(folder, "causal-lm", dtype)
    tokenizer = with_residual_tokens(processor.tokenizer, model.vocabulary)
    facts = card_facts(model, processor)
    card = open_template("llava_ext.export", "causal_lm_card.md.jinja").render(facts)
    causal = as_causal_lm(model)

    def write(out: Path) -> None:
        causal.save_pretrained(out, max_shard_size="5GB")
        save_tokenizer(tokenizer, out)
        save_image_tokenizer(model, processor, out)
        (out / "README.md").write_text(card, encoding="utf-8")

    write_whole_folder(output, write)


def load_flat_model(
    folder: str | Path, export_format: str, dtype: torch.dtype | str
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Load a model with the flat head and its processor.

    Args:
        export_format: the value of --format that requires this head.
        dtype: as in `load_model`.

    Raises:
        UserError: the folder is not a complete model or has another head.
    """
    model, processor = load_model(folder, dtype)
    if model.config.image_head != "flat":
        raise UserError(
            f"{str(folder)!r} draws with a depth transformer, which a plain causal LM does not have; train a model "
            f"with --image_head flat (recipes pretrain_flat and finetune_flat), or omit --format {export_format}"
        )
    return model, processor


def save_image_tokenizer(
    model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor, folder: Path
) -> None:
    """Write the image tokenizer, which decodes residual tokens to images, to a subfolder."""
    model.vision_tower.save_pretrained(folder / EVOTOK_FOLDER)
    processor.image_processor.save_pretrained(folder / EVOTOK_FOLDER)


# The model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def as_causal_lm(model: EvoTokLlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model with the rows of the residual tokens in its tables.

    It reuses the backbone of `model`: do not use that object afterwards.

    Raises:
        UserError: the backbone's embedding layer is not a plain table.
    """
    embeddings, vocabulary, codebooks = (
        model.get_input_embeddings(),
        model.vocabulary,
        model.vision_tower.quantizer.codebooks,
    )
    if type(embeddings) is not nn.Embedding:
        raise UserError(
            f"the {model.config.text_config.model_type} backbone embeds tokens through {type(embeddings).__name__}, "
            "which would also change the rows of residual tokens; expected a plain embedding table"
        )
    assert isinstance(model.image_head, FlatHead)
    head, dtype = model.image_head.float(), embeddings.weight.dtype
    tables = [
        _table(text.weight, rows.to(dtype), vocabulary)
        for text, rows in ((embeddings, head.input_rows(codebooks)), (model.lm_head, head.output_rows(codebooks)))
    ]
    config = copy.deepcopy(model.config.text_config)
    config.vocab_size, config.tie_word_embeddings = tables[0].shape[0], False
    for name, neutral in _SCALES_OF_LOGITS.items():
        if hasattr(config, name):
            setattr(config, name, neutral)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
        classifier = nn.Linear(tables[1].shape[1], tables[1].shape[0], bias=False)
    setattr(causal, causal.base_model_prefix, model.language_model)
    causal.set_input_embeddings(nn.Embedding.from_pretrained(tables[0], freeze=False))
    classifier.weight = nn.Parameter(tables[1])
    causal.set_output_embeddings(classifier)
    store_settings(model.generation_config)
    causal.generation_config = model.generation_config
    return causal.eval()


def _table(text: Tensor, residual: Tensor, vocabulary: ResidualVocabulary) -> Tensor:
    """Combine the rows of text (V, D) and of residual tokens (L, K, D) in one table, each row at its id.

    Unused ids get the mean of the text rows: its logit is the mean of theirs and never the largest.
    """
    end = vocabulary.offset + vocabulary.size
    table = text.mean(dim=0).repeat(max(text.shape[0], end), 1)
    table[: text.shape[0]] = text
    table[vocabulary.offset : end] = residual.flatten(0, 1)
    return table


# The tokenizer -----------------------------------------------------------------------------------------------


def with_residual_tokens(tokenizer: Any, vocabulary: ResidualVocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer with the residual tokens in the vocabulary of its BPE, where a hundred thousand of them load at
    once; as added tokens they take many seconds.

    Raises:
        UserError: the tokenizer is not a BPE, or its steps would split residual tokens or read other text differently.
    """
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = facts["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"the tokenizer is a {bpe['type']} model; residual tokens can only be added to a BPE")
    for token_id in range(vocabulary.offset, vocabulary.offset + vocabulary.size):
        bpe["vocab"][vocabulary.to_text(token_id)] = token_id
    for token in facts["added_tokens"]:  # otherwise they get new ids after the vocabulary
        bpe["vocab"].setdefault(token["content"], token["id"])
    bpe["ignore_merges"] = True  # a word in the vocabulary is one token
    facts |= {"pre_tokenizer": _isolating(facts["pre_tokenizer"]), "padding": None, "truncation": None}
    grown = Tokenizer.from_str(json.dumps(facts))
    _check_tokenizer(tokenizer.backend_tokenizer, grown, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=grown,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


def _isolating(pre_tokenizer: dict | None) -> dict:
    """A pre-tokenizer that first isolates the text forms of residual tokens and then never splits them."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    first = _isolated(_TEXT_FORM)
    return {"type": "Sequence", "pretokenizers": [first, *(one for step in steps for one in _sparing(step))]}


def _isolated(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sparing(step: dict) -> list[dict]:
    """Steps equivalent to one step of a pre-tokenizer, except that they never split the text form of a token."""
    if step["type"] == "ByteLevel" and step["use_regex"]:
        return [*_sparing(_isolated(_GPT2_WORDS)), step | {"use_regex": False}]
    if step["type"] == "Digits":
        return _sparing(_isolated(r"\p{N}" if step["individual_digits"] else r"\p{N}+"))
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        return [step | {"pattern": {"Regex": f"{_TEXT_FORM}|{step['pattern']['Regex']}"}}]
    return [step]


def _check_tokenizer(before: Tokenizer, after: Tokenizer, vocabulary: ResidualVocabulary) -> None:
    """Check that the text of every token is read as before, and that residual tokens are read as themselves in any
    context."""
    ids = [vocabulary.offset + level * vocabulary.codebook_size for level in range(vocabulary.num_levels)]
    ids += [vocabulary.offset + vocabulary.size - 1, vocabulary.offset]
    forms = "".join(map(vocabulary.to_text, ids))
    for text in (forms, f"word{forms}word 7", f"two words {forms} <|{forms}", f"{forms}\n"):
        read = after.encode(text, add_special_tokens=False).ids
        if [token for token in read if token in ids] != ids * text.count(forms):
            raise UserError(f"the tokenizer's steps split residual tokens: {text!r} is read as {read}")
    words = before.decode_batch([[token] for token in sorted(before.get_vocab().values())], skip_special_tokens=False)
    pairs = zip(*(one.encode_batch_fast(words, add_special_tokens=False) for one in (before, after)), strict=True)
    changed = [word for word, (old, new) in zip(words, pairs, strict=True) if old.ids != new.ids]
    if changed:
        raise UserError(
            f"with residual tokens in its vocabulary the tokenizer would read {len(changed)} words differently, e.g. "
            f"{changed[0]!r}: its merges do not produce its own tokens"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer` loads it unchanged.

    For some model types transformers ignores the tokenizer class in the folder and builds the usual class of that type
    from the vocabulary alone, without the rule that never splits residual tokens. It does not do so if the folder names
    custom code. Our custom code is an empty subclass of the general tokenizer, which is also what loads without
    `trust_remote_code`.

    Raises:
        UserError: the installed transformers nevertheless loads another tokenizer from the folder.
    """
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to all versions of transformers
    settings["auto_map"] = {"AutoTokenizer": [None, "residual_tokenizer.ResidualTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    code = inspect.getsource(residual_tokenizer)
    (folder / "residual_tokenizer.py").write_text(code, encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    if loaded.to_str() != tokenizer.backend_tokenizer.to_str():
        raise UserError(
            f"transformers {transformers.__version__} does not load the tokenizer as it was written; export with "
            "another version, such as 5.23"
        )


# The README --------------------------------------------------------------------------------------------------


def card_facts(model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor) -> dict[str, Any]:
    """Values of the README's template: ids, counts and the settings of drawing."""
    vision, vocabulary = model.config.vision_config, model.vocabulary
    settings = DrawingOptions().for_model(model).settings()
    # transformers takes one value of each setting, ours may have one per level or position.
    single = {name: value[0] if isinstance(value, tuple) else value for name, value in settings.items()}
    uniform = {"guidance_schedule": "constant", "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0}
    varying = {
        name: value
        for name, value in settings.items()
        if value != uniform.get(name, value) or (isinstance(value, tuple) and name not in uniform)
    }
    return {
        "first_id": vocabulary.offset,
        "num_levels": vocabulary.num_levels,
        "codebook_size": vocabulary.codebook_size,
        "num_positions": vision.num_positions,
        "image_size": vision.image_size,
        "start_id": processor.image_start_id,
        "end_id": processor.image_end_id,
        "placeholder_id": processor.image_token_id,
        "num_text_rows": model.lm_head.weight.shape[0],
        "guidance_scale": single["guidance_scale"],
        "greedy": single["temperature"] == 0,
        "sampling": {name: single[name] for name in ("temperature", "top_k", "top_p", "min_p")},
        "varying": varying,
    }
