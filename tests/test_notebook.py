"""The notebook in `examples/`: stored without outputs, and executed by a kernel as a reader does it."""

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs Jupyter: pip install 'evotok[test]'")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "play.ipynb"
SECONDS = 60  # limit of a cell; on two idle cores the first takes 5 seconds, the others less than one


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def test_its_links_exist(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_its_cells_run_and_show_what_they_announce(notebook, tmp_path):
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []
    answers = [" ".join(line.split()[-1:]) for line in printed.splitlines() if "? " in line]
    assert answers == ["two", "red", "above", "place."] and "I only know scenes" in printed
    assert len(re.findall(r"^ +[0-8] ( [ \d]\d){8}$", printed, re.M)) == 9  # the codes of 9 positions
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
