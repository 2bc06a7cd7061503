"""The runner of LLaVA's programs."""

import sys
from types import SimpleNamespace

import pytest

from evotok_plugin.errors import UserError
from evotok_plugin.llava import Program, main


def test_modules_and_scripts_are_parsed(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    assert Program.from_arguments(["-m", "llava.train.train_mem", "-m", "1"]) == Program(
        "llava.train.train_mem", True, ["-m", "1"]
    )
    assert Program.from_arguments([str(script), "--bf16"]) == Program(str(script), False, ["--bf16"])


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local-rank", "1"]])
def test_the_rank_of_a_launcher_goes_to_the_program(rank):
    assert Program.from_arguments([*rank, "-m", "llava.eval", "--x"]).arguments == [*rank, "--x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "got none"), (["-m"], "got none"), (["--bf16"], "got --bf16"), (["absent.py"], "'absent.py' does not exist")],
)
def test_a_missing_program_is_an_error_of_one_line(arguments, message, capsys):
    with pytest.raises(UserError, match=message):
        Program.from_arguments(arguments)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_program_runs_with_the_tower_registered(tmp_path, monkeypatch, capsys):
    encoder = tmp_path / "llava" / "model" / "multimodal_encoder"
    encoder.mkdir(parents=True)
    for folder in (encoder, encoder.parent, encoder.parent.parent):
        (folder / "__init__.py").touch()
    (encoder / "builder.py").write_text("def build_vision_tower(cfg, **kwargs): ...\n")
    program = (
        "import sys\nfrom llava.model.multimodal_encoder.builder import build_vision_tower\n"
        "if __name__ == '__main__': print(type(build_vision_tower).__name__, sys.argv[1:])\n"
    )
    (tmp_path / "llava" / "program.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    try:
        assert main(["-m", "llava.program", "--lr", "1"]) == 0
        assert main([str(tmp_path / "llava" / "program.py"), "x"]) == 0
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
            del sys.modules[name]
    assert capsys.readouterr().out.split("\n")[:2] == ["_TowerBuilder ['--lr', '1']", "_TowerBuilder ['x']"]


def test_without_llava_the_error_is_one_line(monkeypatch, capsys):
    def absent(name, path=None, target=None):
        if name == "llava":
            raise ModuleNotFoundError("No module named 'llava'", name=name)

    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=absent), *sys.meta_path])
    assert main(["-m", "llava.train.train"]) == 2
    assert capsys.readouterr().err.startswith("error: llava is not installed; install the LLaVA")
