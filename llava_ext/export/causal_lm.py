"""A model with the flat head as a plain causal LM: what transformers' `AutoModelForCausalLM`, or any LLM server, loads.

Its embedding and output tables hold the residual tokens' rows at their ids; its tokenizer knows them as tokens of its
BPE. What no weight can say, which level's turn it is, stands in the folder's README.

V rows of the backbone's tables, L levels, K codebook_size, D LLM width.
"""

import copy
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.errors import UserError
from llava_ext.generation.options import DrawingOptions, store_settings
from llava_ext.model_folder import load_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.vocabulary import ResidualVocabulary

EVOTOK_FOLDER = "evotok"  # the tokenizer, which turns residual tokens into pictures, within the model's folder
# Ours are the bare products with the output rows, whatever the backbone's own class would make of them.
_SCALES_OF_LOGITS = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
_TEXT_FORM = r"<\|evo:[0-9]+:[0-9]+\|>"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own pattern


def export_causal_lm(folder: str | Path, output: str | Path, dtype: torch.dtype | str = "auto") -> None:
    """Write a trained model with the flat head as a plain causal LM.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of the weights; "auto" leaves it.

    Raises:
        UserError: the folder is no whole model or has another head, its language model or tokenizer is of a kind that
            residual tokens cannot be put into, or the output is there already or cannot be written.
    """
    model, processor = load_model(folder, dtype)
    if model.config.image_head != "flat":
        raise UserError(
            f"{str(folder)!r} draws with a depth transformer, which is no part of a plain causal LM; train a model "
            "with --image_head flat (recipes pretrain_flat and finetune_flat), or leave out --format causal-lm"
        )
    tokenizer = with_residual_tokens(processor.tokenizer, model.vocabulary)
    card = _card(model, processor)
    causal = as_causal_lm(model)

    def write(out: Path) -> None:
        causal.save_pretrained(out, max_shard_size="5GB")
        save_tokenizer(tokenizer, out)
        model.vision_tower.save_pretrained(out / EVOTOK_FOLDER)
        processor.image_processor.save_pretrained(out / EVOTOK_FOLDER)
        (out / "README.md").write_text(card)

    write_whole_folder(output, write)


# The model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def as_causal_lm(model: EvoTokLlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model with the rows of the residual tokens in its tables; it takes the backbone out of `model`.

    Raises:
        UserError: the backbone does not look embeddings up in a plain table.
    """
    embeddings, vocabulary, codebooks = (
        model.get_input_embeddings(),
        model.vocabulary,
        model.vision_tower.quantizer.codebooks,
    )
    if type(embeddings) is not nn.Embedding:
        raise UserError(
            f"the {model.config.text_config.model_type} backbone embeds tokens through {type(embeddings).__name__}, "
            "and rows of residual tokens would go through it, too; expected a plain table"
        )
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
    """One table from the rows of text (V, D) and those of residual tokens (L, K, D), each at its ids.

    Ids that are nobody's get the mean of the text's rows: its logit is the mean of theirs and never the largest.
    """
    end = vocabulary.offset + vocabulary.size
    table = text.mean(dim=0).repeat(max(text.shape[0], end), 1)
    table[: text.shape[0]] = text
    table[vocabulary.offset : end] = residual.flatten(0, 1)
    return table


# The tokenizer -----------------------------------------------------------------------------------------------


def with_residual_tokens(tokenizer, vocabulary: ResidualVocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer with the residual tokens in its BPE's own vocabulary, where a hundred thousand load in an instant;
    as added tokens they take many seconds.

    Raises:
        UserError: no BPE, or one in which residual tokens would be torn or other text would be read differently.
    """
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = facts["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"the tokenizer is a {bpe['type']} model; residual tokens can be put into a BPE alone")
    for token_id in range(vocabulary.offset, vocabulary.offset + vocabulary.size):
        bpe["vocab"][vocabulary.to_text(token_id)] = token_id
    for token in facts["added_tokens"]:  # else they would be numbered anew, from the vocabulary's size on
        bpe["vocab"].setdefault(token["content"], token["id"])
    bpe["ignore_merges"] = True  # a word that is in the vocabulary is one token, whatever its merges
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
    """A pre-tokenizer that cuts text forms of residual tokens out first, and then leaves them whole at every step."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    first = _isolated(_TEXT_FORM)
    return {"type": "Sequence", "pretokenizers": [first, *(one for step in steps for one in _sparing(step))]}


def _isolated(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sparing(step: dict) -> list[dict]:
    """A step of a pre-tokenizer, or steps that do the same, which leave text forms whole where it cuts words."""
    if step["type"] == "ByteLevel" and step["use_regex"]:
        return [*_sparing(_isolated(_GPT2_WORDS)), step | {"use_regex": False}]
    if step["type"] == "Digits":
        return _sparing(_isolated(r"\p{N}" if step["individual_digits"] else r"\p{N}+"))
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        return [step | {"pattern": {"Regex": f"{_TEXT_FORM}|{step['pattern']['Regex']}"}}]
    return [step]


def _check_tokenizer(before: Tokenizer, after: Tokenizer, vocabulary: ResidualVocabulary) -> None:
    """Every token's text must be read as before, and residual tokens as themselves, wherever they stand."""
    ids = [vocabulary.offset + level * vocabulary.codebook_size for level in range(vocabulary.num_levels)]
    ids += [vocabulary.offset + vocabulary.size - 1, vocabulary.offset]
    forms = "".join(map(vocabulary.to_text, ids))
    for text in (forms, f"word{forms}word 7", f"two words {forms} <|{forms}", f"{forms}\n"):
        read = after.encode(text, add_special_tokens=False).ids
        if [token for token in read if token in ids] != ids * text.count(forms):
            raise UserError(f"the tokenizer's steps tear residual tokens: {text!r} is read as {read}")
    words = before.decode_batch([[token] for token in sorted(before.get_vocab().values())], skip_special_tokens=False)
    pairs = zip(*(one.encode_batch_fast(words, add_special_tokens=False) for one in (before, after)), strict=True)
    changed = [word for word, (old, new) in zip(words, pairs, strict=True) if old.ids != new.ids]
    if changed:
        raise UserError(
            f"with residual tokens in its vocabulary the tokenizer would read {len(changed)} words differently, e.g. "
            f"{changed[0]!r}: its merges do not lead to its own tokens"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer` takes it as it is.

    For some models transformers makes a tokenizer of the model's usual class from the vocabulary alone, without the
    rule that keeps residual tokens whole, whatever class the folder names; but it leaves one alone that names its own
    code. That code is an empty subclass of the general tokenizer, which is taken where foreign code is not trusted.

    Raises:
        UserError: the installed transformers loads another tokenizer from the folder all the same.
    """
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions of transformers know
    settings["auto_map"] = {"AutoTokenizer": [None, "residual_tokenizer.ResidualTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "residual_tokenizer.py").write_text(_TOKENIZER_CODE)
    loaded = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    if loaded.to_str() != tokenizer.backend_tokenizer.to_str():
        raise UserError(
            f"transformers {transformers.__version__} does not load the tokenizer as it was written; export with "
            "another version, 5.23 does"
        )


_TOKENIZER_CODE = '''"""The tokenizer of tokenizer.json as it is."""

from transformers import PreTrainedTokenizerFast


class ResidualTokenizer(PreTrainedTokenizerFast):
    """Keeps the text forms of residual tokens whole."""
'''


# The README --------------------------------------------------------------------------------------------------


def _card(model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor) -> str:
    vision, vocabulary = model.config.vision_config, model.vocabulary
    facts = {
        "FIRST": vocabulary.offset,
        "LEVELS": vocabulary.num_levels,
        "CODES": vocabulary.codebook_size,
        "POSITIONS": vision.num_positions,
        "START": processor.image_start_id,
        "END": processor.image_end_id,
        "PLACEHOLDER": processor.image_token_id,
        "TEXT": model.lm_head.weight.shape[0],
        "SIZE": vision.image_size,
        **_sampling_facts(DrawingOptions().for_model(model)),
    }
    card = _CARD
    for name, value in facts.items():
        card = card.replace(f"@{name}@", str(value))
    return card


def _sampling_facts(options: DrawingOptions) -> dict[str, str]:
    """The model's settings of drawing as the card's snippet takes them, which has one value for all levels."""
    settings = options.settings()
    one = {name: value[0] if isinstance(value, tuple) else value for name, value in settings.items()}
    notes = [name for name in settings if isinstance(settings[name], tuple)]
    notes += ["guidance_schedule"] if options.guidance_schedule != "constant" else []
    if one["temperature"] == 0:
        sampling = "do_sample=False,"
    else:
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = "do_sample=True,\n    " + "\n    ".join(f"{name}={one[name]}," for name in names)
    differs = {name: settings[name] for name in notes}
    note = "" if not notes else (
        f"\nThe model's own settings change over levels or positions ({differs}). This snippet takes the first level's "
        "and a constant scale.\n"
    )  # fmt: skip
    return {"SCALE": str(one["guidance_scale"]), "SAMPLING": sampling, "NOTE": note}


_CARD = """# A causal LM that draws

A plain causal LM of transformers. It writes text and images in one sequence; an image of @SIZE@ x @SIZE@ pixels is
`<|image_start|>`, @POSITIONS@ x @LEVELS@ residual tokens, `<|image_end|>`.

| tokens | ids |
|---|---|
| text | 0 to @TEXT@ (not included), the three below among them |
| `<|image_start|>`, `<|image_end|>` | @START@, @END@ |
| `<|image_pad|>`, of no use here | @PLACEHOLDER@ |
| `<|evo:LEVEL:CODE|>` | @FIRST@ + LEVEL x @CODES@ + CODE, LEVEL below @LEVELS@, CODE below @CODES@ |

**What has to be kept to while it generates**, because it was trained on nothing else: residual token i of an image,
counted from 0, is of level i mod @LEVELS@; exactly @POSITIONS@ x @LEVELS@ of them follow `<|image_start|>`, and then
`<|image_end|>`; outside images come tokens of text alone, but neither `<|image_end|>` nor `<|image_pad|>`. With
transformers, in this folder:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

FIRST, LEVELS, CODES, POSITIONS = @FIRST@, @LEVELS@, @CODES@, @POSITIONS@
START, END, PLACEHOLDER, TEXT = @START@, @END@, @PLACEHOLDER@, @TEXT@


class WhoseTurn(LogitsProcessor):
    def __call__(self, input_ids, scores):
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row, ids in enumerate(input_ids):
            begun = (ids == START).nonzero()
            inside = len(ids) - 1 - int(begun[-1]) if len(begun) else len(ids) + POSITIONS * LEVELS
            if inside < POSITIONS * LEVELS:
                first = FIRST + inside % LEVELS * CODES
                allowed[row, first : first + CODES] = True
            elif inside == POSITIONS * LEVELS:
                allowed[row, END] = True
            else:
                allowed[row, :TEXT] = True
                allowed[row, FIRST : FIRST + LEVELS * CODES] = False
                allowed[row, [END, PLACEHOLDER]] = False
        return scores.masked_fill(~allowed, -torch.inf)


model = AutoModelForCausalLM.from_pretrained(".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")


def ask(text):
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + "<|image_start|>"


def ids_of(text):
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


prompt = ids_of(ask("a photo of a red circle"))
drawn = model.generate(
    prompt,
    guidance_scale=@SCALE@,  # away from what it would draw without a prompt
    negative_prompt_ids=ids_of(ask("")),
    @SAMPLING@
    max_new_tokens=POSITIONS * LEVELS + 1,
    logits_processor=LogitsProcessorList([WhoseTurn()]),
)[:, prompt.shape[1] :]
print(tokenizer.decode(drawn[0]))
```
@NOTE@
Without `<|image_start|>` behind the prompt, and without guidance, it answers in text, and draws where it sees fit. The
text forms are read as the tokens they name, so an image may also stand in a prompt as text.

From ids to a picture, with the package `evotok` and the folder `evotok` in this one:

```python
from evotok_plugin import EvoTokImageProcessor, EvoTokModel

codes = (drawn[:, : POSITIONS * LEVELS] - FIRST) % CODES
pixels = EvoTokModel.from_pretrained("evotok").decode_pixels(codes.view(-1, POSITIONS, LEVELS))
EvoTokImageProcessor.from_pretrained("evotok").to_pil(pixels)[0].save("drawn.png")
```

Images that are read go into the model that this was made of as features, which no causal LM takes: this one looks at no
pictures but those that it has drawn.
"""
