"""VQAScore (arXiv 2404.01291): the probability that a visual question answering model answers yes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL.Image import Image

from eval_tasks.judging.options import JudgeOptions, variable
from eval_tasks.judging.weights import fetch, require_weights
from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, open_config, open_processor

VQA_SCORE_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
_WHAT = "the VQA judge's weights"


@dataclass(frozen=True)
class Answer:
    """The probabilities that the model's answer starts with Yes and with No."""

    yes: float
    no: float


class YesNoJudge:
    """Asks yes-or-no questions in batches; the answers do not depend on the batch.

    A model with a chat template is asked through it, any other model gets the bare question.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device | str = "cpu") -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, torch.device(device)
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._chat = getattr(processor, "chat_template", None) is not None
        if self._chat:
            self._tokenizer.padding_side = "left"  # the answer starts right after the prompt in every row
        self._yes, self._no = self._first_tokens("Yes"), self._first_tokens("No")

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "YesNoJudge":
        """Load a model folder of transformers that answers questions about images.

        Raises:
            UserError: a missing folder, another kind of model, damaged files, or missing or mismatched weights.
        """
        require_weights(folder, _WHAT)
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering
        from transformers import AutoProcessor as Processor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as GENERATIVE

        config = open_config(AutoConfig, folder)
        architecture = (config.architectures or [""])[0]
        answering = architecture.endswith("ForQuestionAnswering")
        if not answering and config.model_type not in GENERATIVE:
            raise UserError(
                f"{_WHAT}: {folder} holds a {config.model_type!r}, which does not answer questions on images"
            )
        kind = AutoModelForVisualQuestionAnswering if answering else AutoModelForImageTextToText
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        model = load_whole(kind, folder, use_safetensors=True, dtype=dtype, local_files_only=True)
        if not hasattr(model, "generate"):
            raise UserError(
                f"{_WHAT}: {folder} holds a {architecture or config.model_type}, which does not generate text"
            )
        processor = open_processor(
            Processor,
            folder,
            "the VQA judge's processor",
            [("preprocessor_config.json", "processor_config.json"), ("tokenizer_config.json",)],
            "download the folder again",
            local_files_only=True,
        )
        return cls(model, processor, device)

    def _first_tokens(self, answer: str) -> list[int]:
        """The ids of an answer that is a single token, at the start of a text or after a space."""
        spelled = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, f" {answer}")]
        # An unknown word is a single token, too.
        unknown = self._tokenizer.unk_token_id
        single = sorted({ids[0] for ids in spelled if len(ids) == 1 and ids[0] != unknown})
        if not single:
            raise UserError(
                f"{_WHAT}: its tokenizer has no single token for {answer!r}, so the answer has no probability"
            )
        return single

    @torch.inference_mode()
    def ask(self, images: Sequence[Image], questions: Sequence[str]) -> list[Answer]:
        """Ask one question per image, all in one batch.

        Raises:
            UserError: the processor or its chat template does not accept an image with a question.
        """
        try:
            inputs = self._inputs(images, questions)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise UserError(
                f"the VQA judge does not accept an image with a question: {describe_error(error)}; choose another model"
            ) from error
        inputs = inputs.to(device=self.device, dtype=self.model.dtype)
        outputs = self.model.generate(
            **inputs,
            max_new_tokens=1,
            num_beams=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        probabilities = outputs.logits[0].float().softmax(dim=-1)  # (B, vocabulary)
        yes, no = (probabilities[:, ids].sum(dim=-1).tolist() for ids in (self._yes, self._no))
        return [Answer(*pair) for pair in zip(yes, no, strict=True)]

    def _inputs(self, images: Sequence[Image], questions: Sequence[str]) -> Any:
        if not self._chat:
            return self.processor(images=list(images), text=list(questions), padding=True, return_tensors="pt")
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        bos = self._tokenizer.bos_token  # if the template writes it, the tokenizer must not add it again
        return self.processor(
            images=[[image] for image in images],
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )


def find_judges(options: JudgeOptions) -> dict[str, str]:
    """Locate the judge, downloading it if necessary; returns its name.

    Raises:
        UserError: the judge is missing; the message says where to get it.
    """
    _folder(options)
    return {"vqa": options.vqa}


def open_vqa(options: JudgeOptions) -> YesNoJudge:
    """Load the VQA model on the device of the options."""
    return YesNoJudge.open(_folder(options), options.torch_device)


def _folder(options: JudgeOptions) -> Path:
    return require_weights(fetch(options.vqa, _WHAT, variable("vqa")), _WHAT)
