"""Bundles of source files for model folders that transformers opens with `trust_remote_code=True`.

transformers copies the module that `auto_map` names, and the files that it imports relatively, out of one flat folder.
A bundle therefore has one file per module of this project that the named classes need, `a.b.c` as `a_b_c.py`, with
relative imports. One more file imports all classes: transformers loads each file that `auto_map` names as a package of
its own, in which the same class would exist again.
"""

import ast
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

_HEADER = "# Generated from {module}; part of EvoTok, which this folder does not need.\n"


def bundle(entry: str, classes: Mapping[str, str], packages: Iterable[str] = ("evotok_plugin",)) -> dict[str, str]:
    """The files of a bundle: source text by file name.

    Args:
        entry: name of the module that `auto_map` names.
        classes: the module that defines each class, by the name of the class.
        packages: the packages whose modules are included; all other imports stay as they are.

    Raises:
        ValueError: a module has no source file, or imports another in a form that a flat folder cannot have.
    """
    known, files = tuple(packages), dict[str, str]()
    waiting = list(classes.values())
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in files:
            continue
        source = _source_file(module)
        if source is None:
            raise ValueError(f"module {module} has no source file")
        text, needed = _relative(source.read_text(encoding="utf-8"), module, known)
        files[name] = _HEADER.format(module=module) + text
        waiting += needed
    files[f"{entry}.py"] = _entry(classes, files)
    return files


def _entry(classes: Mapping[str, str], files: Iterable[str]) -> str:
    lines = ['"""The classes of this folder, for transformers: see `auto_map` in config.json."""', ""]
    lines += ["from typing import TYPE_CHECKING", ""]
    lines += [f"from .{_flat(module)} import {name}" for name, module in classes.items()]
    lines += ["", "if TYPE_CHECKING:  # transformers 4 copies only the files that are named here"]
    lines += [f"    from .{Path(file).stem} import __name__ as _{number}" for number, file in enumerate(sorted(files))]
    # save_pretrained copies the file that a class says it is defined in, with all that this file imports.
    lines += ["", f"for _class in ({', '.join(classes)},):", "    _class.__module__ = __name__", ""]
    return "\n".join(lines)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _source_file(module: str) -> Path | None:
    """Find the source file of a module without importing it; None if the module does not exist."""
    package, *inside = module.split(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*inside)
    files = (path.with_name(f"{path.name}.py") if inside else path, path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _relative(source: str, module: str, packages: tuple[str, ...]) -> tuple[str, list[str]]:
    """The source with relative imports, and the modules of the project that it imports."""
    lines, needed = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            inside = [alias.name for alias in node.names if alias.name.split(".")[0] in packages]
            if inside:
                raise ValueError(
                    f"{module} imports {inside[0]} as a whole; a bundle needs `from {inside[0]} import ...`"
                )
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in packages:
            continue
        origins = [(alias, *_origin(str(node.module), alias.name)) for alias in node.names]
        needed += [origin for _, origin, _ in origins]
        indent = lines[node.lineno - 1][: node.col_offset]
        statements = [
            f"{indent}from {'.' + _flat(origin) if name else '.'} import {name or _flat(origin)}"
            + (f" as {alias.asname or alias.name}" if alias.asname or not name else "")
            for alias, origin, name in origins
        ]
        # transformers finds files by the pattern `from .NAME import`, which an import of a whole module lacks.
        statements += [f"{indent}from .{_flat(o)} import __name__ as _{_flat(o)}" for _, o, name in origins if not name]
        last = node.end_lineno or node.lineno
        lines[node.lineno - 1 : last] = ["\n".join(statements) + "\n", *[""] * (last - node.lineno)]
    return "".join(lines), needed


def _origin(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name, and the name there; the name is empty if it is itself a module."""
    if _source_file(f"{module}.{name}") is not None:
        return f"{module}.{name}", ""
    spec = find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        return module, name
    return getattr(import_module(module), name).__module__, name  # packages import their public names on first use
