"""GenEval's prompts, regenerated from their seed."""

import hashlib
import json
from collections import Counter

import pytest

from eval_tasks.judging.vocabulary import COLORS, SKILLS
from eval_tasks.tasks.geneval import prompts as geneval_prompts
from eval_tasks.tasks.geneval import task as geneval
from eval_tasks.tasks.geneval.prompts import draw_records, geneval_records

# The digest of evaluation_metadata.jsonl in github.com/djghosh13/geneval.
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def test_the_list_equals_the_official_one_byte_by_byte():
    records = geneval_records()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert hashlib.sha256(lines.encode()).hexdigest() == OFFICIAL_SHA256
    assert len(records) == 553 and records[0]["prompt"] == "a photo of a bench"
    assert Counter(record["tag"] for record in records).keys() == set(SKILLS)


def test_records_match_their_prompts():
    for record in geneval_records():
        for clause in record["include"]:
            assert clause["class"] in record["prompt"]
            assert "color" not in clause or (clause["color"] in COLORS and clause["color"] in record["prompt"])
            assert clause["class"] != "person" or "color" not in clause


def test_a_numpy_with_other_random_numbers_is_rejected(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    with pytest.raises(ValueError, match="generates other prompts than GenEval's"):
        geneval_records()
    assert draw_records(44, 5) != draw_records(43, 5)


def test_documents_alternate_skills_and_keep_their_official_numbers():
    documents = geneval.documents()
    assert [document["tag"] for document in documents[:12]] == [*SKILLS, *SKILLS]
    assert sorted(document["index"] for document in documents) == list(range(553))
    records = geneval_records()
    assert all(json.loads(document["record"]) == records[document["index"]] for document in documents)
