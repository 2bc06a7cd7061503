"""Packages that are fast to import: public names are imported on first use, and classes are registered with
transformers' Auto classes only when these are imported."""

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from evotok_plugin.common.requirements import missing_models, require_models

_AUTO = "transformers.models.auto.configuration_auto"  # part of every use of an Auto class


def lazy_package(
    package: str, names: Mapping[str, str], registering: Sequence[str], light: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports its public names on first use (PEP 562).

    The modules of `registering` register their classes with transformers' Auto classes when they are executed. All of
    them are imported as soon as one of the public names or an Auto class is used, so that
    `import evotok_plugin; AutoModel.from_pretrained(...)` works whatever is imported first.

    Args:
        names: by public name, the module below the package that defines it.
        registering: modules below the package.
        light: modules below the package that also work without the extra `models`, next to another version of
            transformers; nothing is registered then.
    """

    def register() -> None:
        if missing_models() is None:
            for module in registering:
                import_module(f"{package}.{module}")

    def get(name: str) -> Any:
        if name not in names:
            if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
                return import_module(f"{package}.{name}")  # as in `import evotok_plugin; evotok_plugin.encoder`
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if names[name] not in light:
            require_models(f"{package}.{name}")
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
    """Watches imports of transformers and of our packages, and registers as soon as the Auto classes are imported.

    It waits for the outermost of these imports, in all threads: the modules that register their classes import from all
    of these packages, and must not find modules that are only partly executed. For the same reason there is one watcher
    for all packages.
    """

    def __init__(self) -> None:
        self._register: dict[str, Callable[[], None]] = {}  # by package
        self._lock, self._num_running = threading.Lock(), 0  # modules that are being executed, in all threads

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
        with self._lock:
            self._num_running += 1
        try:
            loader.exec_module(module)
        finally:
            with self._lock:
                self._num_running -= 1
        if self._is_due():
            for register in list(self._register.values()):
                register()

    def _is_due(self) -> bool:
        """Whether to register now; True only once."""
        with self._lock:
            if self._num_running or _AUTO not in sys.modules or self not in sys.meta_path:
                return False
            sys.meta_path.remove(self)
            return True


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
