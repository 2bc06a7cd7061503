"""`evotok train | encode | reconstruct | evolve | evaluate | convert`: the tokenizer on the command line."""

import argparse
import csv
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.conversion import TokenizerOptions, convert_checkpoint
from evotok_plugin.data.folder import list_images, open_picture, usable_images
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr, ssim
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.pictures import image_grid, labelled_strip
from evotok_plugin.progress import progress_interval
from evotok_plugin.recipes import add_arguments, load_recipe
from evotok_plugin.training.config import TokenizerTrainingConfig

DEFAULT_MODELS = ("outputs/evotok", "outputs/quickstart/evotok")


def open_tokenizer(folder: str | None, device: str = "auto") -> tuple[EvoTokModel, EvoTokImageProcessor]:
    """Load a tokenizer folder, strictly.

    Raises:
        ValueError: no such folder, not an EvoTok model, or weights that are missing, left over or of another shape.
    """
    if folder is None:
        found = [path for path in DEFAULT_MODELS if (Path(path) / "config.json").is_file()]
        if not found:
            raise ValueError(f"no tokenizer in {' or '.join(DEFAULT_MODELS)}; name one with --model FOLDER")
        folder = found[0]
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder!r} is no model folder: it does not exist or holds no config.json")
    kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    if kind != EvoTokConfig.model_type:
        raise ValueError(f"{folder!r} holds a {kind} model, expected {EvoTokConfig.model_type}")
    try:
        model, report = EvoTokModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder!r} cannot be loaded: {error}") from error
    wrong = [key for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report.get(what, ())]
    if wrong:
        raise ValueError(f"{folder!r} is not a whole checkpoint: {len(wrong)} weights do not fit, first {wrong[0]}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), EvoTokImageProcessor.from_pretrained(folder)


def _at_size(processor: EvoTokImageProcessor, model: EvoTokModel, size: int | None) -> EvoTokImageProcessor:
    """The processor for images of `size` x `size` pixels; None leaves it as it is."""
    if size is None:
        return processor
    patch = model.config.patch_size
    if size < patch or size % patch:
        raise ValueError(f"--size must be a multiple of the patch size {patch}, got {size}")
    return EvoTokImageProcessor(size=size)


def _batches(paths: Sequence[Path], processor: EvoTokImageProcessor, size: int = 32) -> Iterator[torch.Tensor]:
    for start in tqdm(
        range(0, len(paths), size), unit="batch", disable=len(paths) <= size, mininterval=progress_interval()
    ):
        yield processor([open_picture(path) for path in paths[start : start + size]]).pixel_values


def _sources(names: Sequence[str]) -> list[Path]:
    return [path for name in names for path in list_images(name)]


def train(arguments: argparse.Namespace) -> None:
    """Train a tokenizer by a recipe."""
    from evotok_plugin.training.tokenizer_trainer import TokenizerTrainer

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", "recipe")}
    logging.getLogger("evotok_plugin").setLevel(logging.INFO)
    try:
        config = load_recipe(arguments.recipe, TokenizerTrainingConfig, given)
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip(" s:")
        raise ValueError(f"not set: {missing}; pass it as a flag or put it into the recipe") from None
    print(f"tokenizer: {TokenizerTrainer(config).run()}")


@torch.inference_mode()
def encode(arguments: argparse.Namespace) -> None:
    """Write the codes of images: one safetensors file with `codes` (images, N, L) and the images' names."""
    model, processor = open_tokenizer(arguments.model, arguments.device)
    processor = _at_size(processor, model, arguments.size)
    paths = usable_images(_sources(arguments.source), arguments.max_bad_fraction)
    codes = [model.encode(batch.to(model.device)).codes.cpu() for batch in _batches(paths, processor)]
    out = Path(arguments.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"names": json.dumps([str(path) for path in paths]), "fingerprint": model.fingerprint()}
    metadata["image_size"] = str(processor.size)
    save_file({"codes": torch.cat(codes).to(torch.uint16)}, out, metadata)
    print(f"{out}: {len(paths)} images, {tuple(codes[0].shape[1:])} codes each")


@torch.inference_mode()
def reconstruct(arguments: argparse.Namespace) -> None:
    """Write originals over reconstructions and print the PSNR of each."""
    model, processor = open_tokenizer(arguments.model, arguments.device)
    processor = _at_size(processor, model, arguments.size)
    paths = _sources(arguments.source)
    depth = model.config.pixel_depth if arguments.depth is None else arguments.depth
    originals, rebuilt = [], []
    for batch in _batches(paths, processor):
        pixels = model.decode_pixels(model.encode(batch.to(model.device), depth=depth).codes).cpu()
        originals += processor.to_pil(batch)
        rebuilt += processor.to_pil(pixels)
        for score in psnr(pixels, batch).tolist():
            print(f"{paths[len(rebuilt) - len(batch)].name if len(batch) == 1 else ''}PSNR {score:.2f} dB")
    columns = min(12, len(originals))
    rows = []
    for start in range(0, len(originals), columns):
        rows += originals[start : start + columns] + rebuilt[start : start + columns]
    out = Path(arguments.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, columns, scale=max(1, 96 // originals[0].width)).save(out)
    print(out)


@torch.inference_mode()
def evolve(arguments: argparse.Namespace) -> None:
    """Rebuild one image from 1, 2, 3, ... levels: a labelled strip and the PSNR of each depth as CSV."""
    model, processor = open_tokenizer(arguments.model, arguments.device)
    batch = processor([open_picture(arguments.image)]).pixel_values
    codes = model.encode(batch.to(model.device)).codes
    depths = range(1, model.config.num_quantizers + 1)
    pixels = torch.cat([model.decode_pixels(codes[..., :depth]).cpu() for depth in depths])
    scores = psnr(pixels, batch.expand_as(pixels)).tolist()
    images = processor.to_pil(batch) + processor.to_pil(pixels)
    labels = ["original"] + [f"{d}: {score:.1f} dB" for d, score in zip(depths, scores, strict=True)]
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    labelled_strip(images, labels, scale=max(1, 96 // images[0].width)).save(out / "evolution.png")
    with (out / "evolution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["depth", "psnr"])
        writer.writerows((depth, f"{score:.4f}") for depth, score in zip(depths, scores, strict=True))
    print(out / "evolution.png", out / "evolution.csv", sep="\n")


@torch.inference_mode()
def evaluate(arguments: argparse.Namespace) -> None:
    """PSNR, SSIM and code usage over images, as a table and as JSON."""
    model, processor = open_tokenizer(arguments.model, arguments.device)
    paths = usable_images(_sources(arguments.source), arguments.max_bad_fraction)
    usage = CodeUsage(model.config.num_quantizers, model.config.codebook_size)
    all_psnr, all_ssim = [], []
    for batch in _batches(paths, processor):
        codes = model.encode(batch.to(model.device)).codes
        pixels = model.decode_pixels(codes[..., : model.config.pixel_depth]).cpu()
        usage.update(codes)
        all_psnr += psnr(pixels, batch).tolist()
        all_ssim += ssim(pixels, batch).tolist()
    results = {
        "images": len(paths),
        "psnr": sum(all_psnr) / len(paths),
        "ssim": sum(all_ssim) / len(paths),
        "code_usage": usage.usage(),
        "perplexity": usage.perplexity(),
    }
    print(f"{len(paths)} images: PSNR {results['psnr']:.2f} dB, SSIM {results['ssim']:.4f}")
    print("level  usage  perplexity")
    for level, (share, perplexity) in enumerate(zip(results["code_usage"], results["perplexity"], strict=True)):
        print(f"{level + 1:5d}  {share:5.1%}  {perplexity:10.1f}")
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
        print(arguments.output)


def convert(arguments: argparse.Namespace) -> None:
    """Turn a research checkpoint into a model folder; say what was left out."""
    names = [field.name for field in dataclasses.fields(TokenizerOptions)]
    given = {key: value for key, value in vars(arguments).items() if key in names}
    converted = convert_checkpoint(arguments.checkpoint, arguments.output, load_recipe(None, TokenizerOptions, given))
    config = converted.config
    print(
        f"{config.image_size}x{config.image_size} pixels, {config.encoder_num_layers} encoder layers, "
        f"{config.num_quantizers} levels x {config.codebook_size} codes x {config.codebook_dim}, "
        f"{len(converted.state)} weights"
    )
    for reason, count in converted.bookkeeping.items():
        print(f"left out: {count} keys, {reason}")
    print(arguments.output)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a tokenizer")
    training.add_argument("--recipe", help="YAML file, or the name of a recipe of the project")
    add_arguments(training, TokenizerTrainingConfig)
    training.set_defaults(run=train)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="tokenizer folder (default: the newest of this working folder's outputs)")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    counting = argparse.ArgumentParser(add_help=False)
    counting.add_argument("--max_bad_fraction", type=float, default=0.001, help="share of broken images tolerated")

    sizing = argparse.ArgumentParser(add_help=False)
    sizing.add_argument(
        "--size", type=int, help="pixels a side, a multiple of the patch size (default: what the model was trained on)"
    )

    encoding = commands.add_parser("encode", parents=[common, counting, sizing], help="write the codes of images")
    encoding.add_argument("source", nargs="+", help="images or folders")
    encoding.add_argument("-o", "--output", default="codes.safetensors")
    encoding.set_defaults(run=encode)

    rebuilding = commands.add_parser("reconstruct", parents=[common, sizing], help="originals over reconstructions")
    rebuilding.add_argument("source", nargs="+", help="images or folders")
    rebuilding.add_argument("-o", "--output", default="reconstruction.png")
    rebuilding.add_argument("--depth", type=int, help="levels to sum (default: pixel_depth)")
    rebuilding.set_defaults(run=reconstruct)

    evolving = commands.add_parser("evolve", parents=[common], help="one image from 1, 2, 3, ... levels")
    evolving.add_argument("image")
    evolving.add_argument("-o", "--output", default="evolution", help="folder for the strip and the CSV")
    evolving.set_defaults(run=evolve)

    evaluating = commands.add_parser("evaluate", parents=[common, counting], help="PSNR, SSIM and code usage")
    evaluating.add_argument("source", nargs="+", help="images or folders")
    evaluating.add_argument("-o", "--output", help="JSON file")
    evaluating.set_defaults(run=evaluate)

    converting = commands.add_parser("convert", help="a research checkpoint to a model folder")
    converting.add_argument("checkpoint", help="pickled checkpoint; nothing in it is run")
    converting.add_argument("output", help="new folder for the model")
    add_arguments(converting, TokenizerOptions)
    converting.set_defaults(run=convert)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end as one line and exit code 2."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
