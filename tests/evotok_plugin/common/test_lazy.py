"""Packages that are cheap to import and whose classes transformers' Auto classes still find."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

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
        assert package.cli.__name__ == f"{package.__name__}.cli"  # a module that nothing has imported yet
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["evotok_plugin", "llava_ext"])
def test_the_lists_of_public_names_agree(package):
    """`__all__`, the imports for type checkers, and the table of lazy imports."""
    path = Path(importlib.import_module(package).__file__)
    body = ast.parse(path.read_text()).body
    stubs = next(node.body for node in body if isinstance(node, ast.If))
    modules = {alias.name: node.module for node in stubs for alias in node.names if alias.asname is None}
    assigned = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    _, table = assigned["(__getattr__, __dir__)"].args
    assert ast.literal_eval(assigned["__all__"]) == sorted(modules)
    assert {name: f"{package}.{module}" for name, module in ast.literal_eval(table).items()} == modules
    for name, module in modules.items():
        assert getattr(importlib.import_module(package), name) is getattr(importlib.import_module(module), name)


def test_classes_can_be_unpickled_before_anything_is_imported():
    """As in a process that multiprocessing has spawned."""
    code = (
        "import pickle, multiprocessing\nfrom evotok_plugin import EvoTokConfig\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(EvoTokConfig.preset, ('tiny',)).image_size)"
    )
    assert python(code) == "48"


def test_a_package_and_its_modules_can_be_reloaded():
    code = (
        "import importlib, evotok_plugin, evotok_plugin.errors\n"
        "importlib.reload(evotok_plugin); importlib.reload(evotok_plugin.errors)\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('evotok').image_size, importlib.reload(evotok_plugin).EvoTokConfig.model_type)"
    )
    assert python(code) == "256 evotok"


def test_several_threads_can_import_at_the_same_time():
    code = (
        "import evotok_plugin, threading\nfrom importlib import import_module\n"
        "names = ['transformers.models.auto.modeling_auto', 'evotok_plugin.quantizer',\n"
        "         'transformers.models.auto.configuration_auto']\n"
        "failed = []\n"
        "threading.excepthook = failed.append\n"
        "threads = [threading.Thread(target=import_module, args=[name]) for name in names]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('evotok').image_size, failed)"
    )
    assert python(code) == "256 []"


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
