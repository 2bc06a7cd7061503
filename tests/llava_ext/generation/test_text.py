"""Text generation with transformers' `generate`: every way to run it gives the same tokens for the same images."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from evotok_plugin.errors import UserError
from llava_ext.generation import Finished

NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def asked(any_mllm):
    """A model, its processor, and four questions with two, no, one and two images, all of them different."""
    model, processor = any_mllm
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(5)]
    questions = [
        "<image>\n<image>\nWhich is red?",
        "What is a ring?",
        "<image>\nWhat is it?",
        "How <image> many <image>?",
    ]
    return model, processor, questions, [images[:2], [], images[2:3], images[3:]]


def inputs_of(asked, rows):
    _, processor, questions, images = asked
    return processor.user_turns([questions[r] for r in rows], images=[image for r in rows for image in images[r]])


def answers(model, inputs, **settings):
    """New ids of every row, without padding."""
    ids = model.generate(**inputs, **{**NEW, **settings})[:, inputs["input_ids"].shape[1] :]
    pad = model.generation_config.pad_token_id
    return [row[row != pad].tolist() for row in ids]


def first_logits(model, inputs, **settings):
    """Logits (rows, V) of the first new token."""
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, **settings).logits[0]


def test_images_change_the_answer(asked):
    """Otherwise the other tests would pass with any image."""
    model, processor, questions, images = asked
    a, b = (processor.user_turns(questions[2], images=[one]) for one in (images[2][0], images[3][0]))
    assert (first_logits(model, a) - first_logits(model, b)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"use_cache": None},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"stop_strings": ["@@@"], "tokenizer": True},
        {"output_hidden_states": True},
    ],
    ids=["no cache", "cache unset", "static", "dynamic", "stop strings", "hidden states"],
)
def test_all_ways_to_generate_agree(asked, settings):
    model, processor, *_ = asked
    inputs = inputs_of(asked, [0, 1, 2, 3])
    if "tokenizer" in settings:
        settings = settings | {"tokenizer": processor.tokenizer}

    def steps(**more):
        wanted = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": -1}
        outputs = model.generate(**inputs, **NEW, **wanted, **more)
        return outputs.sequences, torch.stack(outputs.logits)

    (expected, logits), (ids, others) = steps(), steps(**settings)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(others, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_equals_single_rows(asked, use_cache):
    model = asked[0]
    together = answers(model, inputs_of(asked, [0, 1, 2, 3]), use_cache=use_cache)
    assert together == [answers(model, inputs_of(asked, [row]))[0] for row in range(4)]


@pytest.mark.parametrize("settings", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_copy_of_a_row_gets_its_images(asked, settings, use_cache):
    model = asked[0]
    expanded = first_logits(model, inputs_of(asked, [0, 1, 3]), use_cache=use_cache, **settings)
    single = torch.cat([first_logits(model, inputs_of(asked, [row])) for row in (0, 1, 3)])
    torch.testing.assert_close(expanded, single.repeat_interleave(3, dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_beam_search_in_a_batch_equals_single_rows(asked, settings):
    model = asked[0]
    together = answers(model, inputs_of(asked, [0, 2, 1]), num_beams=3, **settings)
    assert together == [answers(model, inputs_of(asked, [row]), num_beams=3)[0] for row in (0, 2, 1)]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_embeddings_are_expanded_like_ids(asked, settings):
    model, inputs = asked[0], inputs_of(asked, [0, 2, 1])
    expected = first_logits(model, inputs, **settings)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    given = first_logits(model, {**inputs, "inputs_embeds": embeds}, **settings)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_cached_codes_are_expanded_like_images(asked):
    model = asked[0]
    inputs = inputs_of(asked, [0, 2])
    with torch.no_grad():
        codes = model.vision_tower.encode(inputs.pop("pixel_values")).codes
    for settings in ({}, {"use_cache": False}, {"num_beams": 2}):
        assert answers(model, {**inputs, "image_codes": codes}, **settings) == answers(
            model, inputs_of(asked, [0, 2]), **settings
        )


def test_a_wrong_number_of_images_is_rejected(asked):
    model, inputs = asked[0], inputs_of(asked, [0, 2])
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        with pytest.raises(UserError, match="every <image> needs its image"):
            model.generate(**inputs, **{**NEW, **settings})
    with pytest.raises(UserError, match="every <image> needs its image"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=inputs["pixel_values"])


def test_prompt_lookup_equals_plain_decoding(asked):
    model, inputs = asked[0], inputs_of(asked, [0])
    assert answers(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=12) == answers(
        model, inputs, max_new_tokens=12
    )


def test_a_conversation_continues_from_its_cache(asked):
    """All ids and images are given with the cache of the first turn; only the rest is computed, with its images."""
    model, processor, _, images = asked
    parts = [{"type": "image", "image": images[0][0]}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": parts}]
    first = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**first, **NEW, past_key_values=cache)
    cache.crop(first["input_ids"].shape[1] - cache.get_seq_length())
    answer = {"role": "assistant", "content": "a ring"}
    chat += [answer, {"role": "user", "content": [{"type": "image", "image": images[0][1]}, parts[1]]}]
    whole = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    assert torch.equal(whole["input_ids"][:, : first["input_ids"].shape[1]], first["input_ids"])
    assert answers(model, whole, past_key_values=cache) == answers(model, whole)


def test_text_contains_no_image_tokens(any_mllm, monkeypatch):
    """Even if the image tokens have the highest logits."""
    model, processor = any_mllm
    inputs, wanted = (
        processor.user_turns("a ring"),
        [processor.image_token_id, processor.image_start_id, processor.image_end_id],
    )
    head = model.lm_head.forward

    def biased(hidden):
        logits = head(hidden)
        logits[..., wanted] = 1e4
        return logits

    monkeypatch.setattr(model.lm_head, "forward", biased)
    for settings in ({}, {"do_sample": True, "top_k": 3, "top_p": 0.5}, {"num_beams": 2}, {"suppress_tokens": [7]}):
        ids = model.generate(**inputs, **{**NEW, **settings})[0, inputs["input_ids"].shape[1] :]
        assert not set(ids.tolist()) & set(wanted)


def test_text_stays_within_the_context(any_mllm, monkeypatch):
    model, processor = any_mllm
    inputs = processor.user_turns(["a ring", "a ring and a cross"])
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", longest + 3)
    never = {"eos_token_id": -1}
    with pytest.warns(UserWarning, match="limited to 3 tokens instead of 50"):
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False, **never)
    assert ids.shape[1] == longest + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    wide = {name: torch.nn.functional.pad(value, (9, 0)) for name, value in inputs.items()}  # padding has no position
    assert model.generate(**wide, max_new_tokens=3, do_sample=False, **never).shape[1] == longest + 12
    for limit in (longest, longest - 2):
        monkeypatch.setattr(model.config.text_config, "max_position_embeddings", limit)
        for settings in (NEW, {**NEW, "use_cache": False}, {"max_length": 99}):
            with pytest.raises(
                UserError, match=f"take {longest + 1} steps, but the language model has {limit} positions"
            ):
                model.generate(**inputs, **settings)


def test_minus_one_position_means_no_limit(any_mllm, monkeypatch):
    model, processor = any_mllm
    inputs = processor.user_turns("a ring")
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", -1)
    monkeypatch.setattr(model.language_model.config, "max_position_embeddings", -1)
    for settings in ({}, {"modalities": "auto", "processor": processor}):
        assert model.generate(**inputs, **NEW, **settings).shape[1] > inputs["input_ids"].shape[1]
    assert len(model.generate_images("a ring", processor)) == 1


def test_outputs_and_arguments_of_generate(any_mllm):
    model, processor = any_mllm
    inputs, seen = processor.user_turns(["a ring", "two crosses and a ring"]), []
    wanted = {"output_hidden_states": True, "output_scores": True, "output_logits": True}
    counting = LogitsProcessorList([lambda ids, scores: seen.append(1) or scores])
    outputs = model.generate(**inputs, **NEW, **wanted, return_dict_in_generate=True, logits_processor=counting)
    layers = model.config.text_config.num_hidden_layers + 1
    assert len(outputs.hidden_states) == len(outputs.scores) == len(seen) and len(outputs.hidden_states[0]) == layers
    assert outputs.hidden_states[0][-1].shape == (*inputs["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate(**inputs, max_new_token=3)


def test_forward_passes_keywords_on_and_rejects_unknown_ones(any_mllm):
    model, processor = any_mllm
    inputs = processor.user_turns("a ring")
    with torch.no_grad():
        plain = model(**inputs)
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden[-1], plain.last_hidden_state)
        picked = model(**inputs, logits_to_keep=torch.tensor([0, 2])).logits
        torch.testing.assert_close(picked, plain.logits[:, [0, 2]])
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, plain.logits[:, -2:])
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.logits)
        for wrong in ({"pixel_value": None, "pixels": 1}, {"attn_mask": inputs["attention_mask"]}):
            with pytest.raises(ValueError, match="unknown keyword"):
                model(**inputs, **wrong)


def test_attentions_are_returned_with_eager_attention(tiny_backbone_folder, tiny_evotok_folder):
    from llava_ext.assembly import assemble

    model, processor = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2, attn_implementation="eager")
    inputs = processor.user_turns("a ring")
    attentions = model.eval()(**inputs, output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    assert [a.shape for a in attentions] == [(1, 2, length, length)] * 2


def test_a_folder_without_generation_config_and_with_the_cache_disabled(any_mllm, tmp_path):
    model, processor = any_mllm
    inputs = processor.user_turns("<image>\nWhat is it?", images=[Image.new("RGB", (48, 48), (200, 0, 0))])
    model.config.text_config.use_cache = model.config.use_cache = False  # as after training with Trainer
    model.save_pretrained(tmp_path)
    assert model.config.text_config.use_cache is model.config.use_cache is False
    model.config.text_config.use_cache = model.config.use_cache = True
    assert '"use_cache": false' not in (tmp_path / "config.json").read_text()
    (tmp_path / "generation_config.json").unlink()
    settings = (tmp_path / "config.json").read_text().replace('"use_cache": true', '"use_cache": false')
    (tmp_path / "config.json").write_text(settings)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.text_config.use_cache is False
    assert answers(loaded, inputs) == answers(model, inputs)


# The mode of the model ---------------------------------------------------------------------------------------


@pytest.fixture
def in_training(tiny_backbone_folder, tiny_evotok_folder):
    """A separate model in training mode with a high attention dropout; one frozen part is in evaluation mode."""
    from llava_ext.assembly import assemble

    model, processor = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2)
    model.train()
    for layer in model.language_model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.read_projector.eval()
    return model, processor


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_threads_can_draw_and_answer_with_a_model_in_training_mode(in_training):
    model, processor = in_training
    before, prompt = modes(model), processor.user_turns("a ring")

    def draw(seed):
        return model.generate_images("a ring", processor, seed=seed, output_type="pt")

    def answer(_):
        return [event.ids.tolist() for event in model.stream(prompt, processor) if isinstance(event, Finished)]

    with ThreadPoolExecutor(4) as pool:
        drawn, answered = list(pool.map(draw, range(6))), list(pool.map(answer, range(3)))
    assert modes(model) == before and before["language_model"] and not before["read_projector"]
    model.eval()
    for seed, image in enumerate(drawn):
        torch.testing.assert_close(image, draw(seed))
    assert answered == [answer(0)] * 3


def test_an_unfinished_answer_does_not_change_the_mode(in_training):
    model, processor = in_training
    events = model.stream(processor.user_turns("a ring"), processor)
    next(events)
    assert model.training and model.language_model.training
    model.language_model.layers[0].forward = model.language_model.layers[0].forward  # as accelerate's hooks do
    with pytest.raises(UserError, match="call model.eval\\(\\) before drawing"):
        model.generate_images("a ring", processor)


# Settings of answers with images -----------------------------------------------------------------------------


def test_settings_of_answers_come_from_generation_configs(any_mllm, monkeypatch):
    model, processor = any_mllm
    inputs = processor.user_turns("a ring")
    never = {"eos_token_id": -1, "max_images": 0}

    def new(**settings):
        ids = model.generate(**inputs, modalities="auto", processor=processor, **{**never, **settings})
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    plain = new(max_new_tokens=8)
    assert len(plain) == 8
    assert new(generation_config=GenerationConfig(max_new_tokens=5)) == plain[:5]
    assert new(generation_config=GenerationConfig(max_new_tokens=5), max_new_tokens=3) == plain[:3]
    assert new(generation_config=GenerationConfig(max_length=inputs["input_ids"].shape[1] + 4)) == plain[:4]
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 6)
    assert new() == plain[:6]
    assert new(generation_config=GenerationConfig(suppress_tokens=plain[:1]))[0] != plain[0]
    penalized = new(repetition_penalty=1e4)
    text = model.generate(**inputs, do_sample=False, repetition_penalty=1e4, eos_token_id=-1)
    assert penalized == text[0, inputs["input_ids"].shape[1] :].tolist()
    for config, name in (
        (GenerationConfig(num_beams=2), "generation_config.num_beams = 2"),
        (GenerationConfig(stop_strings=["a"]), "generation_config.stop_strings"),
        (GenerationConfig(return_dict_in_generate=True), "generation_config.return_dict_in_generate"),
    ):
        with pytest.raises(UserError, match=name):
            new(generation_config=config)
    for name, value in (("sequence_bias", {"a": 1}), ("exponential_decay_length_penalty", (1,))):
        with pytest.raises(UserError, match="invalid generation setting of the call or the model"):
            new(**{name: value})
    monkeypatch.setattr(model.generation_config, "num_return_sequences", 2)
    with pytest.raises(UserError, match="model.generation_config.num_return_sequences = 2"):
        new()
