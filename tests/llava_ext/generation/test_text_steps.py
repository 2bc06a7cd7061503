"""The loop of text generation against transformers' own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, StopStringCriteria, SuppressTokensLogitsProcessor

from evotok_plugin.errors import UserError
from llava_ext.generation import text, text_steps
from llava_ext.generation.text_steps import SuppressTokens
from llava_ext.packed_attention import SDPA_BY_SEGMENT

PROMPTS = ["a photo of a ring", "describe", "a photo of a red circle above a blue square"]


@pytest.fixture
def calls(monkeypatch):
    """The number of rows of each call of our loop."""
    made, write = [], text_steps.write_text

    def record(model, input_ids, *args):
        made.append(len(input_ids))
        return write(model, input_ids, *args)

    monkeypatch.setattr(text, "write_text", record)
    return made


def theirs(monkeypatch, run):
    """The result of `run` with transformers' loop."""
    with monkeypatch.context() as patch:
        patch.setattr(text, "can_write_text", lambda *_: False)
        return run()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.2},
        {"eos_token_id": list(range(20, 60)), "pad_token_id": 1},
        {"min_new_tokens": 4, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampled", "sequences", "ends", "processors"],
)
def test_ids_equal_those_of_transformers(tiny_mllm, calls, monkeypatch, settings):
    model, processor = tiny_mllm
    monkeypatch.setattr(text_steps, "_FIRST_SLOTS", 3)  # the cache grows several times

    def write(rows):
        torch.manual_seed(3)
        return model.generate(**processor.user_turns(PROMPTS[:rows]), max_new_tokens=24, **settings)

    for rows in (1, 3):
        ours = write(rows)
        assert calls.pop() == rows * settings.get("num_return_sequences", 1)
        assert torch.equal(ours, theirs(monkeypatch, lambda rows=rows: write(rows)))
    assert not calls


def test_images_in_the_prompt(tiny_mllm, calls, monkeypatch, rng):
    model, processor = tiny_mllm
    images = [rng.integers(0, 255, (40, 40, 3)).astype("uint8") for _ in range(2)]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image, prompt in zip(images, PROMPTS, strict=False)
    ]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    ours = model.generate(**inputs, max_new_tokens=12)
    assert calls == [2]
    assert torch.equal(ours, theirs(monkeypatch, lambda: model.generate(**inputs, max_new_tokens=12)))


def test_a_model_that_has_seen_packed_rows_writes_the_same(tiny_mllm, calls):
    model, processor = copy.deepcopy(tiny_mllm[0]), tiny_mllm[1]
    inputs = processor.user_turns(PROMPTS)
    expected = model.generate(**inputs, max_new_tokens=8)
    with torch.no_grad():
        model(inputs["input_ids"], segment_ids=inputs["attention_mask"])  # replaces the attention for good
    assert model.language_model.config._attn_implementation == SDPA_BY_SEGMENT
    calls.clear()
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected) and calls == [3]


def test_stop_strings_and_criteria(tiny_mllm, calls, monkeypatch):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS[:2])
    free = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    stop = processor.tokenizer.decode(free[0, 4])
    for settings in (
        {"stop_strings": [stop], "tokenizer": processor.tokenizer},
        {"stopping_criteria": [StopStringCriteria(processor.tokenizer, [stop])]},
    ):

        def write(settings=settings):
            return model.generate(**inputs, max_new_tokens=12, **settings)

        ours = write()
        assert torch.equal(ours, theirs(monkeypatch, write)) and len(calls) > 1
        assert int((ours[0, inputs["input_ids"].shape[1] :] != free[0, : ours.shape[1]]).sum()) <= free.shape[1] - 5


def test_a_streamer_gets_the_same_tokens(tiny_mllm, calls, monkeypatch):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS[:1])

    class Streamer:
        def __init__(self):
            self.put_ids = []

        def put(self, value):
            self.put_ids.append(value.flatten().tolist())

        def end(self):
            self.put_ids.append("end")

    def write():
        streamer = Streamer()
        model.generate(**inputs, max_new_tokens=6, streamer=streamer)
        return streamer.put_ids

    ours = write()
    assert calls == [1] and len(ours) == 8 and ours == theirs(monkeypatch, write)


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_run_in_transformers(tiny_mllm, calls, settings):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS)
    expected = model.generate(**inputs, max_new_tokens=6)
    calls.clear()
    written = model.generate(**inputs, max_new_tokens=6, **settings)
    assert not calls
    if settings.get("output_scores"):
        assert all(torch.isfinite(one).all() for one in written.logits)
        suppressed = model.image_token_ids
        assert all((one[:, suppressed] == -torch.inf).all() for one in written.scores)
        written = written.sequences
    if "num_beams" not in settings:
        assert torch.equal(written, expected)


def test_a_cache_of_the_caller_is_filled(tiny_mllm, calls):
    model, processor = tiny_mllm
    inputs, cache = processor.user_turns(PROMPTS[:1]), DynamicCache()
    expected = model.generate(**inputs, max_new_tokens=6)
    calls.clear()
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, past_key_values=cache), expected)
    assert not calls and cache.get_seq_length() == expected.shape[1] - 1
    with pytest.raises(ValueError, match="tuple of `past_key_values`"):  # transformers' own error
        model.generate(**inputs, past_key_values=((torch.zeros(1, 1, 1, 16),) * 2,) * 2)


def test_models_with_hooks_run_in_transformers(tiny_mllm, calls):
    model, processor = copy.deepcopy(tiny_mllm[0]), tiny_mllm[1]
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.generate(**processor.user_turns(PROMPTS[:1]), max_new_tokens=4)
    assert not calls and len(seen) == 4


def test_hooks_and_adapters_of_the_output_layer_are_called(tiny_mllm, calls):
    model, processor = copy.deepcopy(tiny_mllm[0]), tiny_mllm[1]
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([30]), 99.0))
    written = model.generate(**processor.user_turns(PROMPTS[:1]), max_new_tokens=4, eos_token_id=2)
    assert calls == [1] and written[0, -4:].tolist() == [30] * 4


def test_a_processor_that_chooses_a_residual_token_is_an_error(tiny_mllm, calls):
    model, processor = tiny_mllm

    class Chooses(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return F.one_hot(torch.tensor([model.vocabulary.offset])).float()  # the output layer has fewer tokens

    with pytest.raises(UserError, match="chosen a residual token"):
        model.generate(**processor.user_turns(PROMPTS[:1]), max_new_tokens=4, logits_processor=[Chooses()])
    assert calls == [1]


@pytest.mark.parametrize("in_place", [False, True])
def test_suppressed_tokens_are_those_of_transformers(in_place):
    ids, processor = torch.tensor([2, 7, 90]), SuppressTokens(torch.tensor([2, 7, 90]), in_place)
    for size in (10, 100):
        scores = torch.randn(3, size)
        expected = SuppressTokensLogitsProcessor(ids)(torch.zeros(3, 1), scores)
        given = scores.clone()
        assert torch.equal(processor(torch.zeros(3, 1), given), expected)
        assert torch.equal(given, expected if in_place else scores)
