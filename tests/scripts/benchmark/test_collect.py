"""Collecting the results of benchmarks: ranges over runs, and the tables of the documentation."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from evotok_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
STORED = sorted((ROOT / "scripts/benchmark/results").rglob("*.json"))
MACHINE = {"device": "Some CPU", "threads": "1", "clock": "cpu", "torch": "2.14.1"}


@pytest.fixture
def modules(monkeypatch):
    """`modules(name)`: a module of the folder of benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmark"))
    return importlib.import_module


def write(path, rows, header=("", "1 image"), name="search", **machine):
    tables = {name: {"header": list(header), "rows": rows}}
    content = {"command": "python scripts/benchmark/x.py", "machine": MACHINE | machine, "tables": tables}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def pages(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no table\n")
    page = tmp_path / "docs" / "performance.md"
    page.write_text("before\n\n<!-- benchmark search -->\nold\n<!-- end -->\nafter\n")
    return page


def run(collect, monkeypatch, repository, *flags):
    monkeypatch.setattr(sys, "argv", ["collect.py", "--repository", str(repository), *map(str, flags)])
    return collect.main()


def test_several_runs_give_ranges(modules, tmp_path):
    one = write(tmp_path / "1.json", [["eval", "61.1 ms (1.41 x)"], ["a", "1"], ["a", "2"]])
    two = write(tmp_path / "2.json", [["eval", "9.5 ms (1.41 x)"], ["new", "3"]], threads="2")
    found = modules("collect").collect([one, two])["search"]
    rows = [["eval", "9.5 to 61.1 ms (1.41 x)"], ["a", "1"], ["a", "2"], ["new", "3"]]
    assert found.merged("search").rows == rows
    assert found.caption() == (
        "Some CPU, 1 or 2 threads, CPU time, torch 2.14.1 (2 results): `python scripts/benchmark/x.py`"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rows": [["eval", "7 s"]]}, "cannot be merged"),
        ({"rows": [["eval", "7 ms"]], "header": ("", "2 images")}, "different columns"),
    ],
)
def test_results_that_do_not_fit_are_errors(modules, tmp_path, other, message):
    files = [write(tmp_path / "1.json", [["eval", "6 ms"]]), write(tmp_path / "2.json", **other)]
    with pytest.raises(UserError, match=message):
        modules("collect").collect(files)["search"].merged("search")


def test_tables_are_written_into_the_documentation(modules, tmp_path, monkeypatch, pages, capsys):
    collect, file = modules("collect"), write(tmp_path / "1.json", [["eval", "6 ms"]])
    assert run(collect, monkeypatch, tmp_path, file, "--check") == 1 and "old" in pages.read_text()
    assert run(collect, monkeypatch, tmp_path, file, "--write") == 0
    text = pages.read_text()
    assert text.startswith(
        "before\n\n<!-- benchmark search -->\n|  | 1 image |\n| --- | ---: |\n| eval | 6 ms |\n\nSome"
    )
    assert text.endswith("x.py`\n<!-- end -->\nafter\n")
    assert run(collect, monkeypatch, tmp_path, file, "--check") == 0
    capsys.readouterr()
    assert run(collect, monkeypatch, tmp_path, file) == 0 and "| eval | 6 ms |" in capsys.readouterr().out


def test_a_block_of_several_tables_has_one_caption_for_the_same_runs(modules, tmp_path, monkeypatch, pages):
    collect = modules("collect")
    files = [write(tmp_path / f"{name}.json", [["eval", "6 ms"]], name=name) for name in ("search", "b", "c")]
    files[2].write_text(files[2].read_text().replace("x.py", "y.py"))
    pages.write_text("<!-- benchmark search b c -->\nold\n<!-- end -->\n<!-- benchmark c d -->\nold\n<!-- end -->\n")
    assert run(collect, monkeypatch, tmp_path, *files, "--write") == 0
    table = "|  | 1 image |\n| --- | ---: |\n| eval | 6 ms |\n\n"
    caption = "Some CPU, 1 thread, CPU time, torch 2.14.1: `python scripts/benchmark/{}.py`\n"
    first, second = pages.read_text().split("<!-- end -->\n")[:2]
    assert first.split("-->\n")[1] == f"{table}{table}{caption.format('x')}\n{table}{caption.format('y')}"
    assert second == "<!-- benchmark c d -->\nold\n"  # incomplete blocks stay as they are


def test_figures_in_sentences_are_cells_of_tables(modules, tmp_path, monkeypatch, pages, capsys):
    file = write(tmp_path / "1.json", [["eval, fast", "6 ms"], ["eval", "7 ms"], ["train", "8 ms"]])
    eval_and_train = "<!-- figure search | eval | 1 image -->old<!-- end --> of <!-- figure search | tr | 1 image -->"
    other = "<!-- figure b | x | y -->old<!-- end -->"
    pages.write_text(f"{pages.read_text()}It is {eval_and_train}<!-- end -->, {other}")
    collect = modules("collect")
    assert run(collect, monkeypatch, tmp_path, file, "--write") == 0
    text = pages.read_text()
    assert "1 image -->7 ms<!-- end --> of" in text and "1 image -->8 ms<!-- end -->," in text
    assert text.endswith("-->old<!-- end -->") and run(collect, monkeypatch, tmp_path, file, "--check") == 0
    pages.write_text(text.replace("8 ms<", "9 ms<"))
    assert run(collect, monkeypatch, tmp_path, file, "--check") == 1
    pages.write_text(text.replace("| tr |", "| test |"))
    capsys.readouterr()
    assert run(collect, monkeypatch, tmp_path, file, "--check") == 2
    assert "expected one row 'test' of ['eval, fast', 'eval', 'train']" in capsys.readouterr().err
    pages.write_text(text.replace("of <!-- figure", "of\n<!-- figure"))
    assert run(collect, monkeypatch, tmp_path, file, "--check") == 2
    assert "expected a word before '<!-- figure search" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"tables": {"a": []}, "machine": {}, "command": ""}'])
def test_a_damaged_result_is_an_error(modules, tmp_path, monkeypatch, pages, capsys, content):
    (tmp_path / "1.json").write_text(content)
    assert run(modules("collect"), monkeypatch, tmp_path, tmp_path / "1.json", "--write") == 2
    assert "is not a result of a benchmark" in capsys.readouterr().err


def test_a_table_without_a_place_is_an_error(modules, tmp_path, monkeypatch, pages, capsys):
    pages.write_text("nothing\n")
    file = write(tmp_path / "1.json", [["eval", "6 ms"]])
    assert run(modules("collect"), monkeypatch, tmp_path, file, "--write") == 2
    assert "no page has the markers" in capsys.readouterr().err


def test_results_of_another_machine_have_tables_of_their_own(modules, pages, monkeypatch, tmp_path):
    collect, results = modules("collect"), tmp_path / "results"
    (results / "other").mkdir(parents=True)
    write(results / "1.json", [["eval", "6 ms"]])
    write(results / "other" / "1.json", [["eval", "9 ms"]])
    monkeypatch.setattr(collect, "RESULTS", results)
    figure = "takes <!-- figure search@other | eval | 1 image -->?<!-- end -->"
    pages.write_text(f"{pages.read_text()}\n<!-- benchmark search@other -->\n<!-- end -->\n\nIt {figure}.\n")
    assert run(collect, monkeypatch, tmp_path, "--write") == 0
    before, after = pages.read_text().split("<!-- benchmark search@other -->")
    assert "6 ms" in before and "9 ms" not in before and "6 ms" not in after and after.count("9 ms") == 2


def test_the_documentation_shows_the_stored_results(modules, monkeypatch):
    assert run(modules("collect"), monkeypatch, ROOT, "--check") == 0


class Parsed(BaseException):
    """Raised after flags were parsed; no `except` of a benchmark catches it."""


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_stored_results_belong_to_a_script_with_these_flags(file, monkeypatch):
    script, *flags = shlex.split(json.loads(file.read_text())["command"])[1:]
    if script.startswith("scripts/gpu"):
        pytest.importorskip("triton")
    assert not any(word.startswith("/") or ":/" in word for word in flags)
    assert not re.search(r'"(/|[^"]*:/(?!/))', file.read_text())
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(parser, *arguments, **options):
        _, unknown = parse(parser, *arguments, **options)
        raise Parsed(unknown)

    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmark"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script))["main"]()
    assert parsed.value.args == ([],)


def test_absolute_paths_and_the_result_file_are_left_out_of_the_command(modules, monkeypatch):
    flags = ["--images", "/a/photos", "--teacher", "timm:net:/a/w.safetensors", "--from=/a/b", "--at", "http://host/x"]
    monkeypatch.setattr(sys, "argv", ["x.py", "--json", "/a/b.json", *flags, "--rounds", "2"])
    command = modules("report").command_line("/somewhere/scripts/benchmark/x.py")
    flags = "--images photos --teacher timm:net:w.safetensors --from=b --at http://host/x"
    assert command == f"python scripts/benchmark/x.py {flags} --rounds 2"


def test_absolute_paths_are_left_out_of_the_figures(modules, tmp_path):
    report = modules("report")
    figures = {"results": [{"model": "/a/b/model", "rate": 1.5, "shown": ("8 / 9 us", "timm:net:/a/w")}]}
    report.write_report(tmp_path / "out.json", tmp_path / "a/b/x.py", {}, {}, figures)
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found == [{"model": "model", "rate": 1.5, "shown": ["8 / 9 us", "timm:net:w"]}]
