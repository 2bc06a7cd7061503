"""Compare training steps of the multimodal model with a straightforward implementation and with the LLM alone.

    python scripts/benchmark/train_throughput.py --threads 1 --clock cpu --json train_throughput.json

* straightforward: the vision tower runs on pixels, samples are padded to the longest in their batch, and logits over
  the full vocabulary are computed and stored for every step, whether it has a label or not.
* ours: codes come from the cache, samples are packed, and only steps with labels are classified, in chunks.
* floor, the lower bound: forward and backward of the LLM alone on the packed rows, with the output layer on labels.
* image head: the image head alone on the drawn images of these rows, the additional work of a model that draws.

In both implementations the image head runs on drawn positions only. All contestants take turns over all samples, and
the minimum time of each counts. On a busy machine, `--threads 1 --clock cpu` excludes the time spent waiting for a
core. Times are of forward and backward; an optimizer would add the same time to each. Opening image files, which only
the straightforward implementation needs in every epoch, is excluded; reading the code cache and the text is included.
Weights are random, since the time does not depend on their values. The losses of both implementations are compared,
and the exit code is 1 if they differ.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler, which measures memory

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from measuring import CLOCKS, peak_mebibytes, seconds
from PIL import Image
from report import Table, add_json_option, machine, write_report
from torch import Tensor

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor
from evotok_plugin.common.allocation import keep_freed_memory
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.data.code_cache import EncodingOptions, encode_images
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.sources import FileSource
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor
from llava_ext.data.collators import PackedCollator
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.packing import PackedDataset
from llava_ext.data.records import LLAVA_IMAGE, Record
from llava_ext.data.samplers import PackingSampler
from llava_ext.embedded.text_backbone import train_text_tokenizer
from llava_ext.folding import fold_residual_tokens
from llava_ext.packed_attention import separate_samples

VOCABULARY = 151936  # Qwen2's
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the losses, relative


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the LLM, the image head and the tokenizer (256 pixels, 256 positions, 16 levels, 4 of them drawn)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head_width: int
    head_layers: int
    codebook_size: int
    tower_width: int
    tower_layers: int
    dtype: torch.dtype
    vocabulary: int = VOCABULARY


SIZES = {
    "tiny": Sizes(32, 1, 2, 1, 64, 32, 1, 64, 64, 1, torch.float32, 1024),  # to try this script
    "small": Sizes(256, 12, 4, 2, 1408, 64, 2, 8192, 256, 6, torch.float32),
    "large": Sizes(1536, 28, 12, 2, 8960, 1024, 6, 32768, 1024, 23, torch.bfloat16),
}


@dataclasses.dataclass
class Sums:
    """Sums of the losses, and the numbers of text tokens and image positions behind them."""

    text: float = 0.0
    image: float = 0.0
    num_text: int = 0
    num_image: int = 0

    def add(self, text: Tensor, image: Tensor, num_text: int, num_image: int) -> None:
        """Add a batch's mean losses."""
        self.text += float(text.detach()) * num_text
        self.image += float(image.detach()) * num_image
        self.num_text, self.num_image = self.num_text + num_text, self.num_image + num_image

    def means(self) -> dict[str, float]:
        """The mean losses."""
        return {"text_loss": self.text / self.num_text, "image_loss": self.image / self.num_image}


# Model and samples -----------------------------------------------------------------------------------------------


def make_model(sizes: Sizes, device: torch.device, folder: Path) -> tuple:
    """Create a random model and its processor; text uses a small BPE, but the output layer has Qwen2's size."""
    tower = EvoTokConfig.preset(
        "paper",
        encoder_hidden_size=sizes.tower_width,
        encoder_num_layers=sizes.tower_layers,
        encoder_num_heads=sizes.tower_width // 64,
        encoder_intermediate_size=4 * sizes.tower_width,
        codebook_size=sizes.codebook_size,
        decoder_channels=32,  # the pixel decoder is not used in training
        semantic_hidden_size=sizes.tower_width,
        semantic_head_dim=64,
        semantic_num_heads=sizes.tower_width // 64,
        semantic_dim=sizes.tower_width,
    )
    tokenizer = train_text_tokenizer([" ".join(WORDS)], folder / "text")
    images = EvoTokImageProcessor(size=tower.image_size)
    processor = EvoTokLlavaProcessor.from_parts(images, tokenizer, tower, sizes.vocabulary)
    text = {
        "model_type": "qwen2",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.mlp,
        "tie_word_embeddings": False,
    }
    config = EvoTokLlavaConfig(
        text_config=text,
        vision_config=tower.to_dict(),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_id,
        image_end_token_id=processor.image_end_id,
        residual_token_offset=processor.residual_token_offset,
        head_hidden_size=sizes.head_width,
        head_num_layers=sizes.head_layers,
        head_num_heads=max(1, sizes.head_width // 64),
    )
    torch.manual_seed(0)
    model = EvoTokLlavaForConditionalGeneration(config).to(sizes.dtype)
    model.vision_tower.float()
    return model.to(device).train(), processor


WORDS = "a the red blue green ring circle square left right above below of on with two three many small dog cat".split()


def make_records(num_samples: int, folder: Path, seed: int) -> list[Record]:
    """Records with captions of 10 to 60 words: 45 % describe an image, 45 % draw one, the rest is text only."""
    rng, records = np.random.default_rng(seed), []
    folder.mkdir()
    for number in range(num_samples):
        caption = " ".join(rng.choice(WORDS, rng.integers(10, 61)))
        name, kind = f"{number}.png", ("read", "draw", "text")[int(np.searchsorted([0.45, 0.9], rng.random()))]
        turns = {
            "read": (f"{LLAVA_IMAGE}\na small red ring", caption),
            "draw": (caption, LLAVA_IMAGE),
            "text": (caption, " ".join(rng.choice(WORDS, rng.integers(20, 201)))),
        }[kind]
        if kind != "text":
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / name)
        messages = tuple(
            {"role": role, "content": said} for role, said in zip(("user", "assistant"), turns, strict=True)
        )
        has_image = kind != "text"
        records.append(Record(str(number), messages, (name,) * has_image, (kind == "draw",) * has_image))
    return records


# The straightforward implementation -------------------------------------------------------------------------------


@dataclasses.dataclass
class PixelBatch:
    """Padded samples.

    Attributes:
        ids, mask, labels: (B, S), with one placeholder per image position.
        pixels: (I, 3, H, W), all images in order.
        is_drawn: (I,), whether an image is drawn.
        drawn_places: (B, S), the positions of drawn images.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    pixels: Tensor
    is_drawn: Tensor
    drawn_places: Tensor


def drawn_places(ids: Tensor, drawn: Sequence[bool], processor) -> Tensor:
    """Mark the placeholders of drawn images among the ids (T,) of a sample; `drawn` says which images are."""
    is_placeholder = ids == processor.image_token_id
    image = (is_placeholder.cumsum(0) - 1) // processor.num_positions
    return is_placeholder & torch.tensor([*drawn, False])[image.where(is_placeholder, len(drawn))]


def pixel_batches(records: list[Record], images: Path, processor, batch_size: int) -> list[PixelBatch]:
    """Prepare the batches of the straightforward implementation."""
    batches = []
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        encoded = [processor.encode_conversation(r.messages, [None] * len(r.images)) for r in part]
        pad = lambda values, fill: processor.pad(values, fill, side="right")  # noqa: E731
        ids, labels = pad([e.input_ids for e in encoded], 0), pad([e.labels for e in encoded], -100)
        pictures = [open_picture(images / name) for r in part for name in r.images]
        batches.append(
            PixelBatch(
                ids=ids,
                mask=pad([torch.ones_like(e.input_ids) for e in encoded], 0),
                labels=labels,
                pixels=processor.image_processor(pictures, return_tensors="pt").pixel_values,
                is_drawn=torch.tensor([drawn for r in part for drawn in r.drawn], dtype=torch.bool),
                drawn_places=pad(
                    [drawn_places(e.input_ids, r.drawn, processor) for e, r in zip(encoded, part, strict=True)], False
                ),
            )
        )
    return batches


def straightforward_step(model, batch: PixelBatch, sums: Sums) -> Tensor:
    """Compute the losses from pixels, with logits for all steps."""
    levels, positions = model.config.vision_config.pixel_depth, model.config.vision_config.num_positions
    embeddings = model.get_input_embeddings()(batch.ids)
    with torch.no_grad():
        codes = model.vision_tower.encode(batch.pixels).codes
    drawn = codes[batch.is_drawn][..., :levels].flatten(0, 1)
    read_places = (batch.ids == model.config.image_token_id) & ~batch.drawn_places
    features = model.embed_read(image_codes=codes[~batch.is_drawn]).to(embeddings.dtype)
    written = model.embed_written(drawn, torch.arange(len(drawn), device=drawn.device) % positions)
    embeddings = embeddings.masked_scatter(read_places[..., None], features)
    embeddings = embeddings.masked_scatter(batch.drawn_places[..., None], written.to(embeddings.dtype))
    hidden = model.language_model(
        inputs_embeds=embeddings, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    targets = batch.labels.masked_fill(batch.drawn_places, -100)[:, 1:]
    logits = model.lm_head(hidden).float()[:, :-1]
    text = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    latents = model.vision_tower.level_latents(drawn[None])[0].to(hidden.dtype)
    of_levels = model.image_head(hidden[:, :-1][batch.drawn_places[:, 1:]], latents)
    terms = [F.cross_entropy(one.float(), drawn[:, at], reduction="sum") for at, one in enumerate(of_levels)]
    image = torch.stack(terms).sum() / max(1, drawn.numel())
    sums.add(text, image, int((targets != -100).sum()), len(drawn))
    return text + image


# Ours, and the floor ---------------------------------------------------------------------------------------------


def our_step(model, batch: dict[str, Tensor], sums: Sums) -> Tensor:
    """Compute the losses with this project's model."""
    output = model(**batch)
    sums.add(output.text_loss, output.image_loss, int(output.num_text_tokens), int(output.num_image_positions))
    return output.loss


@dataclasses.dataclass
class TextBatch:
    """Packed rows for the LLM alone: ids (B, S), the arguments that separate samples, and the labels."""

    ids: Tensor
    apart: dict
    learned: Tensor
    targets: Tensor


def text_batch(model, batch: dict[str, Tensor]) -> TextBatch:
    """Keep only what the LLM needs of packed rows."""
    folded = fold_residual_tokens(model.vocabulary, batch["input_ids"], None, batch["labels"], batch["segment_ids"])
    folded, apart = separate_samples(model.language_model, folded)
    learned = (folded.labels[:, 1:] != -100) & ~folded.written[:, 1:]
    ids = folded.input_ids.masked_fill(folded.written, 0)
    return TextBatch(ids, apart, learned, folded.labels[:, 1:][learned])


def floor_step(model, batch: TextBatch) -> Tensor:
    """Compute the text loss with the LLM alone."""
    hidden = model.language_model(input_ids=batch.ids, use_cache=False, **batch.apart).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[:, :-1][batch.learned]).float(), batch.targets)


def head_batch(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the image head for packed rows, with random hidden states."""
    folded = fold_residual_tokens(model.vocabulary, batch["input_ids"], None, batch["labels"], batch["segment_ids"])
    hidden = torch.randn(len(folded.codes), model.config.text_config.hidden_size, device=folded.codes.device)
    latents = model.vision_tower.level_latents(folded.codes[None])[0]
    dtype = model.image_head.level_embedding.dtype
    hidden = hidden.to(dtype).requires_grad_()
    return {"hidden": hidden, "level_latents": latents.to(dtype), "codes": folded.codes}


# Measuring -------------------------------------------------------------------------------------------------------


def learn(model, batches: Iterator, step: Callable[..., Tensor]) -> None:
    """Run forward and backward on all batches."""
    for batch in batches:
        step(model, batch).backward()
        model.zero_grad(set_to_none=True)


def to_device(batch, device: torch.device):
    """Move a batch of tensors, a dict or dataclass, to a device."""
    if isinstance(batch, dict):
        return {name: value.to(device) for name, value in batch.items()}
    return dataclasses.replace(batch, **{name: value.to(device) for name, value in vars(batch).items()})


def compare(options: argparse.Namespace, work: Path) -> dict:
    """Measure all contestants on the same samples."""
    device, sizes = torch.device(options.device), options.model
    clock = CLOCKS[options.clock]
    model, processor = make_model(sizes, device, work)
    records = make_records(options.samples, work / "images", seed=0)
    names = [name for record in records for name in record.images]
    encoding = EncodingOptions(batch_size=4, num_workers=1, show_progress=False)
    cache = encode_images(work / "codes", FileSource(work / "images", names), model.vision_tower, 256, options=encoding)
    dataset = ConversationDataset(records, processor, cache, options.row_length, prompt_dropout=0.0)
    packing = PackingSampler(dataset.lengths, options.row_length, seed=0, epoch_of=lambda: 0)
    rows, collate = PackedDataset(dataset), PackedCollator(processor)
    pixels = [
        to_device(batch, device) for batch in pixel_batches(records, work / "images", processor, options.batch_size)
    ]
    texts = [text_batch(model, to_device(collate([rows[row]]), device)) for row in packing]
    heads = [head_batch(model, to_device(collate([rows[row]]), device)) for row in packing]
    sums = {"straightforward": Sums(), "ours": Sums()}

    def ours() -> None:
        sums["ours"] = Sums()
        batches = (to_device(collate([rows[row]]), device) for row in packing)
        learn(model, batches, lambda *arguments: our_step(*arguments, sums["ours"]))

    def straightforward() -> None:
        sums["straightforward"] = Sums()
        learn(model, iter(pixels), lambda *arguments: straightforward_step(*arguments, sums["straightforward"]))

    runs = {
        "straightforward": straightforward,
        "ours": ours,
        "floor": lambda: learn(model, iter(texts), floor_step),
        "image head": lambda: learn(
            model, (b for b in heads if len(b["codes"])), lambda model, batch: model.image_head.loss(**batch)
        ),
    }
    least = {name: float("inf") for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            least[name] = min(least[name], seconds(run, device, clock))
    num_tokens = int(dataset.lengths.sum())
    padded = {"straightforward": sum(batch.ids.numel() for batch in pixels)}
    rows_total = len(packing) * options.row_length
    result = {
        name: {
            "seconds": round(least[name], 3),
            "samples_per_second": round(len(records) / least[name], 3),
            "tokens_per_second": round(num_tokens / least[name], 1),
            "times_floor": round(least[name] / least["floor"], 3),
            "peak_mebibytes": round(peak_mebibytes(run, device), 1),
        }
        for name, run in runs.items()
    }
    kinds = [record.kind for record in records]
    return {
        "samples": {kind: kinds.count(kind) for kind in ("read", "draw", "text")},
        "llm_steps": num_tokens,
        "share_of_steps_that_hold_samples": {
            "straightforward": round(num_tokens / padded["straightforward"], 4),
            "ours": round(num_tokens / rows_total, 4),
        },
        "contestants": result,
        "losses": {name: {k: round(v, 6) for k, v in one.means().items()} for name, one in sums.items()},
        "speedup": round(least["straightforward"] / least["ours"], 3),
    }


def main() -> int:
    """Run the comparison and print the results."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--sizes", choices=list(SIZES), help="sizes of the models (default: small on a CPU, large on a GPU)"
    )
    parser.add_argument("--codebook_size", type=int, help="codes per level (default: that of --sizes)")
    parser.add_argument("--samples", type=int, default=40, help="number of samples")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per batch where samples are padded")
    parser.add_argument("--row_length", type=int, default=1024, help="LLM steps per packed row; a batch is one row")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant; the minimum time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time of all threads")
    add_json_option(parser)
    options = parser.parse_args()
    options.sizes = options.sizes or ("large" if options.device.startswith("cuda") else "small")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    keep_freed_memory()  # as the training stages do
    options.model = SIZES[options.sizes]
    if options.codebook_size:
        options.model = dataclasses.replace(options.model, codebook_size=options.codebook_size)
    sizes = {name: str(value) for name, value in vars(options.model).items()}
    on = machine(options.device, ("torch", "transformers"), clock=options.clock)
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    print(", ".join(f"{key} {value}" for key, value in sizes.items()))
    with tempfile.TemporaryDirectory() as work:
        report = {"sizes": sizes, **compare(options, Path(work))}
    print(
        f"\n{report['samples']}, {report['llm_steps']} LLM steps; shares {report['share_of_steps_that_hold_samples']}"
    )
    print(f"{'':18}{'samples/s':>11}{'steps/s':>11}{'x floor':>9}{'peak MiB':>10}{'text loss':>12}{'image loss':>12}")
    for name, row in report["contestants"].items():
        losses = "".join(f"{value:12.6f}" for value in report["losses"].get(name, {}).values())
        print(
            f"{name:18}{row['samples_per_second']:11.2f}{row['tokens_per_second']:11.0f}{row['times_floor']:9.2f}"
            f"{row['peak_mebibytes']:10.0f}{losses}"
        )
    print(f"ours is {report['speedup']:.2f} times as fast as the straightforward implementation")
    write_report(options.json, __file__, {"train-throughput": table(report)}, on, report)
    if not same_losses(report["losses"], _TOLERANCE[options.model.dtype]):
        print("the losses of both implementations differ", file=sys.stderr)
        return 1
    return 0


def same_losses(losses: dict[str, dict[str, float]], tolerance: float) -> bool:
    """Whether both implementations have the same losses, up to a relative tolerance."""
    ours, theirs = losses["ours"], losses["straightforward"]
    return all(abs(ours[name] - theirs[name]) <= tolerance * abs(theirs[name]) for name in theirs)


def table(report: dict) -> Table:
    """Throughput, memory and losses of the contestants."""
    rows = []
    for name in ("straightforward", "ours", "floor"):
        row, losses = report["contestants"][name], report["losses"].get(name, {})
        cells = [f"{row['samples_per_second']:.2f}", f"{row['times_floor']:.2f}", f"{row['peak_mebibytes']:.0f}"]
        cells += [f"{losses[kind]:.4f}" if losses else "" for kind in ("text_loss", "image_loss")]
        rows.append(["the LLM alone (floor)" if name == "floor" else name, *cells])
    return Table(["", "samples per second", "x floor", "peak MiB", "text loss", "image loss"], rows)


if __name__ == "__main__":
    sys.exit(main())
