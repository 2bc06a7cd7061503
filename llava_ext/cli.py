"""`evotok-llava chat | draw | merge | export | estimate | convert`: use a trained model, ready one for others, see what
a training run will need."""

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from evotok_plugin.data.images import open_picture
from evotok_plugin.pictures import image_grid
from evotok_plugin.progress import progress_interval
from evotok_plugin.recipes import add_arguments, load_recipe
from llava_ext.checkpointing import default_model_folder, export_model, load_model
from llava_ext.conversion import HeadOptions, convert_adapters


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _open_model(arguments: argparse.Namespace):
    folder = arguments.model or default_model_folder()
    print(f"model: {folder}", file=sys.stderr)
    model, processor = load_model(folder)
    return model.to(_pick_device(arguments.device)).eval(), processor


def draw(arguments: argparse.Namespace) -> None:
    """Draw images for a prompt and write them, one by one and as a grid."""
    model, processor = _open_model(arguments)
    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or tqdm(
            total=total, desc="drawing", unit="position", file=sys.stderr, mininterval=progress_interval()
        )
        bar.update(done - bar.n)

    images = model.generate_images(
        arguments.prompt,
        processor=processor,
        num_images=arguments.num_images,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        on_progress=show,
    )
    if bar is not None:
        bar.close()
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", arguments.prompt.lower()).strip("_")[:60]
    for index, image in enumerate(images):
        path = out / f"{slug}_seed{arguments.seed + index}.png"
        image.save(path)
        print(path)
    if len(images) > 1:
        path = out / f"{slug}_grid.png"
        image_grid(images, columns=min(4, len(images)), scale=max(1, 256 // images[0].width)).save(path)
        print(path)


def chat(arguments: argparse.Namespace) -> None:
    """Answer one question, or, without one, a conversation line by line."""
    images = [open_picture(path) for path in arguments.image]
    model, processor = _open_model(arguments)
    history: list[dict] = []
    pending = images
    interactive = arguments.question is None
    while True:
        question = arguments.question
        if interactive:
            try:
                question = input("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not question:
                continue
        content = [{"type": "image", "image": image} for image in pending]
        history.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        pending = []
        inputs = processor.apply_chat_template(history, add_generation_prompt=True, tokenize=True)
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        history.append({"role": "assistant", "content": answer})
        print(answer)
        if not interactive:
            return


def convert(arguments: argparse.Namespace) -> None:
    """Put a model together from a causal LM, a converted tokenizer and research adapters."""
    given = {k: v for k, v in vars(arguments).items() if k.startswith("head_")}
    converted = convert_adapters(
        arguments.file,
        arguments.language_model,
        arguments.vision_tower,
        arguments.output,
        load_recipe(None, HeadOptions, given),
        dtype=getattr(torch, arguments.dtype),
    )
    for part, file in converted.parts.items():
        print(f"{part}: {file}")
    for part in converted.random:
        print(f"{part}: no file was given, it starts at random")
    for reason, count in converted.bookkeeping.items():
        print(f"left out: {count} keys, {reason}")
    print(arguments.output)


def merge_adapter(arguments: argparse.Namespace) -> None:
    """Fold a LoRA or QLoRA adapter into the model that it was trained on."""
    from llava_ext.training.adapters import merge  # peft comes with the training libraries

    merge(arguments.base, arguments.adapter, arguments.output, arguments.vision_tower)
    print(arguments.output)


def export(arguments: argparse.Namespace) -> None:
    """Write a model folder that can be given away."""
    export_model(arguments.folder, arguments.output, arguments.dtype)
    print(arguments.output)


def estimate(arguments: argparse.Namespace) -> None:
    """Say what a training run will need."""
    from llava_ext.training.config import StageConfig  # seconds of imports that no other command needs
    from llava_ext.training.estimate import estimate_run

    stage = argparse.ArgumentParser(prog="evotok-llava estimate", allow_abbrev=False)
    add_arguments(stage, StageConfig)
    print(estimate_run(arguments.recipe, vars(stage.parse_args(arguments.rest)), arguments.gpus))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok-llava", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="model folder (default: the newest of this working folder's outputs)")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

    asking = commands.add_parser("chat", parents=[common], help="ask about images")
    asking.add_argument("question", nargs="?", help="without it, a conversation is read from the terminal")
    asking.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    asking.add_argument("--max_new_tokens", type=int, default=64)
    asking.set_defaults(run=chat)

    drawing = commands.add_parser("draw", parents=[common], help="draw images for a prompt")
    drawing.add_argument("prompt")
    drawing.add_argument("-n", "--num_images", type=int, default=1)
    drawing.add_argument("-o", "--output", default="out", help="folder for the images")
    drawing.add_argument("--guidance_scale", type=float, default=3.0)
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--temperature", type=float, default=1.0)
    drawing.add_argument("--top_k", type=int, default=0)
    drawing.add_argument("--top_p", type=float, default=1.0)
    drawing.set_defaults(run=draw)

    converting = commands.add_parser("convert", help="research adapters to a model folder")
    converting.add_argument("file", nargs="+", help="rqtransformer.bin, mm_projector.bin (of reading, of drawing)")
    converting.add_argument("--language_model", required=True, help="the text model the adapters were trained for")
    converting.add_argument("--vision_tower", required=True, help="tokenizer folder, made by `evotok convert`")
    converting.add_argument("-o", "--output", required=True, help="new folder for the model")
    converting.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights of the model")
    add_arguments(converting, HeadOptions)
    converting.set_defaults(run=convert)

    merging = commands.add_parser("merge", help="a LoRA or QLoRA adapter into the model it was trained on")
    merging.add_argument("base", help="the model folder that training started from, or the causal LM")
    merging.add_argument("adapter", help="adapter folder, or a checkpoint of the run")
    merging.add_argument("--vision_tower", help="tokenizer folder, where the base is a causal LM")
    merging.add_argument("-o", "--output", required=True, help="new folder for the whole model")
    merging.set_defaults(run=merge_adapter)

    exporting = commands.add_parser("export", help="a model folder that needs nothing else")
    exporting.add_argument("folder", help="a trained model, or a checkpoint of a run")
    exporting.add_argument("-o", "--output", required=True, help="new folder")
    exporting.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    exporting.set_defaults(run=export)

    estimating = commands.add_parser(
        "estimate",
        help="parameters, memory and tokens a step of a training run",
        epilog="every other flag of training may be given, too, as `scripts/finetune.sh` takes it",
    )
    estimating.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe of the project")
    estimating.add_argument("--gpus", type=int, default=1, help="how many processes, one a GPU")
    estimating.set_defaults(run=estimate)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end as one line and exit code 2."""
    parser = build_parser()
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.run is not estimate:
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between other libraries, nothing a user can change
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
