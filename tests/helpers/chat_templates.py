"""Chat templates of common families, and conversations for them."""

import pytest

# Small templates for the formats that the documentation of these families describes.
TEMPLATES = {
    "qwen2": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen3": (  # thinks before the last answer, forgets earlier thoughts
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}"
        "{% set answer = m['content'].split('</think>')[-1].lstrip('\n') %}"
        "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{{ answer }}{% else %}{{ answer }}{% endif %}"
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "llama3": (  # trims
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (  # a system turn goes before the last question, an answer begins with a space
        "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}"
        "{% else %}{% set system, turns = none, messages %}{% endif %}<s>"
        "{% for m in turns %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] "
        "{% if system is not none and loop.index0 >= turns | length - 2 %}{{ system + '\n\n' }}{% endif %}"
        "{{ m['content'] }} [/INST]{% else %}{{ ' ' + m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "phi3": (  # ends the whole conversation with one more token
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
}
ENDS = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "phi3": "<|end|>"}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<s>", "</s>", "[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>",
]  # fmt: skip
QUESTION = {"role": "user", "content": "What is it?"}
MESSAGES = [
    QUESTION,
    {"role": "assistant", "content": "a ring"},
    {"role": "user", "content": "Which color? a ring"},
    {"role": "assistant", "content": "red"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
every_template = pytest.mark.parametrize("family", TEMPLATES)
