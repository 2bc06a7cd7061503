"""`evotok-eval text`: the text abilities of a model, compared with those of the LLM that it was trained from."""

import argparse
from pathlib import Path

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_file, write_json
from evotok_plugin.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "text",
        epilog=examples_of(
            "evotok-eval text outputs/finetune                         # against the LLM of its recipes",
            "evotok-eval text outputs/finetune --base weights/smollm2 -o text.json",
            text="Prints how many greedy answers are identical, the loss of held-out texts, and different answers.",
        ),
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="output folder of a stage")
    parser.add_argument(
        "--base", help="a causal LM or an EvoTok-LLaVA folder (default: the LLM that the recipes of the stages name)"
    )
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line (default: 20 of the package)")
    parser.add_argument(
        "--texts", type=Path, help="file of paragraphs that were not trained on (default: 10 of the package)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=48, help="tokens per answer")
    parser.add_argument("--batch_size", type=int, default=20, help="prompts per batch")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="file for the results and all answers")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write the file."""
    import torch

    from eval_tasks.text.measure import (
        Answer,
        TextAbilities,
        ask,
        check_same_tokens,
        encode,
        read_prompts,
        read_texts,
    )
    from eval_tasks.text.models import open_text_model, recorded_base
    from evotok_plugin.common.processes import resolve_device
    from evotok_plugin.model_folder import model_type_of
    from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig

    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.output:
        check_output_file(arguments.output, [".json"])
    prompts, texts = read_prompts(arguments.prompts), read_texts(arguments.texts)
    if (kind := model_type_of(arguments.model)) != EvoTokLlavaConfig.model_type:
        raise UserError(
            f"{arguments.model} holds a {kind or 'nameless'} model, expected {EvoTokLlavaConfig.model_type}; pass the "
            "output folder of a stage"
        )
    base = arguments.base or recorded_base(arguments.model)
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    opened = open_text_model(arguments.model, device, dtype)
    tokenizer, encoded = opened.tokenizer, encode(opened, prompts, texts)
    answers, loss = ask(opened, encoded, arguments.max_new_tokens, arguments.batch_size)
    del opened  # its memory is needed for the base
    reference = open_text_model(base, device, dtype)
    check_same_tokens(encoded, encode(reference, prompts, texts))
    of_base, base_loss = ask(reference, encoded, arguments.max_new_tokens, arguments.batch_size)
    count = sum(len(ids) - 1 for ids in encoded.texts)
    pairs = [
        Answer(prompt, tokenizer.decode(theirs), tokenizer.decode(ours), theirs == ours)
        for prompt, theirs, ours in zip(prompts, of_base, answers, strict=True)
    ]
    found = TextAbilities(tuple(pairs), base_loss / count, loss / count, count)
    print(f"model {arguments.model}, base {base}")
    print(found.as_table())
    if arguments.output:
        write_json(arguments.output, {"model": str(arguments.model), "base": base, **found.as_dict()})
        print(f"results: {arguments.output}")
