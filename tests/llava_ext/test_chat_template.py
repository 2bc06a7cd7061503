"""Rendering with chat templates: learned spans, rejected templates, lengths and truncation."""

import pytest
import torch
from chat_templates import ENDS, MESSAGES, QUESTION, SPECIAL, SYSTEM, TEMPLATES, every_template
from transformers import AutoTokenizer

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.errors import UserError
from llava_ext.chat_template import ConversationTemplate
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor, TooLong


@pytest.fixture
def tokenizer(tiny_tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


@pytest.fixture
def template_of(tokenizer):
    def build(family):
        tokenizer.chat_template = TEMPLATES.get(family, family)
        return ConversationTemplate(tokenizer)

    return build


def learned(rendered):
    return [rendered.text[start:end] for start, end in rendered.assistant_spans]


# Learned spans -----------------------------------------------------------------------------------------------


def test_answers_and_end_tokens_of_the_embedded_template_are_learned(tiny_tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    rendered = ConversationTemplate(tokenizer).render(MESSAGES)
    assert learned(rendered) == ["a ring<|end|>", "red<|end|>"]
    assert rendered.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


@every_template
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_only_answers_and_their_end_tokens_are_learned(tokenizer, template_of, family, system):
    rendered = template_of(family).render([*system, *MESSAGES])
    lead = " " if family == "mistral" else ""
    assert learned(rendered) == [f"{lead}a ring{ENDS[family]}", f"{lead}red{ENDS[family]}"]
    assert rendered.text == tokenizer.apply_chat_template([*system, *MESSAGES], tokenize=False)
    assert ("Be brief." in rendered.text) == bool(system)


@every_template
def test_learned_tokens_are_exactly_those_of_the_answers(tokenizer, template_of, family):
    """From text to labels: answers are learned up to their edges, and questions are not learned."""
    template_of(family)
    vision = EvoTokConfig.preset("tiny")
    processor = EvoTokLlavaProcessor.from_parts(EvoTokImageProcessor(size=48), tokenizer, vision, len(tokenizer))
    encoded = processor.encode_conversation(MESSAGES, [])
    ids = encoded.labels[encoded.labels != -100].tolist()
    answers = tokenizer.decode(ids).replace(ENDS[family], "\n").split("\n")
    assert [answer.strip() for answer in answers] == ["a ring", "red", ""]
    assert torch.equal(encoded.input_ids[encoded.labels != -100], encoded.labels[encoded.labels != -100])


@every_template
def test_prompts_match_training(template_of, family):
    """A prompt is the start of the finished conversation, up to the learned part of the answer."""
    template = template_of(family)
    prompt = template.render(MESSAGES[:3], add_generation_prompt=True)
    trained = template.render(MESSAGES)
    assert trained.text.startswith(prompt.text) and len(prompt.text) == trained.assistant_spans[-1][0]


@pytest.mark.parametrize("family", ["qwen2", "llama3", "mistral", "phi3"])
def test_the_generation_prompt_is_that_of_the_template(tokenizer, template_of, family):
    prompt = template_of(family).render([QUESTION], add_generation_prompt=True).text
    assert prompt == tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)


def test_a_thinking_model_is_prompted_without_thoughts(tokenizer, template_of):
    """The template's generation prompt without thinking is the one that matches the finished turns."""
    prompt = template_of("qwen3").render([QUESTION], add_generation_prompt=True).text
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert prompt == tokenizer.apply_chat_template(
        [QUESTION], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def test_contents_are_trimmed_if_the_template_trims_them(template_of):
    spaced = [{"role": "user", "content": " What? \n"}, {"role": "assistant", "content": "a ring\n"}]
    rendered = template_of("llama3").render(spaced)
    assert learned(rendered) == ["a ring<|eot_id|>"] and "\n\nWhat?<|eot_id|>" in rendered.text
    assert learned(template_of("qwen2").render(spaced)) == ["a ring\n<|im_end|>"]


def test_a_template_that_writes_the_date_keeps_working_after_midnight(tokenizer, template_of, monkeypatch):
    template = template_of("Day {{ day }}. " + tokenizer.chat_template)
    apply = tokenizer.apply_chat_template
    for day in ("one", "two"):
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, d=day, **k: apply(*a, day=d, **k))
        rendered = template.render(MESSAGES)
        assert rendered.text.startswith(f"Day {day}.") and learned(rendered) == ["a ring<|end|>", "red<|end|>"]


# Rejected templates ------------------------------------------------------------------------------------------


def test_a_template_that_rewrites_contents_is_rejected(template_of):
    template = template_of("qwen3")
    with pytest.raises(UserError, match="changes message contents"):
        template.render([QUESTION, {"role": "assistant", "content": "<think>a circle?</think>a ring"}])
    assert learned(template.render(MESSAGES)) == ["a ring<|im_end|>", "red<|im_end|>"]


@pytest.mark.parametrize(("times", "content"), [(0, ""), (2, "{{ m['content'] }}{{ m['content'] }}")])
def test_a_template_that_drops_or_repeats_a_turn_is_rejected(template_of, times, content):
    template = template_of(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        f"{{% else %}}{content}{{% endif %}}<|end|>{{% endfor %}}"
    )
    with pytest.raises(UserError, match=f"writes message 1 \\(assistant\\) .* {times} times, expected once"):
        template.render(MESSAGES)


def test_unsupported_roles_are_named(template_of):
    with pytest.raises(UserError, match=r"does not accept messages of roles \('user', 'user'\): roles must alternate"):
        template_of("mistral").render([QUESTION, QUESTION])


def test_a_template_without_end_of_turn_is_rejected(template_of):
    template = template_of("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match="a model would never learn to stop"):
        template.render(MESSAGES)


def test_a_tokenizer_without_template_is_rejected(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat_template"):
        ConversationTemplate(tokenizer)


# Length ------------------------------------------------------------------------------------------------------


def reading(answer="a ring"):
    return [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": answer}]


def test_a_drawn_image_counts_one_step_per_position(tiny_mllm):
    _, processor = tiny_mllm
    drawing = [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": "<image>"}]
    codes = torch.zeros(processor.num_positions, processor.num_levels, dtype=torch.long)
    flat = processor.encode_conversation(drawing, [codes]).input_ids
    folded = (processor.num_levels - 1) * processor.num_positions
    assert processor.lay_out(drawing).num_steps == len(flat) - folded
    assert processor.lay_out(reading()).num_steps == len(processor.encode_conversation(reading(), [None]).input_ids)


def test_truncation_cuts_text_at_the_end_and_never_images(tiny_mllm):
    _, processor = tiny_mllm
    layout = processor.lay_out(reading("a ring and a cross and a circle"))
    whole = processor.put_images(layout, [None])
    for length in range(layout.num_steps + 2):
        try:
            cut = processor.put_images(layout.cut_to(length), [None])
        except TooLong:
            assert length < whole.labels.ne(-100).nonzero()[0] + 1, "a learned token would have remained"
            continue
        assert torch.equal(cut.input_ids, whole.input_ids[:length]) and torch.equal(cut.labels, whole.labels[:length])
        assert cut.input_ids.eq(processor.image_token_id).sum() == processor.num_positions
    drawn_last = processor.lay_out([*reading(), QUESTION, {"role": "assistant", "content": "<image>"}])
    with pytest.raises(TooLong, match="do not include all images completely"):
        drawn_last.cut_to(drawn_last.num_steps - 3)


def test_text_that_spells_an_image_token_is_text(tiny_mllm):
    _, processor = tiny_mllm
    layout = processor.lay_out(reading("<|image_pad|>"))
    assert sum(layout.is_image) == 1
    learned = [token for token, one in zip(layout.tokens, layout.learned, strict=True) if one]
    assert processor.image_token_id not in learned and processor.decode(learned) == "<|image_pad|><|end|>"
