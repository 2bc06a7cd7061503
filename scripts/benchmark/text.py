"""Compare our text generation with transformers' `generate` in tokens per second, on the same weights.

    python scripts/benchmark/text.py --threads 1 --json text.json
    python scripts/benchmark/text.py --models included --batch 1 --tokens 8 --rounds 1

Ours is `generate` of the multimodal model. transformers' is that of the plain causal LM with the same weights, which
suppresses the same image tokens. Both are greedy and must write the same tokens. Models are the included one, and two
with random weights in the shapes of SmolLM2-135M and Qwen2.5-0.5B. A call is timed as a whole, with its prompts of 32
tokens and with packing its weights; rounds alternate, and the minimum counts. With one thread times are CPU times, else
wall-clock times.

The floor is the time to read all weights once per step at the rate of one large packed product of four rows.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import transformers
from drawing_model import make_model
from measuring import clock_for, clock_name, seconds
from report import Table, add_json_option, machine, write_report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.kernels.thin_linear import PACK_AFTER, ThinLinear, can_be_thin
from llava_ext import EvoTokLlavaForConditionalGeneration
from llava_ext.model_folder import INCLUDED_MODEL, open_model

PROMPT_TOKENS = 32
# transformers' names of the sizes, from the models' public config.json files.
SHAPES = {
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
MODELS = ("included", *SHAPES)


def open_shape(name: str) -> EvoTokLlavaForConditionalGeneration:
    """The included model, or one with random weights in the shape of an LLM."""
    if name == "included":
        return open_model(str(INCLUDED_MODEL), "cpu").model
    sizes = argparse.Namespace(backbone="tiny", head="tiny", dtype="float32", device="cpu")
    return make_model(sizes, text_config=SHAPES[name], preset="tiny")


def plain_llm(model: EvoTokLlavaForConditionalGeneration) -> PreTrainedModel:
    """transformers' causal LM over the same weights."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config.text_config)
    plain.model, plain.lm_head = model.language_model, model.lm_head
    return plain.eval()


@torch.no_grad()
def floor_seconds(model: EvoTokLlavaForConditionalGeneration, clock: Callable[[], float], rounds: int) -> float:
    """The time to read the weights of a step once, at the rate of a large packed product of four rows."""
    layer, x = nn.Linear(2560, 7680, bias=False), torch.randn(4, 2560)
    thin = ThinLinear.of(layer) if can_be_thin(layer) else layer
    for _ in range(PACK_AFTER + 1):
        thin(x)
    best = min(seconds(lambda: thin(x), x.device, clock) for _ in range(10 * rounds))
    parts = (model.language_model.layers, model.lm_head)
    weights = [layer.weight for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    return best * sum(weight.nbytes for weight in weights) / layer.weight.nbytes


def measure(model: EvoTokLlavaForConditionalGeneration, count: int, options: argparse.Namespace) -> dict:
    """Measure both on a batch of `count` prompts."""
    clock, plain = clock_for(torch.get_num_threads(), model.device), plain_llm(model)
    vocabulary = min(model.config.text_config.vocab_size, 1000)
    ids = torch.randint(20, vocabulary, (count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": 3}
    written: dict[str, Tensor] = {}

    def ours() -> None:
        written["ours"] = model.generate(ids, **settings)

    def theirs() -> None:
        written["transformers"] = plain.generate(ids, suppress_tokens=model.image_token_ids, **settings)

    spent: dict[str, list[float]] = {"transformers": [], "ours": []}
    for _ in range(options.rounds):
        for name, run in (("transformers", theirs), ("ours", ours)):
            spent[name].append(seconds(run, model.device, clock))
    rates = {name: count * options.tokens / min(values) for name, values in spent.items()}
    return {
        "batch": count,
        "same_tokens": torch.equal(written["ours"], written["transformers"]),
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "times_faster": round(rates["ours"] / rates["transformers"], 2),
        "milliseconds_a_step": {name: round(1000 * count / rate, 2) for name, rate in rates.items()},
        "floor_milliseconds": round(1000 * floor_seconds(model, clock, options.rounds), 2),
    }


def table(results: list[dict]) -> Table:
    """A row for each model and batch size."""
    rows = []
    for result in results:
        rates = result["tokens_per_second"]
        rows.append([
            f"{result['model']}, {result['batch']}", f"{rates['transformers']:.1f} tokens/s",
            f"{rates['ours']:.1f} tokens/s", f"**{result['times_faster']:.2f}**",
            f"{result['milliseconds_a_step']['ours']:.1f} ms",
        ])  # fmt: skip
    return Table(["model, batch", "transformers", "ours", "times faster", "a step of ours"], rows)


def main() -> int:
    """Run the comparison and print a row per model and batch; returns 1 if the tokens differ."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="models to measure")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="numbers of prompts answered at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens written for each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the minimum time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add_json_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    clock = clock_name(torch.get_num_threads(), torch.device("cpu"))
    on, results = machine(packages=("torch", "transformers"), clock=clock), []
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    for name in options.models:
        model = open_shape(name).eval()
        for count in options.batch:
            result = {"model": name, **measure(model, count, options)}
            print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
            results.append(result)
    shown, sizes = table(results), {"tokens": options.tokens, "prompt_tokens": PROMPT_TOKENS}
    print(f"\n{shown.markdown()}")
    write_report(options.json, __file__, {"text": shown}, on, {"sizes": sizes, "results": results})
    return 0 if all(result["same_tokens"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
