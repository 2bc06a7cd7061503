"""Training steps of the multimodal model as one would first write them, ours, and the LLM's own, on the same samples.

    python scripts/benchmark/train_throughput.py --threads 1 --clock cpu --json train_throughput.json

* straightforward: the vision tower runs from pixels, samples are padded to the longest of their batch, and logits of
  the whole vocabulary are made and kept for every step, learned or not.
* ours: codes come from the cache, samples are packed, only learned steps are classified, chunk by chunk.
* the floor: forward and backward of the LLM alone, output layer on learned text included, on the packed rows.
* the image head alone, on what is drawn in these rows: what a model that draws must do beside its LLM.

The image head runs on drawn positions only, in both ways. All take turns over all samples, and the least time of each
counts. On a machine that does other things too, `--threads 1 --clock cpu` leaves out the time spent waiting for a core.
Times are of forward and backward, which an optimizer's would only make more alike; opening image files, which only the
straightforward way must do in every epoch, is left out, reading the code cache and the text are not. Weights are
random, since time does not depend on their values. The losses of both ways are compared.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which counts memory, should do so in silence

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from measuring import CLOCKS, device_name, peak_mebibytes, seconds  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor  # noqa: E402
from evotok_plugin.data.code_cache.encode import EncodingOptions, encode_images  # noqa: E402
from evotok_plugin.data.images import open_picture  # noqa: E402
from evotok_plugin.data.sources import FileSource  # noqa: E402
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor  # noqa: E402
from llava_ext.data.collators import PackedCollator
from llava_ext.data.dataset import ConversationDataset  # noqa: E402
from llava_ext.data.packing import PackedDataset
from llava_ext.data.records import LLAVA_IMAGE, Record  # noqa: E402
from llava_ext.data.samplers import PackingSampler  # noqa: E402
from llava_ext.embedded.text_backbone import train_text_tokenizer  # noqa: E402
from llava_ext.folding import fold_residual_tokens  # noqa: E402
from llava_ext.packed_attention import tell_samples_apart  # noqa: E402

VOCABULARY = 151936  # Qwen2's


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model: the LLM, the image head, and the tokenizer (256 pixels, 256 positions, 16 levels, 4 drawn)."""

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


SIZES = {
    "small": Sizes(256, 12, 4, 2, 1408, 64, 2, 8192, 256, 6, torch.float32),
    "large": Sizes(1536, 28, 12, 2, 8960, 1024, 6, 32768, 1024, 23, torch.bfloat16),
}


@dataclasses.dataclass
class Sums:
    """Losses added up over what is learned, and how much that is."""

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
        return {"text_loss": self.text / self.num_text, "image_loss": self.image / self.num_image}


# Model and samples -----------------------------------------------------------------------------------------------


def make_model(sizes: Sizes, device: torch.device, folder: Path) -> tuple:
    """A random model with a processor; text is that of a small BPE, the output layer has Qwen2's size."""
    tower = EvoTokConfig.preset(
        "paper",
        encoder_hidden_size=sizes.tower_width,
        encoder_num_layers=sizes.tower_layers,
        encoder_num_heads=sizes.tower_width // 64,
        encoder_intermediate_size=4 * sizes.tower_width,
        codebook_size=sizes.codebook_size,
        decoder_channels=32,  # the pixel decoder does not run in training
        semantic_hidden_size=sizes.tower_width,
        semantic_head_dim=64,
        semantic_num_heads=sizes.tower_width // 64,
        semantic_dim=sizes.tower_width,
    )
    tokenizer = train_text_tokenizer([" ".join(WORDS)], folder / "text")
    images = EvoTokImageProcessor(size=tower.image_size)
    processor = EvoTokLlavaProcessor.from_parts(images, tokenizer, tower, VOCABULARY)
    text = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
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
    """Captions of 10 to 60 words: nine in twenty are asked for, nine are drawn, the rest is text alone."""
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


# The straightforward way -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class PixelBatch:
    """Padded samples: ids and labels (B, S) with a placeholder a position, images (I, 3, H, W), which are drawn (I,),
    and at which places (B, S) a drawn image stands."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    pixels: Tensor
    is_drawn: Tensor
    drawn_places: Tensor


def pixel_batches(records: list[Record], images: Path, processor, batch_size: int) -> list[PixelBatch]:
    """Everything that the straightforward way needs, prepared beforehand."""
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
                drawn_places=labels == processor.image_token_id,
            )
        )
    return batches


def straightforward_step(model, batch: PixelBatch, sums: Sums) -> Tensor:
    """Losses from pixels, with the logits of all steps."""
    levels, positions = model.config.vision_config.pixel_depth, model.config.vision_config.num_positions
    embeddings = model.get_input_embeddings()(batch.ids)
    with torch.no_grad():
        codes = model.vision_tower.encode(batch.pixels).codes
    drawn = codes[batch.is_drawn][..., :levels].flatten(0, 1)
    read_places = (batch.ids == model.config.image_token_id) & ~batch.drawn_places
    features = model.get_image_features(image_codes=codes[~batch.is_drawn]).to(embeddings.dtype)
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
    output = model(**batch)
    sums.add(output.text_loss, output.image_loss, int(output.num_text_tokens), int(output.num_image_positions))
    return output.loss


@dataclasses.dataclass
class TextBatch:
    """What the LLM alone sees of packed rows: ids (B, S), what tells samples apart, and the learned text."""

    ids: Tensor
    apart: dict
    learned: Tensor
    targets: Tensor


def text_batch(model, batch: dict[str, Tensor]) -> TextBatch:
    folded = fold_residual_tokens(model.vocabulary, batch["input_ids"], None, batch["labels"], batch["segment_ids"])
    folded, apart = tell_samples_apart(model.language_model, folded)
    learned = (folded.labels[:, 1:] != -100) & ~folded.written[:, 1:]
    ids = folded.input_ids.masked_fill(folded.written, 0)
    return TextBatch(ids, apart, learned, folded.labels[:, 1:][learned])


def floor_step(model, batch: TextBatch) -> Tensor:
    hidden = model.language_model(input_ids=batch.ids, use_cache=False, **batch.apart).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[:, :-1][batch.learned]).float(), batch.targets)


def head_batch(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the image head sees of packed rows; its hidden states are random."""
    folded = fold_residual_tokens(model.vocabulary, batch["input_ids"], None, batch["labels"], batch["segment_ids"])
    hidden = torch.randn(len(folded.codes), model.config.text_config.hidden_size, device=folded.codes.device)
    latents = model.vision_tower.level_latents(folded.codes[None])[0]
    dtype = model.image_head.level_embedding.dtype
    hidden = hidden.to(dtype).requires_grad_()
    return {"hidden": hidden, "level_latents": latents.to(dtype), "codes": folded.codes}


# Measuring -------------------------------------------------------------------------------------------------------


def learn(model, batches: Iterator, step: Callable[..., Tensor]) -> None:
    """Forward and backward over batches, one after another."""
    for batch in batches:
        step(model, batch).backward()
        model.zero_grad(set_to_none=True)


def to_device(batch, device: torch.device):
    """A batch of tensors, dict or dataclass, on a device."""
    if isinstance(batch, dict):
        return {name: value.to(device) for name, value in batch.items()}
    return dataclasses.replace(batch, **{name: value.to(device) for name, value in vars(batch).items()})


def compare(options: argparse.Namespace, work: Path) -> dict:
    """All contestants over the same samples."""
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


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "device": device_name(torch.device(options.device)),
        "threads": str(torch.get_num_threads()),
        "clock": options.clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", choices=list(SIZES), help="default: small on a CPU, large on a GPU")
    parser.add_argument("--codebook_size", type=int, help="codes a level; default: that of the sizes")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=4, help="samples a batch of the straightforward way")
    parser.add_argument("--row_length", type=int, default=1024, help="LLM steps of a packed row; rows come one by one")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the least time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time on cores, of all threads")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    options.sizes = options.sizes or ("large" if options.device.startswith("cuda") else "small")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    options.model = SIZES[options.sizes]
    if options.codebook_size:
        options.model = dataclasses.replace(options.model, codebook_size=options.codebook_size)
    sizes = {name: str(value) for name, value in vars(options.model).items()} | {"vocabulary": str(VOCABULARY)}
    report = {"machine": machine(options), "sizes": sizes}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(", ".join(f"{key} {value}" for key, value in sizes.items()))
    with tempfile.TemporaryDirectory() as work:
        report |= compare(options, Path(work))
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
    print(f"ours is {report['speedup']:.2f} times as fast as the straightforward way")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
