"""The layout of the repository, read from the syntax trees: directions and cycles of imports, private names, sizes of
files, and tests that mirror the packages."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("evotok_plugin", "llava_ext", "eval_tasks")  # a package imports from those before it
MAX_LINES = 450


@cache
def modules() -> dict[str, Path]:
    """The product's modules by their dotted names."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _statements(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING:`, which are not executed."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _statements(node)


@cache
def imports(module: str) -> frozenset[tuple[str, str]]:
    """(module, name) pairs that a module imports from the product, also inside functions; name is "" for a module."""
    found = set()
    for node in _statements(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name in modules()}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules():
                    found.add((whole, ""))
                elif node.module in modules():
                    found.add((node.module, alias.name))
    return frozenset(found)


def test_imports_point_one_way():
    for module in modules():
        allowed = PACKAGES[: PACKAGES.index(module.split(".")[0]) + 1]
        for target, _ in imports(module):
            assert target.split(".")[0] in allowed, f"{module} imports {target}"


@pytest.mark.parametrize("package", PACKAGES)
def test_only_command_lines_import_commands(package):
    for module in modules():
        parts = module.split(".")
        if parts[0] != package or parts[1:2] in (["cli"], ["commands"]):
            continue
        for target, _ in imports(module):
            assert target.split(".")[1:2] not in (["cli"], ["commands"]), f"{module} imports {target}"


def test_common_tools_import_only_each_other():
    for module in modules():
        if module.startswith("evotok_plugin.common"):
            for target, _ in imports(module):
                assert target.startswith(("evotok_plugin.common", "evotok_plugin.errors")), f"{module} imports {target}"


def test_there_is_no_import_cycle():
    graph = {module: {target for target, _ in imports(module)} - {module} for module in modules()}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    on_cycles = [m for m in graph if _reaches(graph, m, m)]
    assert on_cycles == []


def _reaches(graph: dict[str, set[str]], start: str, goal: str) -> bool:
    seen, pending = set(), list(graph[start] & graph.keys())
    while pending:
        module = pending.pop()
        if module == goal:
            return True
        if module not in seen:
            seen.add(module)
            pending += graph[module] & graph.keys()
    return False


def test_private_names_stay_in_their_module():
    for module in modules():
        private = [f"{target}.{name}" for target, name in imports(module) if name.startswith("_")]
        assert private == [], module


def test_no_file_is_too_long():
    too_long = {
        str(path.relative_to(ROOT)): count for path in modules().values() if (count := _lines(path)) > MAX_LINES
    }
    assert too_long == {}


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_task_is_one_folder_with_its_yaml_and_its_python():
    tasks = [path for path in (ROOT / "eval_tasks" / "tasks").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert tasks
    for task in tasks:
        assert list(task.glob("*.yaml")) and (task / "task.py").is_file() and (task / "__init__.py").is_file(), task


def test_the_tests_mirror_the_packages():
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder == Path("interop"):  # other code bases
            continue
        assert folder == Path(".") or (ROOT / folder).is_dir(), f"{path} does not mirror a folder of a package"


def test_every_module_and_package_has_a_docstring():
    for module, path in modules().items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"
