"""The documents of the task `geneval_scenes`: prompts of six skills, each with a partner for the baseline."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import scene_prompts

# Corpora use the random streams [seed, 0], [seed, 1], ...; this stream differs from all of them.
_STREAM = 7_001
_SKILLS = Path(__file__).with_name("skills.jsonl")


def derangement(prompts: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Assign to every document another one with a different prompt, each exactly once.

    Raises:
        UserError: more than half of the prompts are equal, so no such assignment exists.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(prompts):
        raise UserError(f"one prompt occurs {largest} times among {len(prompts)}: too few others to be its partners")
    # Equal prompts are adjacent; shifting by the longest run of them pairs no prompt with itself.
    names = list(groups)
    ring = [index for position in rng.permutation(len(names)) for index in groups[names[position]]]
    partner = [0] * len(ring)
    for position, index in enumerate(ring):
        partner[index] = ring[(position + largest) % len(ring)]
    return partner


def make_documents(skills: Sequence[dict], seed: int) -> list[dict]:
    """The documents of the task, with skills alternating so that a limit covers all.

    A skill with fewer distinct prompts than requested repeats them; each document gets its own images.

    Args:
        skills: rows `{"skill": name, "prompts": number}`.
        seed: of the prompts and of the baseline's partners.
    """
    rng = np.random.default_rng([seed, _STREAM])
    by_skill = []
    for row in skills:
        different = scene_prompts(row["skill"], row["prompts"], rng)
        by_skill.append([different[n % len(different)] for n in range(row["prompts"])])
    longest = max(map(len, by_skill))
    records = [records[n] for n in range(longest) for records in by_skill if n < len(records)]
    partners = derangement([record["prompt"] for record in records], rng)
    # Clauses mix types ("position": ["left of", 0]), which columns cannot hold: they travel as JSON.
    return [
        {
            "index": index,
            "tag": record["tag"],
            "prompt": record["prompt"],
            "record": json.dumps(record),
            "baseline_record": json.dumps(records[partner]),
        }
        for index, (record, partner) in enumerate(zip(records, partners, strict=True))
    ]


def documents() -> list[dict]:
    """The documents of the task, from its skills.jsonl."""
    rows = [json.loads(line) for line in _SKILLS.read_text(encoding="utf-8").splitlines()]
    return make_documents(rows, rows[0]["seed"])
