"""Write text rows for the mixture of stage 2: answers of an LLM itself to short prompts.

  python scripts/real_parts/own_answers.py weights/smollm2 text.jsonl --count 200

The answers are sampled at temperature 1, and should pull the LLM back once training has changed it. Only answers that
end by themselves are kept, which favors short ones.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from evotok_plugin.common import command_line
from evotok_plugin.common.files import check_output_file, write_text
from evotok_plugin.common.processes import resolve_device
from evotok_plugin.errors import UserError
from llava_ext.backbone import open_backbone

_SUBJECTS = """
    apples bread cheese tea coffee rice salt honey cats horses birds whales ants frogs spiders cows the_sun the_moon
    stars rain snow wind clouds rivers the_sea mountains deserts forests volcanoes islands cars trains ships planes
    bicycles bridges roads houses schools hospitals libraries museums gardens farms books newspapers letters music paint
    films games football chess swimming sleep dreams memory time money numbers maps clocks mirrors glass iron gold paper
    wood water fire light Italy Japan Brazil Canada Kenya Norway India Mexico Spain China
""".split()
_QUESTIONS = (
    "What are {}?",
    "Tell me something about {}.",
    "Write one sentence about {}.",
    "Why do people like {}?",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Name two things that have to do with {}.",
    "Ask me a question about {}.",
)


def prompts(seed: int) -> Iterator[str]:
    """Prompts in random order: questions about subjects and, one in five, a sum."""
    choose = random.Random(seed)
    while True:
        if choose.random() < 0.2:
            operation = choose.choice(("plus", "minus", "times"))
            yield f"What is {choose.randint(1, 60)} {operation} {choose.randint(1, 30)}?"
        else:
            subject = choose.choice(_SUBJECTS).replace("_", " ")
            yield choose.choice(_QUESTIONS).format(subject)


@torch.no_grad()
def write(arguments: argparse.Namespace) -> None:
    """Sample answers until enough have ended by themselves, and write them as conversations."""
    check_output_file(arguments.output, [".jsonl"])
    for name in ("count", "batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    backbone = open_backbone(arguments.model)
    model, tokenizer = backbone.model.to(resolve_device(arguments.device)).eval(), backbone.tokenizer
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise UserError(f"{arguments.model} has no chat template or no end token, so its answers do not end")
    torch.manual_seed(arguments.seed)
    rows, asked, tried = [], prompts(arguments.seed), 0
    while len(rows) < arguments.count:
        batch = [next(asked) for _ in range(arguments.batch_size)]
        turns = [[{"role": "user", "content": prompt}] for prompt in batch]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        found = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=arguments.max_new_tokens
        )
        tried += len(batch)
        for prompt, ids in zip(batch, found[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in ids:
                answer = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]).strip()
                turns_of_row = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
                rows += [{"conversations": turns_of_row}] if answer else []
        if tried > 100 * arguments.count:
            raise UserError(
                f"only {len(rows)} of {tried} answers end within {arguments.max_new_tokens} tokens; raise it"
            )
    rows = rows[: arguments.count]
    write_text(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{arguments.output}: {len(rows)} rows, from {tried} answers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or GGUF file of the LLM")
    parser.add_argument("output", type=Path, help="new .jsonl file")
    parser.add_argument("--count", type=int, default=200, help="number of rows (default: 200)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts per batch (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and answers (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (default: auto)")
    return command_line.run(parser, work=write)


if __name__ == "__main__":
    sys.exit(main())
