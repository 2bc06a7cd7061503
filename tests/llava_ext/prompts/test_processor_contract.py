"""The processor keeps the contract of transformers' processors: compared with LlavaProcessor on the same calls.

transformers' own `ProcessorTesterMixin` (tests/test_processing_common.py of the source distribution 5.23.0) passes on
the included model's processor, except for these tests, which do not apply:

- `apply_chat_template_image`: expects lists, and ids alone without `return_dict`. The defaults here are those that
  `generate` takes, padded tensors in a dictionary. It also passes `num_frames`, which is rejected by name.
- `kwargs_overrides_default_subprocessor_kwargs`, `structured_kwargs_nested_from_dict`, `unstructured_kwargs`,
  `unstructured_kwargs_batched`, `subprocessor_defaults_preserved_by_kwargs`: set `rescale_factor=-1`, which the image
  processor rejects by name, as the model reads values in [-1, 1].
- `args_overlap_kwargs`: saves an unknown setting of the image processor, which loading rejects.
- `save_load_pretrained_additional_features`: adds tokens while loading; their ids would be those of image codes.
- `tokenizer_decode_defaults`: builds the processor without the ids of the image codes, which have no default.
- `init_arguments_not_in_class_attributes`: `chat_template` is a property, so that processor and tokenizer share it.
- Tests of `replace_image_token`: images are inserted as ids, so that text which users wrote is never taken for one.
"""

import pytest
import torch
from chat_templates import TEMPLATES
from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from llava_ext import EvoTokLlavaProcessor
from llava_ext.checkpointing import INCLUDED_MODEL
from llava_ext.prompts.messages import IMAGE_TOKEN

RED, BLUE = Image.new("RGB", (48, 48), "red"), Image.new("RGB", (48, 48), "blue")
ONE, TWO = f"a {IMAGE_TOKEN}\nWhat is it?", f"{IMAGE_TOKEN} and {IMAGE_TOKEN}"
CHAT = [
    {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What shape is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is a circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "And the color?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red, and ä"}]},
]


@pytest.fixture(scope="module")
def processor():
    return EvoTokLlavaProcessor.from_pretrained(INCLUDED_MODEL)


@pytest.fixture(scope="module")
def llava():
    """transformers' processor with the same tokenizer and the same number of tokens per image."""
    size = {"height": 48, "width": 48}
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=size)
    tokenizer = AutoTokenizer.from_pretrained(INCLUDED_MODEL, padding_side="left")
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def without_delimiters(processor, row):
    return [token for token in row if token not in (processor.image_start_id, processor.image_end_id)]


CALLS = {
    "text": ((), {"text": ["What is it?"]}),
    "an image": ((), {"text": [ONE], "images": RED}),
    "a list of images": ((), {"text": [ONE, TWO], "images": [RED, BLUE, RED]}),
    "nested images": ((), {"text": [ONE, "b", TWO], "images": [[RED], [], [BLUE, RED]]}),
    "positional": (([RED], ONE), {}),
    "one string": (([[RED]], ONE), {}),
    "keywords in dictionaries": ((), {"text": ["a b", "a"], "text_kwargs": {"padding_side": "right"}}),
    "padding to a length": ((), {"text": ["a b", "a"], "padding": "max_length", "max_length": 12}),
    "padding to a multiple": ((), {"text": ["a b", "a"], "pad_to_multiple_of": 8}),
    "truncation": ((), {"text": ["a b c d e f g", "a"], "truncation": True, "max_length": 6}),
    "modalities of tokens": ((), {"text": [ONE], "images": RED, "return_mm_token_type_ids": True}),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_give_what_llava_gives(processor, llava, call):
    inputs, keywords = CALLS[call]
    ours = processor(*inputs, **keywords)
    theirs = llava(*inputs, **{"padding": True, **keywords})
    rows = ours["input_ids"].tolist()
    side = "right" if "text_kwargs" in keywords else "left"
    padded = [without_delimiters(processor, row) for row in rows]
    width = max(map(len, theirs["input_ids"]))
    pad = processor.tokenizer.pad_token_id
    for ours_row, theirs_row in zip(padded, theirs["input_ids"], strict=True):
        real = [token for token in ours_row if token != pad]
        assert real == [token for token in theirs_row if token != pad]
        if not (ours_row.count(processor.image_token_id) or "images" in keywords):
            filled = [pad] * (width - len(real))
            assert ours_row == theirs_row == (filled + real if side == "left" else real + filled)
    assert sorted(ours) == sorted(theirs)
    if "pixel_values" in theirs:
        assert ours["pixel_values"].shape == (len(theirs["pixel_values"]), *theirs["pixel_values"][0].shape)
    if "mm_token_type_ids" in theirs:
        assert int(ours["mm_token_type_ids"].sum()) == sum(map(sum, theirs["mm_token_type_ids"])) == 9
        assert torch.equal(ours["mm_token_type_ids"].bool(), ours["input_ids"] == processor.image_token_id)


@pytest.mark.parametrize("keywords", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}], ids=str)
def test_the_template_alone_renders_what_the_processor_renders(processor, llava, keywords):
    chat = CHAT[:3] if keywords.get("add_generation_prompt") else CHAT
    rendered = processor.apply_chat_template(chat, **keywords)
    assert rendered == llava.apply_chat_template(chat, **keywords)
    assert rendered == processor.tokenizer.apply_chat_template(chat, tokenize=False, **keywords)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_the_template_equal_the_learned_tokens(processor, llava, side):
    chats = [CHAT, CHAT[2:]]
    keywords = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batching = {"padding": True, "padding_side": side}
    ours = processor.apply_chat_template(chats, **keywords, processor_kwargs=batching)
    theirs = llava.apply_chat_template(chats, **keywords, processor_kwargs=batching)
    for number, chat in enumerate(chats):
        learned = ours["input_ids"][number][ours["assistant_masks"][number].bool()]
        reference = torch.tensor(theirs["input_ids"][number])[torch.tensor(theirs["assistant_masks"][number]).bool()]
        assert torch.equal(learned, reference)
        encoded = processor.encode_conversation(chat, [None] * (1 - number))
        assert torch.equal(learned, encoded.labels[encoded.labels != -100])
    assert processor.decode(learned) == "red, and ä<|end|>"


def test_a_template_decides_what_is_masked(processor):
    only_contents = processor.chat_template.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    without_tags = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    texts = {}
    for name, template in (("contents", only_contents), ("no tags", without_tags)):
        batch = processor.apply_chat_template(
            CHAT, tokenize=True, return_assistant_tokens_mask=True, chat_template=template
        )
        texts[name] = processor.decode(batch["input_ids"][batch["assistant_masks"].bool()])
    assert texts == {
        "contents": "It is a circle.red, and ä",
        "no tags": "It is a circle.<|end|>red, and ä<|end|>",
    }


def test_names_that_serving_engines_and_trainers_read(processor):
    assert processor.image_token == IMAGE_TOKEN
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert processor.image_token_ids == [processor.image_token_id]
    counts = processor._get_num_multimodal_tokens([(60, 100), (48, 48)])
    assert counts["num_image_tokens"] == [9, 9] and counts["num_image_patches"] == [1, 1]
    assert set(processor(ONE, images=RED)) == set(processor.model_input_names)


def test_the_tokenizers_padding_side_is_honored(processor, tmp_path):
    texts = ["a b c", "a"]
    assert processor(texts)["attention_mask"][1, 0] == 0
    right = AutoProcessor.from_pretrained(INCLUDED_MODEL, padding_side="right")
    assert right(texts)["attention_mask"][1, 0] == 1
    assert right.drawing_prompts(texts)["attention_mask"][1, 0] == 0  # the next step draws
    processor.save_pretrained(tmp_path)
    assert EvoTokLlavaProcessor.from_pretrained(tmp_path)(texts)["attention_mask"][1, 0] == 0


def test_prompt_and_completion_are_parts_of_the_conversation(processor):
    """TRL renders a prompt and the whole conversation, cuts the text, and encodes both parts."""
    whole = processor.apply_chat_template(CHAT[:2])
    prompt = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    completion = whole[len(prompt) :]
    assert completion == "It is a circle.<|end|>"
    parts = [processor(str(prompt), images=RED)["input_ids"][0], processor(completion)["input_ids"][0]]
    assert torch.equal(torch.cat(parts), processor.apply_chat_template(CHAT[:2], tokenize=True)["input_ids"][0])


def test_unsupported_messages_are_template_errors(processor):
    """TRL probes templates for tools, and expects the error of a template."""
    call = {"type": "function", "function": {"name": "draw", "arguments": {}}}
    with pytest.raises(TemplateError, match="'tool_calls' is not supported"):
        processor.apply_chat_template([CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}])


LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_reads_parts_renders_images_in_their_place(processor):
    rendered = processor.apply_chat_template(CHAT[:1], chat_template=LLAVA, add_generation_prompt=True)
    assert rendered == f"USER: {IMAGE_TOKEN}\nWhat shape is it? ASSISTANT:"
    once = processor.apply_chat_template(CHAT[:1], chat_template=LLAVA, add_generation_prompt=True, tokenize=True)
    assert torch.equal(once["input_ids"], processor(rendered, images=RED)["input_ids"])


def test_columns_of_a_data_set_are_lists(processor):
    rows = Dataset.from_dict({"text": [ONE, "b"]})
    both = processor(text=rows["text"], images=[RED])
    assert torch.equal(both["input_ids"], processor(text=[ONE, "b"], images=[RED])["input_ids"])
    assert processor.apply_chat_template(CHAT[2:3], tools=[], documents=[]) == "<|user|>And the color?"


def test_a_named_template_is_found(processor):
    named = AutoProcessor.from_pretrained(INCLUDED_MODEL)
    named.chat_template = {"default": named.chat_template, "chatml": TEMPLATES["qwen2"]}
    assert named.apply_chat_template(CHAT[2:3]) == "<|user|>And the color?"
    assert "<|im_start|>user\nAnd the color?" in named.apply_chat_template(CHAT[2:3], chat_template="chatml")


def test_pixels_and_images_are_post_processed(processor):
    pixels = processor(images=[RED, BLUE])["pixel_values"]
    images = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
    assert processor.post_process_multimodal_output(images, generation_mode="image") == images
    ids = processor(["a b", "c"])["input_ids"]
    assert processor.post_process_multimodal_output(ids) == processor.batch_decode(ids, True) == ["a b", "c"]
    with pytest.raises(ValueError, match="expected pixels"):
        processor.post_process_multimodal_output(ids, generation_mode="image")
    with pytest.raises(ValueError, match="got 'audio'"):
        processor.post_process_multimodal_output(ids, generation_mode="audio")
