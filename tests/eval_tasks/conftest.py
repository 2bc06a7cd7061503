"""Fixtures: lmms-eval, imported once, and a model that answers with given functions instead of weights."""

import argparse

import judges
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature

from eval_tasks import registration
from llava_ext.generation import Finished, ImageDrawn


class FakeProcessor:
    """Encodes a conversation as a row number, and decodes generated character codes."""

    def __init__(self) -> None:
        self.rows = []
        self.batch_sizes = []

    def apply_chat_template(self, conversations, **kwargs) -> BatchFeature:
        assert kwargs == {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "left",
        }
        self.rows, first = [*self.rows, *conversations], len(self.rows)
        self.batch_sizes.append(len(conversations))
        ids = torch.arange(first, first + len(conversations))[:, None]
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, ids, skip_special_tokens) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(code) for code in row if code) for row in ids.tolist()]


class FakeModel(nn.Module):
    """Answers with `answer(text, images)` and draws with `drawer(prompt, seed)`."""

    dtype = torch.float32

    def __init__(self, processor, answer, drawer) -> None:
        super().__init__()
        self.processor, self.answer, self.drawer = processor, answer, drawer
        self.generate_kwargs, self.draw_kwargs = [], []

    def generate(self, input_ids, attention_mask, **kwargs):
        self.generate_kwargs.append(kwargs)
        texts = []
        for row in input_ids[:, -1].tolist():
            parts = [part for message in self.processor.rows[row] for part in message["content"]]
            text = "\n".join(part["text"] for part in parts if part["type"] == "text")
            texts.append(self.answer(text, [part["image"] for part in parts if part["type"] == "image"]))
        width = max(map(len, texts), default=0)
        codes = torch.tensor([[ord(c) for c in text] + [0] * (width - len(text)) for text in texts])
        return torch.cat([input_ids, codes.long()], dim=1)

    def answer_all(self, requests, processor, max_rows):
        assert processor is self.processor
        self.max_rows = max_rows
        for request in requests:
            ((message,), options) = request.conversation, request.options
            assert options.image_first and message["content"] == [{"type": "text", "text": request.prompt}]
            call = {"prompt": request.prompt, "seed": request.seed, "best_of": options.best_of}
            self.draw_kwargs.append({**call, **options.drawing.settings()})
            yield request, ImageDrawn(0, 0, self.drawer(request.prompt, request.seed), None)
            yield request, Finished(0, None)


def blank(prompt: str, seed: int) -> Image.Image:
    return Image.new("RGB", (48, 48), (150, 150, 150))


@pytest.fixture(scope="session")
def lmms_eval_tasks():
    """`lmms_eval.tasks`, imported after our entry point has run, as on the command line."""
    registration.register()
    import lmms_eval.evaluator  # noqa: F401  (13 s)
    import lmms_eval.tasks

    return lmms_eval.tasks


@pytest.fixture
def make_lm(tmp_path, lmms_eval_tasks):
    """Creates the adapter with a fake model."""
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    def make(answer=lambda text, images: "A", drawer=blank, fingerprint="fake", **kwargs) -> EvoTokLmms:
        processor = FakeProcessor()
        model = FakeModel(processor, answer, drawer)
        kwargs = {"device": "cpu", "images_dir": str(tmp_path / "images"), **kwargs}
        return EvoTokLmms("somewhere", load=lambda *_: OpenModel(model, processor, "fake", fingerprint), **kwargs)

    return make


@pytest.fixture
def instance(lmms_eval_tasks):
    """Creates requests of lmms-eval whose document is a text."""
    from lmms_eval.api.instance import Instance

    def make(lm, task, doc_id, text, gen_kwargs, media=()):
        def doc_to_messages(doc):
            content = [{"type": kind, "url": value} for kind, value in media]
            return [{"role": "user", "content": [*content, {"type": "text", "text": doc}]}]

        lm.task_dict.setdefault(task, {}).setdefault("test", {})[doc_id] = text
        return Instance(
            "generate_until",
            (text, doc_to_messages, gen_kwargs, doc_id, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": doc_id, "repeats": 1},
        )

    return make


@pytest.fixture
def evaluate(tmp_path, lmms_eval_tasks):
    """Evaluates an adapter on tasks with lmms-eval and an output folder; returns lmms-eval's results."""

    def run(lm, tasks, limit=None, include_path=None, output_path=tmp_path / "results", **options) -> dict:
        from lmms_eval.evaluator import simple_evaluate

        manager = lmms_eval_tasks.TaskManager(include_path=include_path, include_defaults=False, model_name="evotok")
        cli_args = argparse.Namespace(output_path=str(output_path), process_with_media=False, reasoning_tags=None)
        return simple_evaluate(
            model=lm, tasks=tasks, limit=limit, task_manager=manager, cli_args=cli_args, bootstrap_iters=0, **options
        )

    return run


@pytest.fixture(scope="session")
def judge_folders(tmp_path_factory) -> dict:
    """Folders of small random judges: detector, clip, vqa."""
    folder = tmp_path_factory.mktemp("judges")
    return {
        "detector": judges.write_detector(folder / "detector"),
        "clip": judges.write_clip(folder / "clip"),
        "vqa": judges.write_vqa(folder / "vqa"),
    }
