"""Compare drawing with a straightforward implementation in images per second, on the same weights.

    python scripts/benchmark/generation.py                       # paper-size image head on a CPU
    python scripts/benchmark/generation.py --device cuda --dtype bfloat16 --positions 256

The straightforward implementation runs the language model on every prompt separately, appends keys and values to
transformers' `DynamicCache`, runs the depth transformer over all previous levels again at every level, applies all
classifiers (one per level of the tokenizer, as in published code) to its last state, and samples by sorting all codes.
Ours is `draw_codes`. Both draw with guidance, top-k 900 and top-p 0.96. Weights are random, since the time does not
depend on their values. With greedy sampling both draw the same codes, which is checked.

The image head is measured again with PyTorch's linear layers, to show the effect of `thin_linear`.

An image has 256 positions. On a CPU only a few are measured (`--positions`); images per second are extrapolated from
the times of one position, of the prompts and of decoding the pixels. The first preview is available after 16 positions.
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler, which measures memory

import torch
import transformers
from measuring import device_name, peak_mebibytes, seconds, synchronize
from torch import Tensor, nn
from transformers import BatchFeature, DynamicCache

from evotok_plugin import EvoTokConfig, SamplingOptions
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.sampling import sample, uniform_noise
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration
from llava_ext.generation import DrawingOptions

PROMPT_TOKENS = 40
POSITIONS_TO_PREVIEW = 16
# Sizes of Qwen2.5; the vocabulary is small because drawing does not use it.
BACKBONES = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
HEADS = {"paper": (2560, 6, 40), "tiny": (128, 2, 4)}
MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "attention")


@dataclass
class Timing:
    """Seconds spent in the parts of drawing one batch."""

    prompts: float
    position: float
    head: float
    sampling: float


def make_model(options: argparse.Namespace) -> EvoTokLlavaForConditionalGeneration:
    """Create a model with random weights; the tokenizer's encoder, unused in drawing, has one layer."""
    tower = EvoTokConfig.preset("paper", encoder_num_layers=1, semantic_num_layers=1)
    text = {"model_type": "qwen2", "vocab_size": 1000, "num_key_value_heads": 2, **BACKBONES[options.backbone]}
    width, layers, heads = HEADS[options.head]
    config = EvoTokLlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=0,
        image_start_token_id=1,
        image_end_token_id=2,
        residual_token_offset=1000,
        head_hidden_size=width,
        head_num_layers=layers,
        head_num_heads=heads,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = EvoTokLlavaForConditionalGeneration(config)
    for part in (model.language_model, model.image_head, model.write_projector, model.lm_head):
        part.to(dtype)
    return model.to(options.device).eval()


class Prompts:
    """Replaces the processor: prompts of random tokens, all of the same length."""

    def drawing_prompts(self, prompts: list[str]) -> BatchFeature:
        rows = [
            torch.randint(3, 1000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(len(p))) for p in prompts
        ]
        ids = torch.stack(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class Straightforward:
    """The straightforward implementation of drawing."""

    def __init__(self, model: EvoTokLlavaForConditionalGeneration) -> None:
        self.model, vision = model, model.config.vision_config
        width = model.config.head_hidden_size
        like = model.image_head.level_embedding
        further = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vision.codebook_size))
            for _ in range(vision.num_quantizers - vision.pixel_depth)
        ]
        self.classifiers = nn.ModuleList([*model.image_head.classifiers, *further]).to(like.device, like.dtype)

    def draw(self, prompts: list[str], options: DrawingOptions, num_positions: int) -> tuple[Tensor, Timing]:
        """Draw codes (R, positions, L) of one image per prompt; also returns the times."""
        model, count, device = self.model, len(prompts), self.model.device
        inputs = Prompts().drawing_prompts([*prompts, *[""] * count]).to(device)
        mask, spent = inputs["attention_mask"], defaultdict(float)
        started = now(device)
        outputs = model.language_model(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            attention_mask=mask,
            past_key_values=DynamicCache(config=model.language_model.config),
            use_cache=True,
        )
        prompt_seconds, started, positions = now(device) - started, now(device), []
        for index in range(num_positions):
            before = now(device)
            positions.append(self._levels(outputs.last_hidden_state[:, -1], options, spent))
            spent["head"] += now(device) - before
            place = torch.full((count,), index, device=device)
            step = model.embed_written(positions[-1], place)[:, None]
            mask = torch.cat([mask, mask.new_ones(2 * count, 1)], dim=1)
            outputs = model.language_model(
                inputs_embeds=torch.cat([step, step]),
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
        whole = (now(device) - started) / num_positions
        timing = Timing(prompt_seconds, whole, spent["head"] / num_positions, spent["sampling"] / num_positions)
        return torch.stack(positions, dim=1), timing

    def _levels(self, hidden: Tensor, options: DrawingOptions, spent: dict[str, float]) -> Tensor:
        head, codebooks = self.model.image_head, self.model.vision_tower.quantizer.codebooks
        count, codes, latents = hidden.shape[0] // 2, [], []
        for level in range(head.num_levels):
            inputs = [head.from_hidden(hidden)]
            inputs += [head.from_latent(torch.stack(latents[: n + 1]).sum(0).to(hidden.dtype)) for n in range(level)]
            x = torch.stack(inputs, dim=1) + head.level_embedding[: level + 1]
            for block in head.blocks:
                x = block(x)
            logits = [classifier(x[:, -1]) for classifier in self.classifiers][level]
            conditional, unconditional = logits[:count], logits[count:]
            logits = unconditional + options.guidance_scale * (conditional - unconditional)
            before = now(hidden.device)
            codes.append(sort_and_sample(logits.float(), options.sampling))
            spent["sampling"] += now(hidden.device) - before
            drawn = codebooks[level][codes[-1]]
            latents.append(torch.cat([drawn, drawn]))
        return torch.stack(codes, dim=1)


def sort_and_sample(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Apply the filters one after another to the full vocabulary, then sample with `multinomial`."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    if options.top_k:
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], -torch.inf)
    ordered, index = logits.sort(descending=False)
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - options.top_p
    outside[:, -1:] = False
    logits = logits.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def now(device: torch.device) -> float:
    """The wall-clock time after the GPU has finished its work."""
    synchronize(device)
    return time.perf_counter()


def draw_ours(model, prompts: list[str], options: DrawingOptions, num_positions: int, use_graphs: bool) -> tuple:
    """Draw codes (R, positions, L); also returns the time to the first position, and the time per further position."""
    started, marks = now(model.device), []
    for codes in model.draw_codes(prompts, Prompts(), list(range(len(prompts))), options, use_graphs):
        marks.append(now(model.device))
        if codes.shape[1] == num_positions + 1:
            break
    return codes[:, :num_positions], marks[0] - started, (marks[-1] - marks[0]) / (len(marks) - 1)


def time_head(model, count: int, options: DrawingOptions, rounds: int) -> tuple[float, float]:
    """Seconds of the image head for one position of `count` images with guidance, and of sampling alone."""
    head, device = model.image_head, model.device
    hidden = torch.randn(2 * count, model.config.text_config.hidden_size, device=device).to(head.level_embedding.dtype)
    noise, cache = uniform_noise(0, count, head.num_levels).to(device), head.new_cache(2 * count)
    codebooks, sampling = model.vision_tower.quantizer.codebooks, options.sampling
    logits = torch.randn(count, head.config.codebook_size, device=device)

    def draw() -> None:
        head.sample(hidden, codebooks, noise, sampling, options.guidance_scale, cache)

    def choose() -> None:
        for level in range(head.num_levels):
            sample(logits, sampling.at_level(level), noise[:, level])

    draw(), choose()  # warm up
    return tuple(min(seconds(run, device) for _ in range(rounds)) for run in (draw, choose))


def outside_matrix_products(run: Callable[[], object], device: torch.device) -> float:
    """The share of operator time in PyTorch's profiler that is not spent in matrix products."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, name) for event in profile.key_averages()}
    if device.type == "cuda":
        products = ("gemm", "gemv", "cutlass", "flash", "fmha", "conv")
    else:
        products = MATRIX_PRODUCTS
    multiplied = sum(value for key, value in spent.items() if any(word in key.lower() for word in products))
    return 1 - multiplied / sum(spent.values())


def measure(model, count: int, options: argparse.Namespace) -> dict:
    """Measure both implementations on a batch of `count` images."""
    device, prompts = model.device, ["x" * (n + 1) for n in range(count)]
    plain = Straightforward(model)
    drawing = DrawingOptions(3.0, sampling=SamplingOptions(top_k=900, top_p=0.96)).completed()
    greedy = DrawingOptions(3.0, sampling=SamplingOptions(temperature=0)).completed()
    few = min(2, options.positions)
    same = torch.equal(
        plain.draw(prompts, greedy, few)[0], draw_ours(model, prompts, greedy, few, options.use_graphs)[0]
    )
    codes = torch.zeros(count, 256, 4, dtype=torch.long, device=device)
    decode = min(seconds(lambda: model.vision_tower.decode_pixels(codes), device) for _ in range(2))

    theirs, ours = [], []
    for _ in range(options.rounds):
        theirs.append(plain.draw(prompts, drawing, options.positions)[1])
        ours.append(draw_ours(model, prompts, drawing, options.positions, options.use_graphs)[1:])
    head, sampling = time_head(model, count, drawing, options.rounds + 1)
    with mock.patch("evotok_plugin.image_head.thin_linear", nn.Module.__call__):
        plain_layers, _ = time_head(model, count, drawing, options.rounds + 1)
    least = Timing(*(min(getattr(t, name) for t in theirs) for name in vars(theirs[0])))
    ours_prompts, ours_position = (min(values) for values in zip(*ours, strict=True))

    def row(position: float, prompts: float, head: float, sampling: float, run: Callable[[], object]) -> dict:
        return {
            "images_per_second": round(count / (prompts + 256 * position + decode), 4),
            "seconds_to_first_preview": round(prompts + POSITIONS_TO_PREVIEW * position + decode, 3),
            "milliseconds_a_position": round(1000 * position, 2),
            "of_them_image_head": round(1000 * head, 2),
            "of_them_sampling": round(1000 * sampling, 2),
            "peak_mebibytes": round(peak_mebibytes(run, device), 1),
            "share_outside_matrix_products": round(outside_matrix_products(run, device), 3),
        }

    rows = {
        "straightforward": row(
            least.position, least.prompts, least.head, least.sampling, lambda: plain.draw(prompts, drawing, few)
        ),
        "ours": row(
            ours_position, ours_prompts, head, sampling,
            lambda: draw_ours(model, prompts, drawing, few, options.use_graphs),
        ),
    }  # fmt: skip
    ratio = {
        name: round(getattr(least, name) / value, 2) for name, value in [("head", head), ("position", ours_position)]
    }
    rows["ours"]["of_them_image_head_by_plain_layers"] = round(1000 * plain_layers, 2)
    rows["straightforward"]["of_them_image_head_by_plain_layers"] = rows["straightforward"]["of_them_image_head"]
    whole = rows["ours"]["images_per_second"] / rows["straightforward"]["images_per_second"]
    return {
        "batch": count,
        "same_codes": same,
        "contestants": rows,
        "times_faster": {**ratio, "image": round(whole, 2)},
    }


def main() -> None:
    """Run the comparison and print the results."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    parser.add_argument("--head", default="paper", choices=list(HEADS), help="sizes of the image head")
    parser.add_argument("--backbone", default="0.5b", choices=list(BACKBONES), help="sizes of the language model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="numbers of images drawn at once")
    parser.add_argument("--positions", type=int, default=3, help="number of measured positions; at most 255")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the minimum time counts")
    parser.add_argument("--use_graphs", action=argparse.BooleanOptionalAction, help="CUDA graphs (default: on CUDA)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if options.use_graphs is None:
        options.use_graphs = options.device.startswith("cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = make_model(options)
    machine = {
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    sizes = {"image head": options.head, "backbone": options.backbone, "dtype": options.dtype}
    print(", ".join(f"{key} {value}" for key, value in {**machine, **sizes}.items()))
    results = []
    with torch.no_grad():
        for count in options.batch:
            results.append(measure(model, count, options))
            show(results[-1])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "sizes": sizes, "results": results}, indent=2) + "\n")


def show(result: dict) -> None:
    """Print the table of one batch size."""
    print(f"\nbatch {result['batch']}; same codes: {result['same_codes']}; times faster: {result['times_faster']}")
    names = list(result["contestants"]["ours"])
    width = max(map(len, names))
    print(f"{'':{width}}" + "".join(f"{name:>18}" for name in result["contestants"]))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{row[name]:18}" for row in result["contestants"].values()), flush=True)


if __name__ == "__main__":
    main()
