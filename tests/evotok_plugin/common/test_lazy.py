"""Packages that are cheap to import and whose classes transformers' Auto classes still find."""

import subprocess
import sys

import pytest

from llava_ext.model_folder import INCLUDED_MODEL


def python(code: str) -> str:
    """Run code in a fresh interpreter; its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_packages_imports_no_large_library():
    code = "import sys, evotok_plugin, llava_ext, eval_tasks; print({'torch', 'transformers'} & set(sys.modules))"
    assert python(code) == "set()"


def test_the_help_of_the_commands_imports_no_large_library():
    for package in ("evotok_plugin", "llava_ext", "eval_tasks"):
        code = (
            f"import sys, contextlib, io\nfrom {package} import cli\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
            "    cli.main(['--help'])\n"
            "print(all(name in out.getvalue() for name in cli.COMMANDS), {'torch', 'transformers'} & set(sys.modules))"
        )
        assert python(code) == "True set()"


@pytest.mark.parametrize(
    "first",
    [
        "import llava_ext",
        "import llava_ext; from transformers import LlavaForConditionalGeneration",
        "from transformers import LlavaForConditionalGeneration; import llava_ext",
        "from transformers import AutoModel; import llava_ext",
        "from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig",
        "from llava_ext import ResidualVocabulary",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(first):
    code = (
        f"{first}\nfrom transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor\n"
        f"folder = {str(INCLUDED_MODEL)!r}\n"
        "config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)\n"
        "tokenizer = AutoModel.from_config(config.vision_config)\n"
        "print(*(type(each).__name__ for each in (config, processor, tokenizer)))"
    )
    assert python(code) == "EvoTokLlavaConfig EvoTokLlavaProcessor EvoTokModel"


@pytest.mark.parametrize("module", ["evotok_plugin.model_folder", "evotok_plugin.encoder", "llava_ext.model_folder"])
def test_any_module_can_be_the_first_import_after_both_packages(module):
    assert python(f"import evotok_plugin, llava_ext, {module}\nprint('imported')") == "imported"


def test_public_names_are_listed_and_unknown_ones_are_attribute_errors():
    import evotok_plugin
    import llava_ext

    for package in (evotok_plugin, llava_ext):
        assert set(package.__all__) <= set(dir(package))
        assert all(getattr(package, name).__name__ == name for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


def test_modules_keep_their_own_loaders():
    code = (
        "import evotok_plugin, inspect\nimport transformers.models.auto.configuration_auto as auto\n"
        "print(type(auto.__spec__.loader).__name__, 'class AutoConfig' in inspect.getsource(auto))"
    )
    assert python(code) == "SourceFileLoader True"


def test_drawing_on_the_command_line_does_not_import_torchvision(tmp_path):
    code = (
        "import sys\nfrom llava_ext.cli import main\n"
        f"code = main(['draw', 'a red circle', '-o', {str(tmp_path)!r}])\n"
        "print(code, 'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "0 True False"
    assert list(tmp_path.glob("*.png"))
