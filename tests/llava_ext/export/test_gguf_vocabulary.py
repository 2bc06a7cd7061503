"""The vocabulary of a GGUF file: the same words and tokens as in the tokenizer's own library."""

import json

import pytest
import torch
from llama_cpp import llama_server
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.records import text_records
from llava_ext.export.gguf_model import write_gguf
from llava_ext.export.gguf_vocabulary import TokenKind, gguf_vocabulary, rivals_of_residual_tokens
from llava_ext.vocabulary import ResidualVocabulary

RESIDUAL = ResidualVocabulary(450, 2, 10)
NUM_ROWS = 480


def words(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


RULES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": words(PRETOKENIZE_REGEX),
    "llama-bpe": words(PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
# Words that the rules split differently, with merges across the places where others split.
CORPUS = ["it's IT'S 12 123 1234 12345 12 345", "a,b ,b (blue) (red)\n\n\n  x\t\ty", "naïve Übung 日本語 é\u0301 ½"]
TEXTS = [
    *CORPUS,
    "I'LL DON'T we've",
    "1 22 333 4444 55555 666666",
    "  \n \n\n  a   b \t",
    "x.\n\ny!!\n",
    "²³ 一二三 ١٢٣",
]


def trained(pre_tokenizer, **settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained with a pre-tokenizer."""
    bpe = Tokenizer(models.BPE(**settings))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    scenes = [turn["value"] for record in text_records(20, seed=0) for turn in record["conversations"]]
    bpe.train_from_iterator([*CORPUS * 20, *scenes], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.mark.parametrize("rule", RULES)
def test_llama_cpp_splits_text_by_the_named_rule(rule, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: pip install 'evotok[gguf]'")
    tokenizer = trained(RULES[rule])
    vocabulary = gguf_vocabulary(tokenizer, RESIDUAL, NUM_ROWS)
    assert vocabulary.rule == rule
    config = LlamaConfig(
        vocab_size=NUM_ROWS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    causal = AutoModelForCausalLM.from_config(config)
    write_gguf(tmp_path / "model.gguf", causal, vocabulary, tokenizer, [tokenizer.eos_token_id], torch.float32)
    with llama_server(tmp_path / "model.gguf") as server:
        for text in TEXTS:
            assert server.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
        forms = [RESIDUAL.to_text(token_id) for token_id in (450, 469, 455)]
        assert server.tokenize(f"{forms[0]}{forms[1]} x{forms[2]}")[:2] == [450, 469]


def test_tokens_of_all_kinds_have_their_ids():
    tokenizer = trained(RULES["gpt-2"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|image_end|>", special=True)])
    vocabulary = gguf_vocabulary(tokenizer, RESIDUAL, NUM_ROWS)
    assert len(vocabulary.tokens) == len(vocabulary.kinds) == NUM_ROWS == len(set(vocabulary.tokens))
    for text, kind in {
        "<tool>": TokenKind.USER_DEFINED,
        "<|image_end|>": TokenKind.CONTROL,
        "<|end|>": TokenKind.CONTROL,
        "a": TokenKind.NORMAL,
    }.items():
        token_id = tokenizer.convert_tokens_to_ids(text)
        assert (vocabulary.tokens[token_id], vocabulary.kinds[token_id]) == (text, kind)
    assert vocabulary.tokens[450:470] == [RESIDUAL.to_text(token_id) for token_id in range(450, 470)]
    assert set(vocabulary.kinds[450:470]) == {TokenKind.USER_DEFINED}
    assert set(vocabulary.kinds[len(tokenizer) : 450]) | set(vocabulary.kinds[470:]) == {TokenKind.UNUSED}


def test_rivals_are_the_tokens_that_begin_a_text():
    tokenizer = trained(RULES["gpt-2"])
    tokenizer.add_tokens(["<|", "<|image", "|>", "<|evo:0:3|>x"])
    vocabulary = gguf_vocabulary(tokenizer, RESIDUAL, NUM_ROWS)
    rivals = rivals_of_residual_tokens(vocabulary, ["<|evo:0:0|>", "<|image_end|>"])
    assert sorted(vocabulary.tokens[token_id] for token_id in rivals) == ["<", "<|", "<|image"]


def changed(tokenizer: PreTrainedTokenizerFast, **settings) -> PreTrainedTokenizerFast:
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["model"] |= settings
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)))


def test_tokenizers_that_llama_cpp_would_replace_by_others_are_rejected():
    def rejects(tokenizer: PreTrainedTokenizerFast, message: str) -> None:
        with pytest.raises(UserError, match=message):
            gguf_vocabulary(tokenizer, RESIDUAL, NUM_ROWS)

    whole = trained(RULES["gpt-2"])
    rejects(changed(whole, byte_fallback=True), "BPE with byte_fallback")
    rejects(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))), "without tokens for 255 of")
    others = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    rejects(PreTrainedTokenizerFast(tokenizer_object=others), "is a WordLevel")
    rejects(trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no rule that splits text")
    rejects(trained(words(r"\p{L}+|[^\p{L}]+")), "supported are GPT-2's, Qwen2's")
    lowering = trained(RULES["gpt-2"])
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    rejects(lowering, "does not normalize")
    lowering.backend_tokenizer.normalizer = normalizers.NFC()
    assert gguf_vocabulary(lowering, RESIDUAL, NUM_ROWS).rule == "gpt-2"
    whole.add_tokens([AddedToken("<mask>", lstrip=True)])
    rejects(whole, "'<mask>' takes spaces")
