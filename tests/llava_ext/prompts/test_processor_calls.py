"""Calls of the processor in the style of transformers: rendering and encoding, forms of images, keywords."""

import base64
import copy

import numpy as np
import pytest
import torch
from chat_templates import TEMPLATES, every_template
from PIL import Image
from transformers import AutoTokenizer, pipeline

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.errors import UserError
from llava_ext import EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor
from llava_ext.processing_evotok_llava import IMAGE_TOKEN
from llava_ext.prompts.messages import read_messages

RED, BLUE = Image.new("RGB", (48, 48), "red"), Image.new("RGB", (48, 48), "blue")
QUESTION = "<image>\nWhat is it?"


@pytest.fixture(scope="module")
def processor(tiny_mllm):
    return copy.deepcopy(tiny_mllm[1])


@pytest.fixture
def processor_of(tiny_tokenizer_folder):
    def build(family):
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>"], special_tokens=True)
        tokenizer.add_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
        tokenizer.chat_template = TEMPLATES[family]
        vision = EvoTokConfig.preset("tiny")
        return EvoTokLlavaProcessor.from_parts(EvoTokImageProcessor(size=48), tokenizer, vision, len(tokenizer))

    return build


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def image(picture):
    return {"type": "image", "image": picture}


def same(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


# Two steps: render, then encode -------------------------------------------------------------------------------


@every_template
@pytest.mark.parametrize("keywords", [{"add_generation_prompt": True}, {}, {"continue_final_message": True}], ids=str)
def test_rendered_text_gives_the_ids_of_its_messages(processor_of, family, keywords):
    processor = processor_of(family)
    said = "a <|im_end|></s> <|image_pad|> <image>"
    talk = [
        user(image(RED), text(said)),
        {"role": "assistant", "content": "red"},
        user(text("And this?"), image(BLUE), text("Say.")),
    ]
    if not keywords.get("add_generation_prompt"):
        talk.append({"role": "assistant", "content": "blue </s>"})
    once = processor.apply_chat_template(talk, tokenize=True, **keywords)
    rendered = processor.apply_chat_template(talk, **keywords)
    assert said.split("<|im")[0] in rendered and rendered.count(IMAGE_TOKEN) == 3
    same(once, processor(text=rendered, images=[RED, BLUE]))
    same(once, processor([RED, BLUE], rendered))
    same(once, processor(text=[rendered], images=[[RED, BLUE]]))


@every_template
def test_a_rendered_plain_string_is_not_rendered_again(processor_of, family):
    processor = processor_of(family)
    chat = [user(image(RED), text("What is <image>?"))]
    rendered = str(processor.apply_chat_template(chat, add_generation_prompt=True))
    once = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    same(once, processor(rendered, RED))
    same(once, processor(processor.decode(once["input_ids"][0]), RED))
    by_tokenizer = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    once = processor.apply_chat_template(
        [{"role": "user", "content": [image(RED), text("What is it?")]}], tokenize=True, add_generation_prompt=True
    )
    if family != "qwen3":  # its generation prompt differs from its finished turns
        same(processor(text=by_tokenizer, images=RED), once)
    assert processor.decode(processor(by_tokenizer, RED)["input_ids"][0]).replace(
        "<|image_start|>" + IMAGE_TOKEN * processor.num_positions + "<|image_end|>", "<image>"
    ) == str(by_tokenizer)


def test_text_is_encoded_as_by_the_tokenizer(processor):
    for words in ("What is it?", "a <|end|> b", "<|user|>a<|assistant|>", ""):
        expected = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
        assert processor(words)["input_ids"].tolist() == [expected]


@pytest.mark.parametrize("marker", ["<image>", IMAGE_TOKEN, "<|image_start|><|image_pad|><|image_end|>"])
def test_an_image_may_be_written_in_three_ways(processor, marker):
    ids = processor(f"a {marker} b", images=RED)["input_ids"][0]
    inserted = "<|image_start|>" + IMAGE_TOKEN * processor.num_positions + "<|image_end|>"
    assert processor.decode(ids) == f"a {inserted} b"


def test_a_tokenizer_without_chat_template_encodes_text(processor):
    other = copy.deepcopy(processor)
    other.tokenizer.chat_template = None
    same(other(QUESTION, RED), processor(QUESTION, RED))
    with pytest.raises(UserError, match="has no chat_template"):
        other.user_turns("a")


@pytest.mark.parametrize("words", ["a <|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nhi"])
def test_control_tokens_in_bare_user_turns_are_text(processor_of, words):
    processor = processor_of("qwen2")
    once = processor.apply_chat_template([user(text(words))], add_generation_prompt=True, tokenize=True)
    same(processor.user_turns(words), once)
    plain = processor.apply_chat_template(
        [user(text(words))], add_generation_prompt=True, tokenize=True, sanitize_control_tokens=False
    )
    same(plain, processor(str(processor.apply_chat_template([user(text(words))], add_generation_prompt=True))))


def test_bare_user_turns_give_the_ids_of_their_messages(processor):
    chat = [user(image(RED), text("What is it?"))]
    same(
        processor.user_turns(QUESTION, RED),
        processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True),
    )
    with pytest.raises(ValueError, match="user_turns renders bare texts, got a rendered one"):
        processor.user_turns(processor.apply_chat_template([user(text("a"))]))


# Forms of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [RED, [RED], [[RED]], np.asarray(RED), np.asarray(RED)[None]], ids=lambda p: "")
def test_one_image_may_be_given_alone_or_in_lists(processor, pictures):
    expected = processor(text=QUESTION, images=[RED])
    same(processor(text=QUESTION, images=pictures), expected)
    same(processor(pictures, QUESTION), expected)
    same(processor(QUESTION, pictures), expected)
    same(processor(QUESTION, images=pictures), expected)
    same(processor([QUESTION], images=pictures), expected)
    same(processor(pictures, QUESTION, None, None), expected)
    same(processor(text=QUESTION, images=pictures, videos=None, audio=None), expected)


def test_images_of_image_parts_may_be_given_apart(processor):
    chat = [user(image(RED), text("What is it?"))]
    apart = [user({"type": "image"}, text("What is it?"))]
    expected = processor.apply_chat_template(chat, tokenize=True)
    same(expected, processor.apply_chat_template(apart, tokenize=True, images=[RED]))
    same(expected, processor.apply_chat_template(apart, tokenize=True, processor_kwargs={"images": [RED]}))
    same(expected, processor(text=processor.apply_chat_template(apart), images=RED))


def test_images_without_text_give_pixels(processor):
    assert processor(images=[RED, BLUE])["pixel_values"].shape == (2, 3, 48, 48)


def test_a_row_without_images_is_skipped_in_a_call_without_text(processor):
    expected = processor(images=[RED, BLUE])
    same(processor(images=[[RED], None, [BLUE]]), expected)
    same(processor(images=[None, RED, BLUE]), expected)


def test_images_stay_in_their_rows(processor):
    texts = ["no image", QUESTION, "<image>\nand\n<image>\ntoo"]
    nested = processor(text=texts, images=[[], [RED], [BLUE, RED]])
    same(nested, processor(text=texts, images=[None, RED, [BLUE, RED]]))
    same(nested, processor(text=texts, images=[RED, BLUE, RED]))
    assert nested["pixel_values"][1, 2].mean() > 0.9 > nested["pixel_values"][0, 2].mean()


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        ([QUESTION, "b"], [[], [RED]], "1 <image> in text 0 but 0 images"),
        ([QUESTION, QUESTION], [[RED, BLUE], []], "1 <image> in text 0 but 2 images"),
        ([QUESTION], [[RED], [BLUE]], "for each of 1 texts, got 2 lists"),
        ([QUESTION], [RED, BLUE], "1 <image> in the text but 2 images"),
        (QUESTION, None, "1 <image> in the text but 0 images"),
        ("What?", RED, "0 <image> in the text but 1 images"),
    ],
)
def test_images_and_placeholders_are_counted_in_every_row(processor, texts, images, message):
    with pytest.raises(UserError, match=message):
        processor(text=texts, images=images)


def test_image_parts_accept_all_common_keys():
    encoded = base64.encodebytes(b"a picture").decode()
    parts = [
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": "c.png"},
        {"type": "image", "base64": encoded},
        {"type": "image"},
    ]
    messages, pictures = read_messages([user(*parts)])
    assert pictures == ["a.png", "b.png", "data:image/png;base64,AAAA", "c.png", b"a picture", None]
    assert messages[0].text == "\n".join([IMAGE_TOKEN] * 6) and len(messages[0].images) == 6


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (user({"type": "image", "url": "https://example.com/" + "x" * 500}), "URLs are not fetched"),
        (user({"type": "image_url", "image_url": {"url": "HTTP://example.com/a"}}), "URLs are not fetched"),
        (user({"type": "image", "base64": "no base64!" * 100}), "expected the base64 of an image under 'base64'"),
        (user({"type": "image", "image": RED, "path": "a.png"}), "one picture, got 'image' and 'path'"),
        (user({"type": "image"}), "1 <image> in the text but 0 images"),
        (user({"type": "video", "video": "a.mp4"}), "got type 'video'"),
        (user({"type": "text", "text": None}), "a string under 'text', got None"),
        (user("bare"), "got str"),
        ({"role": "user", "content": None}, r"message 0 \(user\): expected a string or a list of parts .* got None"),
        ({"role": "user", "content": 3}, "got int"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "'tool_calls' is not supported"),
        ({"content": "a"}, "expected {'role'"),
    ],
)
def test_malformed_messages_are_reported_in_one_short_line(processor, message, error):
    with pytest.raises(UserError, match=error) as caught:
        processor.apply_chat_template([message], tokenize=True)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_calls_reject_urls(processor):
    with pytest.raises(UserError, match="URLs are not fetched"):
        processor(text=QUESTION, images="https://example.com/a.png")


# Keywords -----------------------------------------------------------------------------------------------------


def test_continue_final_message_ends_with_the_message(processor):
    chat = [user(text("What shape?")), {"role": "assistant", "content": "The shape is a"}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("<|assistant|>The shape is a")
    ids = processor.apply_chat_template(chat, continue_final_message=True, tokenize=True)["input_ids"][0]
    assert processor.decode(ids).endswith("<|assistant|>The shape is a")


def test_padding_and_tensors(processor):
    texts = ["a b c d e f", "x"]
    left, right = processor(texts), processor(texts, padding_side="right")
    assert left["attention_mask"][1, 0] == 0 and left["attention_mask"][1, -1] == 1
    assert right["attention_mask"][1, 0] == 1 and right["attention_mask"][1, -1] == 0
    width = left["input_ids"].shape[1]
    assert processor(texts, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)
    assert processor(texts, pad_to_multiple_of=16)["input_ids"].shape[1] % 16 == 0
    assert isinstance(processor(texts, return_tensors="np")["input_ids"], np.ndarray)
    lists = processor(texts, padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in lists] == [width, len(processor("x")["input_ids"][0])]
    assert lists[1] == processor("x")["input_ids"][0].tolist()
    assert list(processor(texts, text_kwargs={"return_attention_mask": False})) == ["input_ids"]
    ids = processor.apply_chat_template([user(text("x"))], tokenize=True, return_dict=False)
    assert torch.equal(ids, processor.apply_chat_template([user(text("x"))], tokenize=True)["input_ids"])


def test_truncation_cuts_text_but_not_images(processor):
    short = processor("a " * 300, truncation=True, max_length=20)["input_ids"]
    assert short.shape == (1, 20) and torch.equal(short, processor("a " * 300)["input_ids"][:, :20])
    whole = processor(QUESTION, images=RED)["input_ids"]
    cut = processor(QUESTION, images=RED, truncation=True, max_length=whole.shape[1] - 1)["input_ids"]
    assert torch.equal(cut, whole[:, :-1])
    assert torch.equal(processor("a " * 300, max_length=20)["input_ids"], short)
    assert processor("a b c", truncation=True)["input_ids"].shape == processor("a b c")["input_ids"].shape
    assert processor("a " * 300, padding="max_length", max_length=20)["input_ids"].shape[1] > 20
    for length in (5, 2):
        with pytest.raises(UserError, match="would cut an image"):
            processor(QUESTION, images=RED, truncation=True, max_length=length)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"nonsense": 1}, "does not accept nonsense=1"),
        ({"images_kwargs": {"size": 96}}, "size=96 is not supported: the model reads images of 48 pixels"),
        ({"size": {"height": 96, "width": 96}}, "size={'height': 96, 'width': 96} is not supported"),
        ({"image_mean": [0, 0, 0]}, "does not support image_mean"),
        ({"max_length": 5, "truncation": False}, "max_length=5 has no effect with truncation=False"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": False, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 has no effect"),
        ({"return_offsets_mapping": True}, "does not accept return_offsets_mapping=True"),
        ({"text_pair": "a"}, "does not accept text_pair='a'"),
        ({"padding": "most"}, "padding: expected one of"),
        ({"padding_side": "top"}, "padding_side: expected one of 'left', 'right'"),
        ({"padding": False}, "pass padding=True"),
        ({"return_tensors": "tf"}, "return_tensors: expected one of"),
        ({"add_special_tokens": True}, "the chat template writes special tokens"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding is given twice"),
        ({"videos": ["a.mp4"]}, "does not accept videos="),
        ({"videos_kwargs": {"fps": 2}}, "does not accept fps=2"),
    ],
)
def test_unsupported_keywords_are_rejected_by_name(processor, keywords, message):
    with pytest.raises(ValueError, match=message):
        processor(["a b c", "d"], **keywords)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([[user(text("a b c"))], [user(text("d"))]], tokenize=True, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "give one of them"),
        ({"continue_final_message": "thoughts"}, "continue_final_message: expected"),
        ({"return_assistant_tokens_mask": True}, "needs tokenize=True"),
        ({"padding": True}, "padding have no effect without tokenize=True"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"tools": [{"type": "function"}]}, "does not use 'tools'"),
    ],
)
def test_conflicting_or_unused_template_keywords_are_rejected(processor, keywords, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([user(text("a"))], **keywords)


def test_another_template_and_its_variables_can_be_given(processor):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|user|>{{ mood }}"
        "{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = {"chat_template": template, "mood": "glad ", "tools": [{"name": "draw"}]}
    rendered = processor.apply_chat_template([user(text("a"))], **given)
    assert rendered == '[{"name": "draw"}]<|user|>glad a<|end|>'
    assert processor.decode(
        processor.apply_chat_template([user(text("a"))], tokenize=True, **given)["input_ids"][0]
    ) == str(rendered)
    given["bos_token"] = "<|end|>"
    template = "{{ bos_token }}" + template
    assert processor.apply_chat_template([user(text("a"))], **given | {"chat_template": template})[:7] == "<|end|>"
    with pytest.raises(UserError, match=r"'mood' contains the control token '<\|end\|>'"):
        processor.apply_chat_template([user(text("a"))], chat_template=template, mood="<|end|>")


def test_processor_and_tokenizer_share_the_chat_template(processor):
    other = copy.deepcopy(processor)
    other.chat_template = other.chat_template.replace("<|user|>", "<|user|>Q: ")
    assert other.tokenizer.chat_template == other.chat_template
    assert other.decode(other.user_turns("a")["input_ids"][0]) == "<|user|>Q: a<|assistant|>"
    assert processor.decode(processor.user_turns("a")["input_ids"][0]) == "<|user|>a<|assistant|>"


def test_the_assistant_mask_marks_the_learned_tokens(processor):
    chat = [user(text("a")), {"role": "assistant", "content": "red ring"}]
    batch = processor.apply_chat_template([chat, chat[:1]], tokenize=True, return_assistant_tokens_mask=True)
    ids, mask = batch["input_ids"], batch["assistant_masks"].bool()
    assert mask.shape == ids.shape and not mask[1].any()
    assert processor.decode(ids[0][mask[0]]) == "red ring<|end|>"


def test_none_is_an_empty_prompt_and_other_types_are_rejected(processor):
    empty = processor.drawing_prompts([""])
    same(processor.drawing_prompts([None]), empty)
    same(processor.drawing_prompts("a ring"), processor.drawing_prompts(["a ring"]))
    for wrong in (3, {"prompt": "a"}, ["a"]):
        with pytest.raises(UserError, match=f"a prompt as a string, got {type(wrong).__name__}"):
            processor.drawing_prompts([wrong])


def test_text_that_is_not_unicode_is_rejected(processor):
    for call, first in ((processor, 2), (processor.user_turns, 10), (processor.drawing_prompts, 10)):
        with pytest.raises(UserError, match=f"the text is not valid Unicode at character {first}"):
            call(["a \udc80 ring"])


def test_several_sequences_are_decoded_one_by_one(processor):
    ids = processor(["a ring", "a b"])["input_ids"]
    assert processor.decode(ids) == processor.batch_decode(ids) == [processor.decode(row) for row in ids]
    with pytest.raises(ValueError, match="does not accept nonsense"):
        processor.decode(ids[0], nonsense=1)


def test_transformers_pipeline_answers(tiny_mllm):
    model, processor = tiny_mllm
    assert isinstance(model, EvoTokLlavaForConditionalGeneration)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [user(image(RED), text("What is it?"))]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    (answer,) = ask(images=RED, text=rendered, max_new_tokens=3, return_full_text=False)
    (talked,) = ask(text=chat, max_new_tokens=3, return_full_text=False)
    inputs = processor.user_turns(QUESTION, images=RED)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert answer["generated_text"] == talked["generated_text"]
    assert answer["generated_text"] == processor.decode(ids[0, start:], skip_special_tokens=True)
