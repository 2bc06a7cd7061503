"""Many requests in one running batch, compared with each request alone."""

import pytest
import torch

from evotok_plugin.errors import UserError
from llava_ext.generation import (
    AnswerOptions,
    AnswerRequest,
    DrawingOptions,
    Finished,
    ImageDrawn,
    PromptReader,
    TextDelta,
)
from llava_ext.generation.answers import Answers

DRAWINGS = [  # prompt, seed, drawing, best_of
    ("a ring", 1, DrawingOptions(), 1),
    ("a <image> of two rings", 2, DrawingOptions(2.0, negative_prompt="a square"), 1),
    ("a cross", 3, DrawingOptions(3.0, guidance_interval=(0.4, 0.8)), 3),
    ("a red circle above a blue square", 4, DrawingOptions(1.0, temperature=0.5), 1),
    ("a ring", 5, DrawingOptions(3.0, guidance_interval=(0.4, 0.8)), 3),
]


def conversation(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def drawing_requests():
    return [
        AnswerRequest(conversation(text), text, AnswerOptions(image_first=True, drawing=drawing, best_of=best), seed)
        for text, seed, drawing, best in DRAWINGS
    ]


@pytest.mark.parametrize("max_rows", [1, 4, 16])
def test_images_are_those_of_generate_images(any_mllm, monkeypatch, max_rows):
    model, processor = any_mllm
    sizes, step = [], Answers.step
    monkeypatch.setattr(Answers, "step", lambda self: sizes.append(self.num_active) or step(self))
    requests = drawing_requests()
    drawn = {
        one: event
        for one, event in model.answer_all(iter(requests), processor, max_rows)
        if isinstance(event, ImageDrawn)
    }
    assert sizes[0] == max(sizes) == min(max_rows, sum(best_of for *_, best_of in DRAWINGS))
    for request, (text, seed, drawing, best_of) in zip(requests, DRAWINGS, strict=True):
        choices = []
        settings = {name: value for name, value in vars(drawing).items() if name != "sampling"}
        model.generate_images(text, processor, seed=[seed], best_of=best_of, on_choice=choices.extend, **settings)
        assert torch.equal(drawn[request].codes, choices[0].codes)
        if best_of > 1:
            assert drawn[request].choice.candidate.number == choices[0].candidate.number


def test_texts_join_drawings_and_every_answer_ends_once(tiny_mllm):
    model, processor = tiny_mllm
    texts = [AnswerRequest(conversation(f"What is a circle? {n}"), "", AnswerOptions(3 + n, 0), n) for n in range(3)]
    requests = [texts[0], *drawing_requests(), *texts[1:]]
    events = list(model.answer_all(requests, processor, 4))
    ended = [one for one, event in events if isinstance(event, Finished)]
    assert len(ended) == len(requests) and set(ended) == set(requests)
    for request in texts:
        inputs = processor.apply_chat_template(request.conversation, add_generation_prompt=True, tokenize=True)
        alone = model.stream(dict(inputs), processor, request.options, seed=[request.seed])
        expected = "".join(event.text for event in alone if isinstance(event, TextDelta))
        assert expected == "".join(e.text for one, e in events if one is request and isinstance(e, TextDelta))


def test_candidates_of_one_step_are_scored_and_decoded_together(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    scored, decoded = [], []
    scores, decode = PromptReader.scores, type(model.vision_tower).decode_pixels
    monkeypatch.setattr(PromptReader, "scores", lambda self, p, c: scored.append(len(p)) or scores(self, p, c))
    monkeypatch.setattr(
        type(model.vision_tower), "decode_pixels", lambda self, codes: decoded.append(len(codes)) or decode(self, codes)
    )
    options = AnswerOptions(image_first=True, best_of=3)
    requests = [
        AnswerRequest(conversation(text), text, options, seed) for seed, text in enumerate(("a ring", "a cross"))
    ]
    list(model.answer_all(requests, processor, 6))
    assert scored == [6] and decoded == [2]


def test_settings_of_text_that_are_not_supported_matter_only_for_text(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    drawn = list(model.answer_all(drawing_requests()[:1], processor, 2))
    assert any(isinstance(event, ImageDrawn) for _, event in drawn)
    writes = AnswerRequest(conversation("What is a circle?"), "", AnswerOptions(3), 0)
    with pytest.raises(UserError, match="num_beams"):
        list(model.answer_all([*drawing_requests()[:1], writes], processor, 1))


def test_candidates_need_a_prompt(tiny_mllm):
    model, processor = tiny_mllm
    request = AnswerRequest(conversation("a ring"), " ", AnswerOptions(image_first=True, best_of=2), 0)
    with pytest.raises(UserError, match="best_of=2 scores images for a prompt, which is empty"):
        list(model.answer_all([request], processor, 2))
