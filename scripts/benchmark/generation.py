"""Compare drawing with a straightforward implementation in images per second, on the same weights.

    python scripts/benchmark/generation.py                       # paper-size image head on a CPU
    python scripts/benchmark/generation.py --threads 1 --json drawing.json
    python scripts/benchmark/generation.py --device cuda --dtype bfloat16 --positions 256

The straightforward implementation runs the language model on every prompt separately, appends keys and values to
transformers' `DynamicCache`, runs the depth transformer over all previous levels again at every level, applies all
classifiers (one per level of the tokenizer, as in published code) to its last state, and samples by sorting all codes.
Ours is `draw_codes`. Both draw with guidance, top-k 900 and top-p 0.96. Weights are random, since the time does not
depend on their values. With greedy sampling both draw the same codes, which is checked.

The image head is measured again with PyTorch's linear layers, to show the effect of `ThinLinear`.

An image has 256 positions. On a CPU only a few are measured (`--positions`); images per second are extrapolated from
the times of one position, of the prompts and of decoding the pixels. Ours packs its weights during the first 17
positions, which are measured, too, and counted as they are. The first preview is available after 16 positions.

With one thread times are CPU times, else wall-clock times.
"""

import argparse
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler, which measures memory

import torch
import transformers
from drawing_model import BACKBONES, HEADS, Prompts, make_model
from measuring import clock_for, clock_name, now, peak_mebibytes, seconds
from report import Table, add_json_option, machine, write_report
from torch import Tensor, nn
from transformers import DynamicCache

from evotok_plugin import SamplingOptions
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.kernels.thin_linear import PACK_AFTER, can_be_thin
from evotok_plugin.sampling import sample, uniform_noise
from llava_ext import EvoTokLlavaForConditionalGeneration
from llava_ext.generation import DrawingOptions
from llava_ext.generation.thin_view import thin_view

POSITIONS_TO_PREVIEW = 16
NUM_POSITIONS = 256
MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "attention")


@dataclass
class Timing:
    """Seconds spent in the parts of drawing one batch."""

    prompts: float
    position: float
    head: float
    sampling: float


class Straightforward:
    """The straightforward implementation of drawing."""

    def __init__(self, model: EvoTokLlavaForConditionalGeneration, clock: Callable[[], float]) -> None:
        self.model, self.clock, vision = model, clock, model.config.vision_config
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
        started = now(device, self.clock)
        outputs = model.language_model(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            attention_mask=mask,
            past_key_values=DynamicCache(config=model.language_model.config),
            use_cache=True,
        )
        prompt_seconds, started, positions = now(device, self.clock) - started, now(device, self.clock), []
        for index in range(num_positions):
            before = now(device, self.clock)
            positions.append(self._levels(outputs.last_hidden_state[:, -1], options, spent))
            spent["head"] += now(device, self.clock) - before
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
        whole = (now(device, self.clock) - started) / num_positions
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
            before = now(hidden.device, self.clock)
            codes.append(sort_and_sample(logits.float(), options.sampling))
            spent["sampling"] += now(hidden.device, self.clock) - before
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


@dataclass
class OwnTiming:
    """Seconds of our implementation.

    Attributes:
        first: up to the codes of the first position.
        warm_up: of the further positions during which weights are packed.
        position: of each position after them.
        preview: up to the codes of the first preview.
    """

    first: float
    warm_up: float
    position: float
    preview: float


def draw_ours(
    model, prompts: list[str], options: DrawingOptions, num_positions: int, use_graphs: bool, clock, warm_up: int
) -> tuple[Tensor, OwnTiming]:
    """Draw codes (R, warm_up + num_positions, L), with their times."""
    started, marks = now(model.device, clock), []
    for codes in model.draw_codes(prompts, Prompts(), list(range(len(prompts))), options, use_graphs):
        marks.append(now(model.device, clock))
        if codes.shape[1] == 1 + warm_up + num_positions:
            break
    position = (marks[-1] - marks[warm_up]) / num_positions
    reached = min(POSITIONS_TO_PREVIEW, len(marks))
    preview = marks[reached - 1] - started + (POSITIONS_TO_PREVIEW - reached) * position
    return codes[:, :-1], OwnTiming(marks[0] - started, marks[warm_up] - marks[0], position, preview)


def time_head(model, count: int, options: DrawingOptions, rounds: int, clock) -> tuple[float, float]:
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

    for _ in range(PACK_AFTER // head.num_levels + 1):
        draw(), choose()  # warm up
    return tuple(min(seconds(run, device, clock) for _ in range(rounds)) for run in (draw, choose))


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


def is_same(model, plain: Straightforward, prompts: list[str], options: argparse.Namespace, clock) -> bool:
    """Whether both draw the same codes with greedy sampling, before and after weights are packed."""
    greedy = DrawingOptions(3.0, sampling=SamplingOptions(temperature=0)).completed()
    few, warm_up = min(2, options.positions), warm_up_of(options)
    expected = plain.draw(prompts, greedy, few)[0]
    view = thin_view(model)  # packs once
    before, _ = draw_ours(view, prompts, greedy, few, options.use_graphs, clock, warm_up)
    after, _ = draw_ours(view, prompts, greedy, few, options.use_graphs, clock, 0)
    return torch.equal(before[:, :few], expected) and torch.equal(after[:, :few], expected)


def warm_up_of(options: argparse.Namespace) -> int:
    """The number of positions after the first one until all weights are packed."""
    return PACK_AFTER if options.device == "cpu" else 0


def measure(model, count: int, options: argparse.Namespace) -> dict:
    """Measure both implementations on a batch of `count` images."""
    device, prompts = model.device, ["x" * (n + 1) for n in range(count)]
    clock = clock_for(torch.get_num_threads(), device)
    plain = Straightforward(model, clock)
    drawing = DrawingOptions(3.0, sampling=SamplingOptions(top_k=900, top_p=0.96)).completed()
    same = is_same(model, plain, prompts, options, clock)
    codes = torch.zeros(count, NUM_POSITIONS, 4, dtype=torch.long, device=device)
    decode = min(seconds(lambda: model.vision_tower.decode_pixels(codes), device, clock) for _ in range(2))

    few, warm_up, use_graphs = min(2, options.positions), warm_up_of(options), options.use_graphs
    theirs, ours = [], []
    for _ in range(options.rounds):
        theirs.append(plain.draw(prompts, drawing, options.positions)[1])
        ours.append(draw_ours(model, prompts, drawing, options.positions, use_graphs, clock, warm_up)[1])
    view = thin_view(model)
    head, sampling = time_head(view, count, drawing, options.rounds + 1, clock)
    with plain_layers_in(model.image_head):
        plain_layers, _ = time_head(model, count, drawing, options.rounds + 1, clock)
    least = Timing(*(min(getattr(t, name) for t in theirs) for name in vars(theirs[0])))
    own = OwnTiming(*(min(getattr(t, name) for t in ours) for name in vars(ours[0])))
    thin = [layer for part in (model.language_model, model.image_head) for layer in part.modules()]
    packed = sum(layer.weight.nbytes for layer in thin if can_be_thin(layer)) if warm_up else 0

    def row(image: float, preview: float, position: float, head: float, sampling: float, run) -> dict:
        return {
            "images_per_second": round(count / (image + decode), 4),
            "seconds_to_first_preview": round(preview + decode, 3),
            "milliseconds_a_position": round(1000 * position, 2),
            "of_them_image_head": round(1000 * head, 2),
            "of_them_sampling": round(1000 * sampling, 2),
            "peak_mebibytes": round(peak_mebibytes(run, device), 1),
            "share_outside_matrix_products": round(outside_matrix_products(run, device), 3),
        }

    rest = NUM_POSITIONS - 1 - warm_up
    rows = {
        "straightforward": row(
            least.prompts + NUM_POSITIONS * least.position, least.prompts + POSITIONS_TO_PREVIEW * least.position,
            least.position, least.head, least.sampling, lambda: plain.draw(prompts, drawing, few),
        ),
        "ours": row(
            own.first + own.warm_up + rest * own.position, own.preview, own.position, head, sampling,
            lambda: draw_ours(view, prompts, drawing, few, use_graphs, clock, 0),
        ),
    }  # fmt: skip
    ratio = {
        name: round(getattr(least, name) / value, 2) for name, value in [("head", head), ("position", own.position)]
    }
    rows["ours"]["of_them_image_head_by_plain_layers"] = round(1000 * plain_layers, 2)
    rows["straightforward"]["of_them_image_head_by_plain_layers"] = rows["straightforward"]["of_them_image_head"]
    rows["ours"]["packed_mebibytes"], rows["straightforward"]["packed_mebibytes"] = round(packed / 2**20, 1), 0.0
    whole = rows["ours"]["images_per_second"] / rows["straightforward"]["images_per_second"]
    return {
        "batch": count,
        "same_codes": same,
        "contestants": rows,
        "times_faster": {**ratio, "image": round(whole, 2)},
    }


@contextlib.contextmanager
def plain_layers_in(module: nn.Module) -> Iterator[None]:
    """Call PyTorch's linear layers: `thin_linear` leaves layers with hooks alone."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(lambda *_: None) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> int:
    """Run the comparison and print the results; returns 1 if the codes differ."""
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
    add_json_option(parser)
    options = parser.parse_args()
    if options.use_graphs is None:
        options.use_graphs = options.device.startswith("cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = make_model(options)
    on = machine(model.device, ("torch", "transformers"), clock=clock_name(torch.get_num_threads(), model.device))
    sizes = {"image head": options.head, "backbone": options.backbone, "dtype": options.dtype}
    print(", ".join(f"{key} {value}" for key, value in {**on, **sizes}.items()))
    results = []
    with torch.no_grad():
        for count in options.batch:
            results.append(measure(model, count, options))
            show(results[-1])
    shown = table(results)
    print(f"\n{shown.markdown()}")
    write_report(options.json, __file__, {"drawing": shown}, on, {"sizes": sizes, "results": results})
    return 0 if all(result["same_codes"] for result in results) else 1


def table(results: list[dict]) -> Table:
    """Batch sizes as columns."""
    pairs = [(result["contestants"]["ours"], result["contestants"]["straightforward"]) for result in results]
    faster = [result["times_faster"] for result in results]

    def of_ours(name: str, form: str, factor: float = 1) -> list[str]:
        return [form.format(factor * own[name]) for own, _ in pairs]

    rows = [
        ["position, straightforward", *(f"{other['milliseconds_a_position']:.0f} ms" for _, other in pairs)],
        ["position, ours", *of_ours("milliseconds_a_position", "{:.0f} ms")],
        [
            "of this, image head",
            *(f"{own['of_them_image_head']:.0f} ms ({ratio['head']:.1f} times faster)"
              for (own, _), ratio in zip(pairs, faster, strict=True)),
        ],
        ["image head with PyTorch's layers", *of_ours("of_them_image_head_by_plain_layers", "{:.0f} ms")],
        ["of this, sampling", *of_ours("of_them_sampling", "{:.1f} ms")],
        [
            "images per second, ours (straightforward)",
            *(f"{own['images_per_second']:.4f} ({other['images_per_second']:.4f})" for own, other in pairs),
        ],
        ["**a whole image, times faster**", *(f"**{ratio['image']:.1f}**" for ratio in faster)],
        [
            "first preview, after 16 positions",
            *(f"{own['seconds_to_first_preview']:.1f} s ({other['seconds_to_first_preview']:.1f})"
              for own, other in pairs),
        ],
        ["memory: keys, values, activations", *of_ours("peak_mebibytes", "{:.0f} MiB")],
        ["memory: packed weights", *of_ours("packed_mebibytes", "{:.0f} MiB")],
        ["time outside matrix products", *of_ours("share_outside_matrix_products", "{:.1f} %", 100)],
    ]  # fmt: skip
    return Table(["", *(f"batch {result['batch']}" for result in results)], rows)


def show(result: dict) -> None:
    """Print the table of one batch size."""
    print(f"\nbatch {result['batch']}; same codes: {result['same_codes']}; times faster: {result['times_faster']}")
    names = list(result["contestants"]["ours"])
    width = max(map(len, names))
    print(f"{'':{width}}" + "".join(f"{name:>18}" for name in result["contestants"]))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{row[name]:18}" for row in result["contestants"].values()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
