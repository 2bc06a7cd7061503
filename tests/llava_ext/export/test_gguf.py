"""Export of a flat model for llama.cpp, run by llama.cpp itself."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from llama_cpp import llama_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.assembly import assemble
from llava_ext.cli import main
from llava_ext.export.gguf_model import check_backbone
from llava_ext.generation.options import DrawingOptions
from llava_ext.model_folder import save_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BACKBONES = {
    "qwen2": {},
    "llama": {},
    "llama3": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
}
TEXTS = [
    "How many rings are there? Three <|image_start|>",
    "a <|evo naïve 12 <|evo:9:1|",
    " \n\n x",
    "two  blue   squares\t\n  <|evo:1:3|><|evo:3:31|> don't I'LL 12345 日本 é\u0301",
    "<|user|>hi<|assistant|>",
]
QUESTIONS = ["a photo of a ring", "What is a ring?", "two blue squares"]


@pytest.fixture(scope="module")
def make_flat_model(make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path_factory):
    """A function that saves a random flat model whose logits differ clearly, and returns it with its processor."""

    def make(name: str):
        folder = tmp_path_factory.mktemp(name)
        settings = {"initializer_range": 0.2, **BACKBONES[name]}
        backbone = make_backbone(tiny_tokenizer_folder, folder / "backbone", name.removesuffix("3"), **settings)
        torch.manual_seed(3)
        model, processor = assemble(backbone, tiny_evotok_folder, 32, 2, 2, image_head="flat")
        for parameter_name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 1:  # biases start as zeros and norms as ones, which would hide mistakes
                torch.nn.init.normal_(parameter.data, mean="norm" in parameter_name, std=0.3)
        processor.save_pretrained(folder / "model")
        save_model(model, folder / "model")
        return model.eval(), processor, folder

    return make


def export(folder: Path, output_format: str, *flags: str) -> Path:
    output = folder / "-".join((output_format, *flags)).replace("--", "")
    assert main(["export", str(folder / "model"), "--format", output_format, *flags, "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module", params=BACKBONES)
def exported(request, make_flat_model):
    """A model, its processor and the folder of its export."""
    pytest.importorskip("gguf", reason="needs gguf: pip install 'evotok[gguf]'")
    model, processor, folder = make_flat_model(request.param)
    return model, processor, export(folder, "gguf")


@pytest.fixture(scope="module")
def plain(exported):
    """The model and the tokenizer of the export as a causal LM, in transformers."""
    folder = export(exported[2].parent, "causal-lm")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def server(exported):
    with llama_server(exported[2] / "model.gguf") as running:
        yield running


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


# Equality with transformers and with our model ---------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_tokenized_as_in_transformers(server, plain, text):
    expected = plain[1](text, add_special_tokens=False).input_ids
    assert server.tokenize(text) == expected
    assert server.post("/detokenize", tokens=expected)["content"] == text


@pytest.mark.parametrize("question", QUESTIONS)
def test_prompts_and_32_greedy_tokens_are_those_of_transformers(server, plain, question):
    model, tokenizer = plain
    text = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
    assert server.post("/apply-template", messages=chat(question))["prompt"] == text
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    made = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = torch.cat(made.scores).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "the random model's greedy choices are too close; change its seed"
    greedy = {"temperature": 0, "ignore_eos": True}
    theirs = server.post("/completion", prompt=text, n_predict=32, return_tokens=True, **greedy)
    assert theirs["tokens"] == made.sequences[0, prompt.shape[1] :].tolist()
    compared = 0
    for step, scores in enumerate(made.scores):
        before = made.sequences[0, : prompt.shape[1] + step].tolist()
        answer = server.post("/completion", prompt=before, n_predict=1, n_probs=5, **greedy)
        for token in answer.get("completion_probabilities", []):  # none for a part of a character
            ids = [entry["id"] for entry in token["top_logprobs"]]
            logprobs = torch.tensor([entry["logprob"] for entry in token["top_logprobs"]])
            torch.testing.assert_close(logprobs, scores[0].log_softmax(-1)[ids], atol=1e-3, rtol=1e-3)
            compared += 1
    assert compared >= 8


def snippet(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_snippet_of_the_readme_draws_the_same_image(server, exported, question, monkeypatch, tmp_path):
    model, processor, folder = exported
    code = snippet(folder).replace("http://127.0.0.1:8080", server.url).replace("temperature=1.0", "temperature=0")
    monkeypatch.chdir(tmp_path)
    for name in ("image.gbnf", "evotok"):
        (tmp_path / name).symlink_to(folder / name)
    names: dict = {}
    exec(code.replace("a photo of a red circle", question), names)
    options = DrawingOptions(guidance_scale=1.0, sampling=SamplingOptions(temperature=0))
    *_, codes = model.draw_codes([question], processor, [0], options)
    assert names["codes"].tolist() == codes[0].flatten().tolist()
    assert names["written"].endswith(f"<|evo:{codes.shape[2] - 1}:{codes[0, -1, -1]}|>") and Path("drawn.png").is_file()


def test_the_grammar_forces_one_whole_image_whatever_is_sampled(server, exported):
    model, processor, folder = exported
    vocabulary, num_positions = model.vocabulary, model.config.vision_config.num_positions
    bias = json.loads(re.search(r"logit_bias=(.*),\n", snippet(folder))[1])
    for seed in range(5):
        drawn = server.post(
            "/completion",
            prompt="a ring <|image_start|>",
            grammar=(folder / "image.gbnf").read_text(),
            logit_bias=bias,
            temperature=20,
            top_k=0,
            top_p=1,
            min_p=0,
            seed=seed,
            n_predict=99,
            return_tokens=True,
        )["tokens"]
        *residual, end, stop = drawn
        # llama.cpp also stops at other tokens whose names mark an end, such as <|endoftext|>.
        assert end == processor.image_end_id and not vocabulary.is_residual(torch.tensor(stop))
        levels = vocabulary.levels(torch.tensor(residual)).view(num_positions, vocabulary.num_levels)
        assert levels.tolist() == [list(range(vocabulary.num_levels))] * num_positions


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_stored_in_the_requested_dtype(make_flat_model, dtype):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'evotok[gguf]'")
    _, _, folder = make_flat_model("qwen2")
    whole, rounded = export(folder, "gguf"), export(folder, "gguf", "--dtype", dtype)
    tensors = [gguf.GGUFReader(one / "model.gguf").tensors for one in (whole, rounded)]
    for before, after in zip(*tensors, strict=True):
        expected = torch.from_numpy(before.data.copy())
        if len(before.shape) > 1:
            stored = torch.from_numpy(after.data.view("int16").copy()).view(getattr(torch, dtype))
            assert stored.view(expected.shape).equal(expected.to(stored.dtype)), before.name
        else:
            assert torch.from_numpy(after.data.copy()).equal(expected), before.name
    with llama_server(rounded / "model.gguf") as server:
        assert server.post("/completion", prompt="a ring", n_predict=4, ignore_eos=True)["tokens_predicted"] == 4


# Errors ------------------------------------------------------------------------------------------------------


def test_a_model_with_a_depth_transformer_and_a_missing_package_are_rejected(
    model_folder, tmp_path, capsys, monkeypatch
):
    command = ["export", str(model_folder), "--format", "gguf", "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert main(command) == 2
    assert "pip install 'evotok[gguf]'" in capsys.readouterr().err
    pytest.importorskip("gguf", reason="needs gguf: pip install 'evotok[gguf]'")
    assert main(command) == 2
    assert "omit --format gguf" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_float16_is_rejected_for_other_formats(model_folder, tmp_path, capsys):
    assert main(["export", str(model_folder), "--dtype", "float16", "-o", str(tmp_path / "out")]) == 2
    assert "only for --format gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("qwen3", {}, "supports backbones of type qwen2 and llama, got qwen3"),
        ("qwen2", {"rope_parameters": LLAMA3}, r"rope_type 'llama3' \(expected default\)"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2", {"use_sliding_window": True}, "sliding windows"),
        ("qwen2", {"head_dim": 24}, "head_dim 24"),
    ],
)
def test_backbones_that_llama_cpp_would_compute_differently_are_rejected(model_type, settings, message):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, hidden_size=32, num_attention_heads=2, **settings)
    with pytest.raises(UserError, match=message):
        check_backbone(config)
