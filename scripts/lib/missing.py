"""Print what an environment lacks for extras of the project, one requirement a line: `python missing.py train eval`."""

import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def missing(extras: set[str]) -> list[str]:
    """Requirements of the extras of the installed project that the environment does not satisfy."""
    try:
        texts = distribution("evotok").requires or []
    except PackageNotFoundError:
        return ["evotok"]
    package = find_spec("evotok_plugin")
    if package is None or package.origin is None or REPOSITORY not in Path(package.origin).resolve().parents:
        return [f"evotok of this checkout (it has {None if package is None else package.origin})"]
    requirement = _requirement_class()
    requirements = [requirement(text) for text in texts]
    found, todo = set(), {"", *extras}
    while todo - found:
        extra = (todo - found).pop()
        found.add(extra)
        for one in requirements:
            if one.name == "evotok" and one.marker and one.marker.evaluate({"extra": extra}):
                todo |= one.extras
    lacking = []
    for one in requirements:
        applies = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in found)
        if applies and one.name != "evotok" and not _is_satisfied(one):
            lacking.append(f"{one.name}{one.specifier}")
    return lacking


def _requirement_class():
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip contains a copy
        from pip._vendor.packaging.requirements import Requirement
    return Requirement


def _is_satisfied(requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    print("\n".join(missing(set(sys.argv[1:]))))
