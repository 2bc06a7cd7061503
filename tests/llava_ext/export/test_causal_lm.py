"""Export of a flat model as a plain causal LM, loaded with transformers alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.assembly import assemble
from llava_ext.cli import main
from llava_ext.export.causal_lm import _table, with_residual_tokens
from llava_ext.generation.options import DrawingOptions
from llava_ext.model_folder import save_model
from llava_ext.vocabulary import ResidualVocabulary

GREEDY = DrawingOptions(guidance_scale=1.0, sampling=SamplingOptions(temperature=0))
QUESTIONS = ["a photo of a ring", "What is a ring?", "two blue squares", "hi"]


def write_flat_model(backbone, evotok, folder, rows):
    """Save a random flat model; with the scale of its random weights it generates all kinds of tokens."""
    torch.manual_seed(3)
    model, processor = assemble(backbone, evotok, 32, 2, 2, image_head="flat", residual_embeddings=rows)
    processor.save_pretrained(folder)
    save_model(model, folder)
    return model.eval(), processor


@pytest.fixture(scope="module", params=["tied", "free"])
def exported(request, tiny_backbone_folder, tiny_evotok_folder, tmp_path_factory):
    """A model, its processor and the folder of its export."""
    folder = tmp_path_factory.mktemp("flat")
    model, processor = write_flat_model(tiny_backbone_folder, tiny_evotok_folder, folder / "model", request.param)
    assert main(["export", str(folder / "model"), "--format", "causal-lm", "-o", str(folder / "out")]) == 0
    return model, processor, folder / "out"


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def run_alone(folder: Path, code: str) -> str:
    """Run code in the folder, in a process that cannot import our packages, and return its output."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['evotok_plugin', 'llava_ext', 'eval_tasks'])); "
    code = f"{blocked}import transformers; transformers.logging.set_verbosity_error()\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Equality of models ------------------------------------------------------------------------------------------

GREEDILY = """
import json
def answer(text):
    prompt = ids_of(text)
    turns = LogitsProcessorList([AllowedTokens()])
    ids = model.generate(prompt, do_sample=False, max_new_tokens=POSITIONS * LEVELS + 8, logits_processor=turns)
    return ids[0, prompt.shape[1]:].tolist()

def chat(question):
    return ask(question).removesuffix("<|image_start|>")

written = {q: {"answer": answer(chat(q)), "image": answer(chat(q) + "<|image_start|>")} for q in QUESTIONS}
print(json.dumps({"guided": drawn[0].tolist(), **written}))
"""


@pytest.fixture(scope="module")
def written(exported):
    """Output of the README's snippet and greedy answers with transformers alone."""
    code = snippets(exported[2])[0].replace("do_sample=True", "do_sample=False").replace("top_k=0,", "")
    code = code.replace("print(tokenizer.decode(drawn[0]))", GREEDILY).replace("QUESTIONS", repr(QUESTIONS))
    return json.loads(run_alone(exported[2], code))


@pytest.mark.parametrize("question", QUESTIONS)
def test_transformers_alone_writes_the_same_text(exported, written, question):
    model, processor, _ = exported
    chat, theirs = [{"role": "user", "content": question}], written[question]["answer"]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    options = {"processor": processor, "max_new_tokens": len(theirs), "max_images": 99, "drawing": GREEDY}
    ours = model.generate(**inputs, modalities="auto", **options)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours[: len(theirs)] == theirs and len(theirs) > 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_transformers_alone_draws_the_same_image(exported, written, question):
    model, processor, _ = exported
    *_, codes = model.draw_codes([question], processor, [0], GREEDY)
    expected = [*processor.vocabulary.to_ids(codes[0]).flatten().tolist(), processor.image_end_id]
    assert written[question]["image"][: len(expected)] == expected


def test_guidance_of_transformers_gives_the_same_image(exported, written):
    model, processor, _ = exported
    options = DrawingOptions(guidance_scale=3.0, sampling=SamplingOptions(temperature=0))
    *_, codes = model.draw_codes(["a photo of a red circle"], processor, [0], options)
    assert written["guided"] == [*processor.vocabulary.to_ids(codes[0]).flatten().tolist(), processor.image_end_id]


@torch.no_grad()
def test_logits_are_the_same(exported):
    model, processor, folder = exported
    plain, vocabulary = AutoModelForCausalLM.from_pretrained(folder).eval(), model.vocabulary
    codes = torch.randint(vocabulary.codebook_size, (9, vocabulary.num_levels))
    chat = [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": "<image>"}]
    ids = processor.encode_conversation(chat, [codes]).input_ids[None]
    ours = model(input_ids=ids)
    theirs = plain(ids).logits
    torch.testing.assert_close(theirs[..., : ours.logits.shape[-1]], ours.logits, atol=1e-5, rtol=1e-4)
    for level in range(vocabulary.num_levels):
        first = vocabulary.offset + level * vocabulary.codebook_size
        logits = model.image_head.logits(ours.last_hidden_state[0], level, model.vision_tower.quantizer.codebooks)
        torch.testing.assert_close(theirs[0, :, first : first + vocabulary.codebook_size], logits, atol=1e-5, rtol=1e-4)


def test_the_snippets_of_the_readme_draw_an_image_and_no_file_contains_a_path(exported, monkeypatch, tmp_path):
    _, _, folder = exported
    for file in folder.rglob("*.*"):
        if file.suffix in (".json", ".md", ".jinja"):
            assert str(folder.parent) not in file.read_text(), file.name
    assert not {path.suffix for path in folder.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}
    monkeypatch.chdir(folder)
    exec("\n".join(snippets(folder)), {})
    assert Path("drawn.png").is_file()
    Path("drawn.png").unlink()


@pytest.mark.parametrize("offset", [3, 10, 14])
def test_residual_rows_are_at_their_ids_for_any_offset(offset):
    """Within the text rows, after them, and after a gap, whose ids are never the most likely."""
    text, residual, vocabulary = torch.randn(10, 4), torch.randn(2, 3, 4), ResidualVocabulary(offset, 2, 3)
    table = _table(text, residual, vocabulary)
    assert table.shape[0] == max(10, offset + 6)
    assert torch.equal(table[offset : offset + 6], residual.flatten(0, 1))
    outside = [i for i in range(10) if not offset <= i < offset + 6]
    assert torch.equal(table[outside], text[outside])
    logits = torch.randn(100, 4) @ table.T
    assert set(logits.argmax(1).tolist()) <= {*outside, *range(offset, offset + 6)}


def test_weights_can_be_exported_in_bfloat16(exported, tmp_path):
    model = exported[2].parent / "model"
    arguments = ["export", str(model), "--format", "causal-lm", "--dtype", "bfloat16", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    whole, rounded = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (exported[2], tmp_path / "out"))
    for (name, a), (_, b) in zip(whole.named_parameters(), rounded.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16, name
        torch.testing.assert_close(a, b.float(), atol=0.02, rtol=0.02, msg=name)


def test_the_snippet_uses_the_settings_of_the_model(tiny_backbone_folder, tiny_evotok_folder, tmp_path):
    model, _ = write_flat_model(tiny_backbone_folder, tiny_evotok_folder, tmp_path / "model", "tied")
    own = {"guidance_scale": 2.0, "guidance_schedule": "cosine", "temperature": [0.5, 1.0, 1.0, 1.0], "min_p": 0.2}
    path = tmp_path / "model/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_generation": own}))
    assert main(["export", str(tmp_path / "model"), "--format", "causal-lm", "-o", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    for line in ("guidance_scale=2.0,", "do_sample=True,", "temperature=0.5,", "top_k=0,", "min_p=0.2,"):
        assert f"\n    {line}" in card
    assert "'guidance_schedule': 'cosine'" in card and "@" not in card
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())["image_generation"]
    assert saved == {"top_k": 0, "top_p": 1.0, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0, **own}


def test_a_model_with_a_depth_transformer_is_rejected(tiny_mllm, tmp_path, capsys):
    model, processor = tiny_mllm
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--format", "causal-lm", "-o", str(tmp_path / "out")]) == 2
    assert "--image_head flat" in capsys.readouterr().err and not (tmp_path / "out").exists()


# The tokenizer -----------------------------------------------------------------------------------------------


def test_text_is_tokenized_as_before_and_residual_tokens_as_themselves(exported):
    _, processor, folder = exported
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(folder), processor.vocabulary
    for text in ("How many rings are there? Three <|image_start|>", "a <|evo", "naïve 12 <|evo:9:1|", " \n\n x"):
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.tokenizer(text).input_ids
    ids = vocabulary.to_ids(torch.randint(vocabulary.codebook_size, (9, vocabulary.num_levels))).flatten().tolist()
    text = processor.decode(torch.tensor([*processor.tokenizer("a ring ").input_ids, *ids]))
    assert tokenizer(text, add_special_tokens=False).input_ids[-len(ids) :] == ids
    assert tokenizer.decode(ids) == "".join(map(vocabulary.to_text, ids))
    chat = [{"role": "user", "content": "a ring"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        processor.apply_chat_template(chat, add_generation_prompt=True)
    )


def bpe(pre_tokenizer) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "ab", "abc", "<|", "|>", "12"])}
    merges = [("a", "b"), ("ab", "c"), ("<", "|"), ("|", ">"), ("1", "2")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        None,
    ],
)
def test_other_pre_tokenizers_do_not_split_residual_tokens(pre_tokenizer):
    vocabulary = ResidualVocabulary(300, 4, 130)
    tokenizer = with_residual_tokens(bpe(pre_tokenizer), vocabulary)
    assert tokenizer("abc<|evo:3:129|><|evo:0:12|>12").input_ids[1:-1] == [300 + 4 * 130 - 1, 312]


def test_tokenizers_that_would_split_tokens_or_change_text_are_rejected():
    vocabulary = ResidualVocabulary(300, 2, 10)
    with pytest.raises(UserError, match="split residual tokens"):
        with_residual_tokens(bpe(pre_tokenizers.Punctuation()), vocabulary)
    unreachable = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    facts = json.loads(unreachable.backend_tokenizer.to_str())
    facts["model"]["vocab"]["xyz"] = 299
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)))
    with pytest.raises(UserError, match="1 words differently, e.g. 'xyz'"):
        with_residual_tokens(changed, vocabulary)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="WordLevel model"):
        with_residual_tokens(words, vocabulary)
