"""The page `docs/llava_flags.md` of LLaVA's and transformers' flags: `python -m llava_ext.training.flag_tables`."""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("train")

import sys

from llava_ext.training.llava_flags import LLAVA, SAME, TRANSFORMERS, LlavaFlag
from llava_ext.training.stage_flags import VALUE_FLAGS
from llava_ext.training.supported_arguments import SUPPORTED, UNSUPPORTED

_HEAD = ["| flag | in a stage | |", "|---|---|---|"]
INTRODUCTION = """# Flags of LLaVA and transformers

A stage (`scripts/pretrain.sh`, `scripts/finetune.sh`, `scripts/finetune_lora.sh`, `scripts/reinforce.sh`) takes the
flags of LLaVA's and LLaVA-NeXT's training scripts. A flag has the same meaning, is translated, is accepted without
effect (the log says so), or is an error that names a replacement. Any other flag is an error that suggests the nearest
one. Flags can be written with dashes; `--no_NAME` switches a flag off that is on by default.

LLaVA's `scripts/v1_5/finetune.sh` runs after a few changes: the first line becomes `bash scripts/finetune.sh`,
`--vision_tower` names an EvoTok tokenizer, `--pretrain_mm_mlp_adapter` the output folder of stage 1, and
`--draw_share 1` is added, because its data only reads images. This was tried for 4 steps with a tiny model on a CPU,
with `--use_cpu true`, a batch of 4 and no Weights & Biases.

This page is written by `python -m llava_ext.training.flag_tables > docs/llava_flags.md`.
"""


def page() -> str:
    """The documentation page, in Markdown."""
    same = [(name, "the same", note) for name, note in SAME.items()]
    special = [(name, "depends on the value", flag.note) for name, flag in VALUE_FLAGS.items()]
    older = [_row(name, flag) for name, flag in TRANSFORMERS.items()]
    supported = sorted(SUPPORTED - set(SAME) - set(VALUE_FLAGS))
    refused = [(name, "error unless at its default", why) for name, why in sorted(UNSUPPORTED.items())]
    parts = [
        INTRODUCTION,
        "## LLaVA and LLaVA-NeXT\n",
        *_table([*same, *special, *(_row(name, flag) for name, flag in LLAVA.items())]),
        "\n## Older and evaluation flags of transformers\n",
        *_table(older),
        "\n## `TrainingArguments` of transformers\n",
        "The same meaning: " + ", ".join(f"`--{name}`" for name in supported) + ".\n",
        *_table([row for row in refused if row[0] not in TRANSFORMERS]),
    ]
    return "\n".join(parts) + "\n"


def _row(name: str, flag: LlavaFlag) -> tuple[str, str, str]:
    if flag.flags:
        return name, "translated", flag.note.removeprefix("translated to ")
    if flag.accepted == ():
        return name, "error", f"instead: {flag.instead}"
    if flag.accepted is None or not flag.instead:
        return name, "no effect", flag.note
    values = ", ".join(f"`{value}`" for value in flag.accepted if value)
    return name, f"no effect: {values or 'empty'}; else error", f"{flag.note}; instead: {flag.instead}"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    return [*_HEAD, *(f"| `--{name}` | {meaning} | {note} |" for name, meaning, note in rows)]


if __name__ == "__main__":
    sys.stdout.write(page())
