import pytest
from transformers import AutoTokenizer

from llava_ext.conversation import ConversationTemplate

QWEN_LIKE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "a ring"},
    {"role": "user", "content": "Which color? a ring"},
    {"role": "assistant", "content": "red"},
]


@pytest.fixture
def tokenizer(tiny_tokenizer_folder):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.mark.parametrize("template", [None, QWEN_LIKE])
def test_only_assistant_turns_and_their_end_are_learned(tokenizer, template):
    if template:
        tokenizer.chat_template = template
    rendered = ConversationTemplate(tokenizer).render(MESSAGES)
    end = "<|im_end|>" if template else "<|end|>"
    assert [rendered.text[a:b] for a, b in rendered.assistant_spans] == [f"a ring{end}", f"red{end}"]
    assert rendered.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_generation_prompt_is_the_template_s(tokenizer):
    rendered = ConversationTemplate(tokenizer).render(MESSAGES[:1], add_generation_prompt=True)
    assert rendered.text.endswith("<|assistant|>") and rendered.assistant_spans == ()


def test_a_template_that_rewrites_contents_is_refused(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    template = ConversationTemplate(tokenizer)
    template.render(MESSAGES)
    with pytest.raises(ValueError, match="changes message contents"):
        template.render([{"role": "user", "content": " spaced "}, {"role": "assistant", "content": "x"}])


def test_a_template_that_drops_a_turn_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="drops or reorders message 1"):
        ConversationTemplate(tokenizer).render(MESSAGES)


def test_a_tokenizer_without_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat_template"):
        ConversationTemplate(tokenizer)
