"""The model adapter for lmms-eval, which answers, draws and reconstructs for all tasks of a run."""

import difflib
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import BatchFeature

from eval_tasks.arguments import check_given, check_values, parse_batch_size, parse_model_args, split_lists
from eval_tasks.drawing import Drawing, without_control_characters
from eval_tasks.loading import choose_device, choose_dtype, load_checkpoint
from eval_tasks.registration import GIVEN
from eval_tasks.requests import (
    OPTION_NAMES,
    DocumentOptions,
    ImageOptions,
    Options,
    ReconstructionOptions,
    Request,
    TextOptions,
    drawn_with,
    to_conversation,
)
from eval_tasks.response_cache import key_by_weights
from eval_tasks.tasks.evotok_reconstruction.task import measure
from eval_tasks.upstream_drawing import modality_of, options_of
from evotok_plugin.common.files import user_path
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.errors import UserError
from llava_ext.generation import DrawingOptions, SelectionOptions
from llava_ext.generation.options import model_settings
from llava_ext.model_folder import OpenModel, default_model_folder

logger = logging.getLogger(__name__)
_AUTO_BATCH_SIZE = 16


class EvoTokLmms(lmms):
    """`lmms-eval --model evotok --model_args pretrained=DIR,guidance_scale=3,dtype=float32,...`

    The `modality` in a task's `generation_kwargs` selects the answer: `image` draws images and answers with the JSON
    `{"text": "", "images": [absolute paths]}`, `edit` draws one image from images and an instruction, and `document`
    answers with text and images, both as the same JSON; `reconstruction` measures the tokenizer, `text` (the default)
    answers with text. The modalities of upstream's own tasks are in `upstream_drawing.UPSTREAM`.

    `--gen_kwargs` reaches every task of a run: its temperature, top_k and top_p apply to the text of an understanding
    task and to the images of a drawing task. Put options for images only into `--model_args`. A key without effect on
    any task is an error; unused keys in a task's own `generation_kwargs` are logged.

    With `--use_cache`, text answers are reused as long as the content of the model folder is the same. Images are never
    taken from that cache: they are reused from `images_dir` by prompt, seed, settings and fingerprint.

    Args:
        pretrained: output folder of `scripts/finetune.sh`; by default the newest in the working folder, else the model
            included in the package. The choice is logged.
        device: "cpu", "cuda:0", ...; by default the device that Accelerate selects, as always with several processes.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU, and the checkpoint's dtype on a GPU.
        batch_size: number of questions per batch, and of images, candidates or documents that are generated together;
            "auto" and "auto:N" mean `max_batch_size` (default 16).
        images_dir: folder for drawn images, `<task>/<document>_<sample>.png`; by default a folder in
            `./outputs/lmms_eval_images` for this model and these settings.
        guidance_scale, guidance_schedule, guidance_interval, guidance_rescale, negative_prompt, temperature, top_k,
            top_p, min_p: defaults for drawing, overridden by a task's `generation_kwargs` and `--gen_kwargs`; without
            them the model's own settings apply (`image_generation` in its generation_config.json). Several numbers are
            separated by colons: guidance_interval=0:0.5.
        best_of: candidates per image, of which the model keeps the one whose prompt it reads best in it; overridden and
            defaulted in the same way (`image_selection`).
        seed: for drawing; an image depends only on the seed, its task, its document and its sample number.
        load: replaces `load_checkpoint` in tests.

    Raises:
        UserError: an unknown or invalid argument, or `pretrained` is not a complete model folder.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        images_dir: str | None = None,
        guidance_scale: float | str | None = None,
        guidance_schedule: str | None = None,
        guidance_interval: str | Sequence[float] | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | None = None,
        temperature: float | str | None = None,
        top_k: int | str | None = None,
        top_p: float | str | None = None,
        min_p: float | str | None = None,
        best_of: int | None = None,
        seed: int = 0,
        load: Callable[[str, torch.dtype | str, torch.device], OpenModel] = load_checkpoint,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = [key for key in EvoTokLmms.__init__.__annotations__ if key not in ("load", "unknown", "return")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"--model_args: unknown argument {name!r}; {hint}")
        numbers = split_lists(
            {
                "guidance_scale": guidance_scale,
                "guidance_interval": guidance_interval,
                "guidance_rescale": guidance_rescale,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
            }
        )
        check_values({**numbers, "best_of": best_of, "seed": seed}, "--model_args")
        self._batch_size = parse_batch_size(batch_size, max_batch_size, _AUTO_BATCH_SIZE)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = choose_device(device, self.accelerator)
        self.seed = int(seed)
        drawing = DrawingOptions(guidance_schedule=guidance_schedule, negative_prompt=negative_prompt, **numbers)
        pretrained = str(pretrained)
        if not pretrained:
            pretrained = str(default_model_folder())
            logger.warning("no pretrained= in --model_args: the model is %s", pretrained)
        # The model must be an attribute of this object: lmms-eval frees such attributes before scoring.
        loaded = load(pretrained, choose_dtype(dtype, self._device), self._device)
        self._model, self._processor, self._fingerprint = loaded.model, loaded.processor, loaded.fingerprint
        own = model_settings(getattr(self._model, "generation_config", None))
        self.drawing = drawing.completed(own).settings()
        self.best_of = SelectionOptions(None if best_of is None else int(best_of)).for_model(self._model).best_of
        self.images_dir = user_path(str(images_dir or "") or self._default_images_dir(pretrained)).resolve()
        self._warned_tasks: set[str] = set()
        key_by_weights()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "EvoTokLmms":
        """Create the model from `--model_args` and lmms-eval's own flags.

        Raises:
            UserError: an argument that is unknown, invalid, without a value, or given twice.
        """
        return cls(**parse_model_args(arg_string, additional_config or {}))

    def _default_images_dir(self, pretrained: str) -> Path:
        """A folder for this model and these settings, so that runs with other settings keep their images."""
        folder = user_path(pretrained).resolve()
        settings = json.dumps([str(folder), self.seed, drawn_with(self.drawing, self.best_of)], sort_keys=True)
        name = "__".join(folder.parts[-2:]).replace("/", "")
        return Path("outputs/lmms_eval_images") / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def response_identity(self) -> str:
        """The content of the model folder and the dtype; lmms-eval's own cache key has only the model arguments."""
        return f"{self._fingerprint}|{self._model.dtype}"

    def may_be_cached(self, request: Instance) -> bool:
        """Whether an answer is text; images and measured folders are files, which may change."""
        return modality_of(request.args[4], request.args[2]) == "text"

    # lmms-eval's interface -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer all requests of a run in order; padding clones get an empty answer and write no files."""
        check_given({task: GIVEN[task] for task in self.task_dict if task in GIVEN}, OPTION_NAMES)
        wanted = list(self._parse(requests))
        answers = [""] * len(requests)
        bar: tqdm[Request] = progress_bar(total=len(wanted), desc="EvoTok answers", disable=self.rank != 0)
        with bar:
            for request, answer in self._answers(wanted):
                answers[request.place] = answer
                bar.update()
        return answers

    def _answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """Yield each request with its answer: those that draw share one running batch, the others come in batches."""
        drawn = [request for request in requests if isinstance(request.options, ImageOptions | DocumentOptions)]
        others = [request for request in requests if isinstance(request.options, TextOptions | ReconstructionOptions)]
        for batch in self._batches(others):
            options = batch[0].options
            texts = self._read(batch, options) if isinstance(options, TextOptions) else self._reconstruct(batch)
            yield from zip(batch, texts, strict=True)
        if drawn:
            drawing = Drawing(
                self._model, self._processor, self._fingerprint, self.images_dir, self.seed, self.batch_size
            )
            yield from drawing.answers(drawn)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("evotok only generates answers; tasks that score given answers are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("evotok does not support multi-round tasks")

    # Requests ------------------------------------------------------------------------------------------------

    def _parse(self, requests: Sequence[Instance]) -> Iterator[Request]:
        seen: Counter = Counter()
        known: dict[tuple[str, str], Options] = {}  # most requests of a task have equal options
        for place, request in enumerate(requests):
            if request.metadata.get("__padding_only__"):
                continue
            context, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
            messages = functools.partial(self._messages, doc_to_messages, task, split, doc_id)
            key = (task, repr(gen_kwargs))
            if key not in known:
                known[key] = self._options(gen_kwargs, task)
            yield Request(place, task, doc_id, seen[task, doc_id], context, messages, known[key])
            seen[task, doc_id] += 1

    def _messages(self, doc_to_messages: Callable[[Any], Any], task: str, split: str, doc_id: int) -> ChatMessages:
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))

    def _options(self, gen_kwargs: dict[str, Any], task: str) -> Options:
        given = GIVEN[task].given if task in GIVEN else {}
        where, gen_kwargs = f"{task}: generation_kwargs", split_lists(options_of(task, gen_kwargs, given))
        check_values(gen_kwargs, where)
        modality = gen_kwargs["modality"]
        self._warn_of_unused(set(gen_kwargs) - OPTION_NAMES[modality] - {"modality", "until"}, task)
        try:
            if modality == "text":
                return TextOptions.from_gen_kwargs(gen_kwargs)
            if modality == "image":
                return ImageOptions.from_gen_kwargs(gen_kwargs, {**self.drawing, "best_of": self.best_of})
            if modality in ("edit", "document"):
                defaults = {**self.drawing, "best_of": self.best_of}
                return DocumentOptions.from_gen_kwargs(gen_kwargs, defaults, image_first=modality == "edit")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return ReconstructionOptions()

    def _warn_of_unused(self, keys: set[str], task: str) -> None:
        """Log, once per task, the keys without effect here; tasks set them for other models."""
        if keys and task not in self._warned_tasks:
            self._warned_tasks.add(task)
            logger.warning("%s: generation_kwargs without effect on evotok: %s", task, ", ".join(sorted(keys)))

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Batches of requests with equal options, longest first for little padding and early out-of-memory errors."""
        for options in dict.fromkeys(request.options for request in requests):
            group = [request for request in requests if request.options == options]
            group.sort(key=lambda request: -len(request.context))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    # Text ----------------------------------------------------------------------------------------------------

    def _read(self, batch: Sequence[Request], options: TextOptions) -> list[str]:
        inputs = self._inputs([to_conversation(request) for request in batch])
        ids = self._model.generate(**inputs, **options.generate_kwargs())
        texts = self._processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [without_control_characters(options.cut(text)) for text in texts]

    def _inputs(self, conversations: list[list[dict]]) -> BatchFeature:
        return self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(device=self.device, dtype=self._model.dtype)

    # Reconstruction ------------------------------------------------------------------------------------------

    def _reconstruct(self, batch: Sequence[Request]) -> list[str]:
        tower, processor = self._model.vision_tower, self._processor.image_processor
        processes = Processes(self.rank, self.world_size, self.device)
        return [measure(tower, processor, self.images_dir / request.task, processes) for request in batch]
