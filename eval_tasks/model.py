"""The model in lmms-eval: one object that reads and draws, for all tasks of a run mixed in one list of requests."""

import difflib
import hashlib
import json
import logging
import re
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

from eval_tasks.arguments import check_given, check_values, parse_batch_size, parse_model_args
from eval_tasks.loading import LoadedModel, load_checkpoint, parse_device, parse_dtype
from eval_tasks.registration import GIVEN
from eval_tasks.requests import (
    OPTIONS_BY_MODALITY,
    ImageOptions,
    PlannedImage,
    ReconstructionOptions,
    Request,
    TextOptions,
    image_seed,
    known_options,
    sample_numbers,
    to_conversation,
    to_prompt,
)
from eval_tasks.response_cache import key_by_weights
from eval_tasks.tasks.evotok_reconstruction.task import measure
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from llava_ext.generation import DrawingOptions
from llava_ext.generation.options import model_settings
from llava_ext.model_folder import default_model_folder
from llava_ext.serving.image_files import chunks_of, write_png

logger = logging.getLogger(__name__)
_AUTO_BATCH_SIZE = 16
# A model that has learned little says such characters; upstream's XLSX writers abort the whole run on one.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


# What a request asks for ---------------------------------------------------------------------------------------


class EvoTokLmms(lmms):
    """`lmms-eval --model evotok --model_args pretrained=DIR,guidance_scale=3,dtype=float32,...`

    A request whose `generation_kwargs` say `modality: image` is drawn, its answer is the JSON
    `{"text": "", "images": [absolute paths]}`; one with `modality: reconstruction` measures the tokenizer; any other is
    read and answered with text.

    `--gen_kwargs` reaches every task of a run: its temperature, top_k and top_p are those of the answers in a task that
    reads and those of the images in one that draws. For images alone, put them into `--model_args`. A key that takes
    effect on none of the tasks is an error; a task's own keys that this model has no use for are logged.

    With `--use_cache`, answers are reused only from the same content of the model folder; images never come from that
    cache, since they are reused from `images_dir` by prompt, seed, settings and fingerprint.

    Args:
        pretrained: output folder of `scripts/finetune.sh`; by default the newest of this working folder, else the model
            that comes with the package. Which it is, is said.
        device: "cpu", "cuda:0", ...; by default what Accelerate picks, and always that with several processes.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU, the checkpoint's on a GPU.
        batch_size: questions answered, and images drawn, together; "auto" and "auto:N" are `max_batch_size` (16 unless
            given).
        images_dir: where drawn images go, as `<task>/<document>_<sample>.png`; by default a folder of
            `./outputs/lmms_eval_images` for this model and these settings.
        guidance_scale, guidance_schedule, negative_prompt: of drawing, unless a task or `--gen_kwargs` sets them; by
            default the model's own (`image_generation` in its generation_config.json).
        temperature, top_k, top_p, min_p: likewise.
        seed: of drawing; an image depends on it, on its task, document and sample number, and on nothing else.
        load: `load_checkpoint`, or a stand-in for it.

    Raises:
        UserError: `pretrained` is no such folder, or an unknown or impossible argument.
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
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        negative_prompt: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        load: Callable[[str, torch.dtype | str, torch.device], LoadedModel] = load_checkpoint,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = [key for key in EvoTokLmms.__init__.__annotations__ if key not in ("load", "unknown", "return")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"--model_args: unknown argument {name!r}; {hint}")
        drawing = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_values({**drawing, "min_p": min_p, "seed": seed}, "--model_args")
        self._batch_size = parse_batch_size(batch_size, max_batch_size, _AUTO_BATCH_SIZE)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = parse_device(device, self.accelerator)
        self.seed = int(seed)
        asked = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "negative_prompt": negative_prompt,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        asked = DrawingOptions(**asked)
        pretrained = str(pretrained)
        if not pretrained:
            pretrained = str(default_model_folder())
            logger.warning("no pretrained= in --model_args: the model is %s", pretrained)
        # Modules stand directly on this object: lmms-eval frees such attributes before it scores.
        loaded = load(pretrained, parse_dtype(dtype, self._device), self._device)
        self._model, self._processor, self._fingerprint = loaded.model, loaded.processor, loaded.fingerprint
        own = model_settings(getattr(self._model, "generation_config", None))
        self.drawing = asked.completed(own).settings()
        self.images_dir = Path(str(images_dir or "") or self._default_images_dir(pretrained)).expanduser().resolve()
        self._named_tasks: set[str] = set()
        key_by_weights()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "EvoTokLmms":
        """The model of `--model_args` and of lmms-eval's own flags.

        Raises:
            UserError: an argument without a value, unknown, impossible or given twice.
        """
        return cls(**parse_model_args(arg_string, additional_config or {}))

    def _default_images_dir(self, pretrained: str) -> Path:
        """One folder a model and setting, so that runs with other settings do not overwrite each other's images."""
        folder = Path(pretrained).expanduser().resolve()
        settings = json.dumps([str(folder), self.seed, self.drawing], sort_keys=True)
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
        """Identity of the answers beyond the model arguments, which are all that lmms-eval's response cache keys by."""
        return f"{self._fingerprint}|{self._model.dtype}"

    def may_be_cached(self, request: Instance) -> bool:
        """Whether an answer stays right whatever happens to files: images and measured folders may change."""
        return (request.args[2].get("modality") or "text") == "text"

    # lmms-eval's interface -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer all requests of a run, in their order; padding clones get an empty answer and leave no file."""
        given = {task: GIVEN[task] for task in self.task_dict if task in GIVEN}
        check_given(given, {modality: kind.__dataclass_fields__ for modality, kind in OPTIONS_BY_MODALITY.items()})
        wanted = list(self._parse(requests))
        answers = [""] * len(requests)
        with tqdm(total=len(wanted), desc="EvoTok answers", disable=self.rank != 0) as progress:
            for batch in self._batches(wanted):
                give = self._answerers[type(batch[0].options)]
                for request, answer in zip(batch, give(batch), strict=True):
                    answers[request.place] = answer
                progress.update(len(batch))
        return answers

    @property
    def _answerers(self) -> dict[type, Callable[[Sequence[Request]], list[str]]]:
        return {TextOptions: self._read, ImageOptions: self._draw, ReconstructionOptions: self._rebuild}

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("evotok answers by generating; tasks that score given answers are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("evotok does not support multi-round tasks")

    # Requests ------------------------------------------------------------------------------------------------

    def _parse(self, requests: Sequence[Instance]) -> Iterator[Request]:
        seen: Counter = Counter()
        for place, request in enumerate(requests):
            if request.metadata.get("__padding_only__"):
                continue
            context, doc_to_messages, gen_kwargs, doc_id, task, split = request.args

            def messages(doc_to_messages=doc_to_messages, task=task, split=split, doc_id=doc_id) -> ChatMessages:
                return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))

            options = self._options(gen_kwargs, task)
            yield Request(place, task, doc_id, seen[task, doc_id], context, messages, options)
            seen[task, doc_id] += 1

    def _options(self, gen_kwargs: dict[str, Any], task: str) -> TextOptions | ImageOptions | ReconstructionOptions:
        check_values(gen_kwargs, f"{task}: generation_kwargs")
        kind = OPTIONS_BY_MODALITY[gen_kwargs.get("modality") or "text"]
        self._name_unused(kind, gen_kwargs, task)
        if kind is ReconstructionOptions:
            return ReconstructionOptions()
        if kind is ImageOptions:
            known = known_options(ImageOptions, gen_kwargs)
            num_images = known.pop("num_images", ImageOptions.num_images)
            settings = DrawingOptions(**{**self.drawing, **known}).completed().settings()
            return ImageOptions(num_images=num_images, **settings)
        known = known_options(TextOptions, gen_kwargs)
        if known.get("do_sample") and known.get("temperature") == 0:
            raise UserError(f"{task}: generation_kwargs: do_sample=true needs a temperature above 0, got 0")
        until = known.get("until", ())
        return TextOptions(**{**known, "until": (until,) if isinstance(until, str) else tuple(until)})

    def _name_unused(self, kind: type, gen_kwargs: dict[str, Any], task: str) -> None:
        """Log, once a task, the keys of its own that have no effect here; tasks bring them for other models."""
        ignored = set(gen_kwargs) - set(kind.__dataclass_fields__) - {"modality", "until"}
        if ignored and task not in self._named_tasks:
            self._named_tasks.add(task)
            logger.warning("%s: generation_kwargs without effect on evotok: %s", task, ", ".join(sorted(ignored)))

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Requests with equal options, the longest texts first: little padding, and too large a batch fails soon."""
        for options in dict.fromkeys(request.options for request in requests):
            group = [request for request in requests if request.options == options]
            group.sort(key=lambda request: -len(request.context))
            num_images = options.num_images if isinstance(options, ImageOptions) else 1
            size = max(1, self.batch_size // num_images)
            for start in range(0, len(group), size):
                yield group[start : start + size]

    # Reading -------------------------------------------------------------------------------------------------

    def _read(self, batch: Sequence[Request]) -> list[str]:
        options = batch[0].options
        conversations = [to_conversation(request) for request in batch]
        inputs = self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(device=self.device, dtype=self._model.dtype)
        ids = self._model.generate(**inputs, **options.generate_kwargs())
        texts = self._processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_CONTROL_CHARACTERS.sub("", options.cut(text)).strip() for text in texts]

    # Rebuilding ----------------------------------------------------------------------------------------------

    def _rebuild(self, batch: Sequence[Request]) -> list[str]:
        tower, processor = self._model.vision_tower, self._processor.image_processor
        processes = Processes(self.rank, self.world_size, self.device)
        return [measure(tower, processor, self.images_dir / request.task, processes) for request in batch]

    # Drawing -------------------------------------------------------------------------------------------------

    def _draw(self, batch: Sequence[Request]) -> list[str]:
        """Draw what is not there yet: an interrupted run's images are taken as they are."""
        wanted = [[self._wanted(request, sample) for sample in sample_numbers(request)] for request in batch]
        missing = [image for images in wanted for image in images if chunks_of(image.path) != image.chunks]
        if missing:
            settings = batch[0].options.generate_kwargs() | {"num_images": 1}
            drawn = self._model.generate_images(
                [image.prompt for image in missing],
                processor=self._processor,
                seed=[image.seed for image in missing],
                batch_size=self.batch_size,
                **settings,
            )
            for image, picture in zip(missing, drawn, strict=True):
                write_png(picture, image.path, image.chunks)
        return [json.dumps({"text": "", "images": [str(image.path) for image in images]}) for images in wanted]

    def _wanted(self, request: Request, sample: int) -> PlannedImage:
        seed = image_seed(self.seed, request.task, request.doc_id, sample)
        settings = request.options.generate_kwargs()
        del settings["num_images"]  # an image does not depend on how many are drawn beside it
        chunks = {
            "prompt": (prompt := to_prompt(request)),
            "seed": str(seed),
            "model": self._fingerprint,
            "settings": json.dumps(settings, sort_keys=True),
        }
        return PlannedImage(self.images_dir / request.task / f"{request.doc_id:05d}_{sample}.png", prompt, seed, chunks)
