"""The page "GenEval for your own model": its wrapper and stand-in run, and give the table that the page shows."""

import json
import re
from pathlib import Path

from PIL import Image

from eval_tasks.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "geneval_for_your_model.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.S | re.M)


def test_the_wrapper_judges_the_stand_in_as_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    wrapper, stand_in, *_ = blocks("python")
    assert wrapper.count("\n") <= 32
    for block in (wrapper, stand_in):
        exec(compile(block, str(PAGE), "exec"), names)
    (shown,) = blocks("text")
    assert capsys.readouterr().out == shown
    folder = names["folder"]
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if not row["correct"]]
    assert len(rows) == 480 and wrong
    # A row from left to right is wrong exactly where the prompt asks for another relation.
    asked = re.compile(" (right of|above|below) ")
    assert {row["prompt"] for row in wrong} == {row["prompt"] for row in rows if asked.search(row["prompt"])}
    assert all(re.fullmatch(r"expected the \w+ .* the \w+, found it left of it", row["reason"]) for row in wrong)
    page = (folder / "contact_sheet.html").read_text()
    assert "<dt>model</dt><dd>stand_in</dd>" in page and f"failures only ({len(wrong)} images)" in page
    sheet = Image.open(folder / "contact_sheet.png")
    assert (0xCF, 0x22, 0x2E) in {color for _, color in sheet.getcolors(1 << 24)}  # frames of failures
    assert main(["judge", str(folder), "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/judgements.jsonl").read_text() == (folder / "judgements.jsonl").read_text()


def test_a_missing_judge_is_an_error_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVOTOK_JUDGE_DETECTOR", "nowhere")
    names: dict = {}
    exec(compile(blocks("python")[0], str(PAGE), "exec"), names)
    drawn = []
    try:
        names["draw_and_judge"](lambda prompt, number: drawn.append(prompt), "x", task="geneval")
    except ValueError as error:
        assert "set EVOTOK_JUDGE_DETECTOR" in str(error) and not drawn
    else:
        raise AssertionError("expected an error")
