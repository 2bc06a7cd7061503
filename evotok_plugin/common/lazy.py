"""Packages whose import is cheap: public names that are imported on first use, and registration with transformers' Auto
classes that waits until these are in use."""

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"  # part of every use of an Auto class


def lazy_package(
    package: str, names: Mapping[str, str], registering: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports its public names on first use (PEP 562).

    The modules of `registering` register their classes with transformers' Auto classes when they are executed. All of
    them are imported as soon as one of the public names or an Auto class is used, so that
    `import evotok_plugin; AutoModel.from_pretrained(...)` works whatever is imported first.

    Args:
        names: by public name, the module below the package that defines it.
        registering: modules below the package.
    """

    def register() -> None:
        for module in registering:
            import_module(f"{package}.{module}")

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        register()
        value = getattr(import_module(f"{package}.{names[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    if _AUTO in sys.modules:
        register()
    else:
        _auto_classes.watch(package, register)
    return get, lambda: sorted({*vars(sys.modules[package]), *names})


class _AutoClasses(importlib.abc.MetaPathFinder):
    """Watches imports of transformers and of our packages, and registers once the Auto classes are there.

    It acts after the outermost of these imports, because the modules that register import from all of them, and would
    find modules that are half executed. For the same reason there is one watcher for all packages.
    """

    def __init__(self) -> None:
        self._register: dict[str, Callable[[], None]] = {}  # by package
        self._nesting = threading.local()

    def watch(self, package: str, register: Callable[[], None]) -> None:
        self._register[package] = register
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        watched = tuple(f"{package}." for package in ("transformers", *self._register))
        if not fullname.startswith(watched) or self not in sys.meta_path:
            return None
        following = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in following)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec

    def execute(self, loader: Any, module: ModuleType) -> None:
        """Execute a module by its own loader, then register if this was the outermost import."""
        depth = getattr(self._nesting, "depth", 0)
        self._nesting.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._nesting.depth = depth
        if depth == 0 and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            for register in self._register.values():
                register()


class _Watched(importlib.abc.Loader):
    """A module's loader that reports to the finder."""

    def __init__(self, loader: Any, finder: _AutoClasses) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # used by inspect and importlib.resources
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._finder.execute(self._loader, module)


_auto_classes = _AutoClasses()
