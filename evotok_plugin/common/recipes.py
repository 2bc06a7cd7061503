"""Recipes: a typed dataclass is the schema, a YAML file has the settings of a run, command-line flags override them."""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from evotok_plugin.common.command_parser import describe_default
from evotok_plugin.common.files import write_text
from evotok_plugin.common.foreign_files import decoded, describe_error, read_bytes
from evotok_plugin.errors import UserError

T = TypeVar("T")
_LARGEST_RECIPE = 1 << 20  # bytes
_MOST_VALUES = 100_000
LARGEST_COUNT = 2**31  # beyond every useful size of a batch or a sequence
_NOUNS = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping", list: "a list"
}  # fmt: skip
_METAVARS = {int: "N", float: "NUMBER", dict: "MAPPING"}

MERGED = "merged"  # key in the metadata of a mapping: keys that the overrides leave out keep the recipe's values
REQUIRED = "required"  # key in the metadata of a field that a recipe or a flag must set; the program checks that


def recipes_folder(package: str) -> Path:
    """The folder of the recipes in a package."""
    return Path(str(files(package))) / "recipes"


def _recipe_names(package: str) -> str:
    return ", ".join(sorted(recipe.stem for recipe in recipes_folder(package).glob("*.yaml"))) or "(none installed)"


def recipe_help(package: str) -> str:
    """The help of a flag that names a recipe of a package."""
    return f"YAML file, or the name of a recipe of the project: {_recipe_names(package)}"


def _known_names(schema: type) -> list[str]:
    return [field.name for field in dataclasses.fields(schema) if field.init]


def find_recipe(name_or_path: str | Path, package: str) -> Path:
    """The path of a recipe, given as a YAML file or as the name of a recipe of the package.

    Raises:
        UserError: the recipe does not exist; the message lists the names of the package's recipes.
    """
    path, folder = Path(name_or_path), recipes_folder(package)
    names = _recipe_names(package)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"recipe {str(path)!r} does not exist; give a YAML file or one of: {names}")
    named = folder / f"{name_or_path}.yaml"
    if not named.is_file():
        raise UserError(f"unknown recipe {str(name_or_path)!r}; expected a YAML file or one of: {names}")
    return named


def check_keys(values: dict[str, Any], schema: type, source: str) -> None:
    """Reject unknown keys, suggesting the nearest known one.

    Raises:
        UserError: a key of `values` is not a field of `schema`.
    """
    known = _known_names(schema)
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{source}: expected names of settings as keys, got {key!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise UserError(f"{source}: unknown key {key!r}{hint}")


def reject_unknown_flags(rest: Sequence[str], known: Iterable[str]) -> None:
    """Reject the arguments that `parse_known_args` did not recognize, suggesting the nearest known flag.

    Args:
        known: the flags of the command, with their dashes.

    Raises:
        UserError: there are such arguments.
    """
    if not rest:
        return
    unknown = next((argument for argument in rest if argument.startswith("-")), rest[0])
    name = unknown.split("=")[0]
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6) if name.startswith("--") else []
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
    raise UserError(f"unrecognized arguments: {unknown}{hint}")


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a parser."""
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def load_recipe(path_or_name: str | Path | None, schema: type[T], overrides: dict[str, Any] | None = None) -> T:
    """Build `schema` from a YAML recipe (a file, or the name of a recipe of the package); `overrides` take precedence.

    Of a mapping with `MERGED`, such as a tokenizer's `model`, only the keys that the overrides contain are replaced.

    Raises:
        UserError: the recipe does not exist or is not a YAML mapping, a key is unknown, or a value has a wrong type.
    """
    return schema(**recipe_values(path_or_name, schema, overrides))


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe file, whose names and types are not checked yet; none if the file is empty.

    Raises:
        UserError: the file cannot be read or is not a YAML mapping.
    """
    try:
        loaded = parse_yaml(decoded(read_bytes(path, _LARGEST_RECIPE)))
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}; change its permissions") from error
    except Exception as error:  # PyYAML raises errors of many types for malformed dates, numbers and tags
        raise UserError(f"recipe {path}: not valid YAML: {describe_error(error)}; write 'key: value' lines") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"recipe {path}: expected 'key: value' lines, got a {type(loaded).__name__}")
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which only the last would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1 and key != "<<":
                raise UserError(f"the key {key!r} occurs {count} times; keep one")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        UserError: a duplicate key, or aliases that contain themselves or unfold to too many values.
        Exception: errors of many types, if the text is not valid YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The number of values that a node unfolds to; `known` has the numbers of nodes, None while one is counted."""
    if id(node) in known:
        number = known[id(node)]
        if number is None:
            raise UserError("an alias contains itself; write the value out")
        return number
    known[id(node)] = None
    number = 1
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for one in child if isinstance(child, tuple) else (child,):
            number += _count_values(one, known)
            if number > _MOST_VALUES:
                raise UserError(f"its aliases unfold to more than {_MOST_VALUES} values; write them out")
    known[id(node)] = number
    return number


def recipe_values(
    path_or_name: str | Path | None, schema: type, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The keyword arguments that `load_recipe` passes to `schema`.

    A field with `REQUIRED` has an empty default instead of an Optional type; null leaves it at that.
    """
    values: dict[str, Any] = {}
    loaded: dict[str, Any] = {}
    source = ""
    if path_or_name is not None:
        path = find_recipe(path_or_name, schema.__module__.partition(".")[0])
        loaded = read_recipe(path)
        source = f"recipe {path}: "
        check_keys(loaded, schema, f"recipe {path}")
        values.update(loaded)
    values.update(overrides or {})
    check_keys(values, schema, "command line")
    hints = typing.get_type_hints(schema)
    required = {field.name for field in dataclasses.fields(schema) if field.metadata.get(REQUIRED)}
    given = {key: value for key, value in values.items() if value is not None or key not in required}
    own = set(overrides or {})
    coerced = {key: _coerce(value, hints[key], key if key in own else source + key) for key, value in given.items()}
    merged = {field.name for field in dataclasses.fields(schema) if field.metadata.get(MERGED)}
    for key in own & set(loaded) & merged:
        if isinstance(loaded[key], dict) and isinstance(coerced.get(key), dict):
            coerced[key] = {**loaded[key], **coerced[key]}
    return coerced


def check_seed(seed: int, bits: int = 62) -> None:
    """Check that every random number generator accepts a seed.

    Raises:
        UserError: the seed is negative or has more than `bits` bits.
    """
    if not 0 <= seed < 2**bits:
        raise UserError(f"seed must be from 0 to 2**{bits} - 1, got {seed}")


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise UserError(f"expected true or false, got {value!r}") from None


def parse_mapping(value: Any) -> dict:
    """A mapping; on the command line it is written as YAML: `--model '{image_size: 64}'`.

    Raises:
        UserError: the value is not a mapping.
    """
    try:
        parsed = parse_yaml(value) if isinstance(value, str) else value
    except Exception:  # PyYAML raises errors of many types, see `read_recipe`
        parsed = None
    if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
        raise UserError(f"expected a mapping such as '{{image_size: 64}}', got {value!r}")
    return parsed


def _plain_type(hint: Any) -> Any:
    """The type inside an Optional, otherwise the hint itself."""
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    is_union = type(None) in typing.get_args(hint)
    return inner[0] if is_union and inner else hint


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Convert a value to the type of its field: YAML reads `1e-3` as a string, and flags are strings."""
    kind = _plain_type(hint)
    # On the command line, `none` is None, except for a field that is a string (`--report_to none`).
    says_none = isinstance(value, str) and value.lower() == "none" and str not in typing.get_args(hint)
    if value is None or (says_none and type(None) in typing.get_args(hint)):
        if type(None) not in typing.get_args(hint):
            raise UserError(f"{key}: expected a {getattr(kind, '__name__', kind)}, got nothing")
        return None
    try:
        if kind is bool:
            return _parse_bool(value)
        if kind is int and not isinstance(value, bool):
            if isinstance(value, float) and not value.is_integer():
                raise UserError(f"expected a whole number, got {value}")
            return int(value)
        if kind is float and not isinstance(value, bool):
            if math.isnan(number := float(value)):
                raise UserError(f"expected a number, got {value}")
            return number
        if kind is str and isinstance(value, (str, int, float)):
            return str(value)
        if dict in (kind, typing.get_origin(kind)) and str not in typing.get_args(hint):
            return parse_mapping(value)
        if typing.get_origin(kind) is list and (hint == kind or str not in typing.get_args(hint)):
            several = value if isinstance(value, (list, tuple)) else [value]
            return [_coerce(one, typing.get_args(kind)[0], key) for one in several]
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not any(_is_of_type(value, option) for option in options):
        nouns = [_NOUNS[option] for option in map(_class_of, options) if option in _NOUNS]
        raise UserError(f"{key}: expected {' or '.join(nouns) or kind}, got {value!r}")
    return value


def _class_of(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _is_of_type(value: Any, hint: Any) -> bool:
    kind = _class_of(hint)
    if kind is typing.Literal:
        return value in typing.get_args(hint)
    if not isinstance(kind, type):  # Any
        return True
    return isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))


def add_arguments(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup",
    schema: type,
    names: Sequence[str] | None = None,
    values: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Add one `--field` per field of `schema`, absent from the result unless given; `--bf16` alone means true.

    Args:
        names: the fields to add, in this order; by default all.
        values: the settings of a recipe, which the help shows instead of the defaults of the schema.
        texts: the help of fields by name, instead of that in their metadata; `argparse.SUPPRESS` hides a field.
    """
    hints = typing.get_type_hints(schema)
    known = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for field in [known[name] for name in (known if names is None else names)]:
        kind = _plain_type(hints[field.name])
        text = (texts or {}).get(field.name, field.metadata.get("help", ""))
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _with_default(text, field, values or {})}
        if kind is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
        else:
            options |= {"metavar": _METAVARS.get(kind, "VALUE")}
        if typing.get_origin(kind) in (list, tuple) or kind in (list, tuple):
            options |= {"nargs": "+"}
        parser.add_argument(f"--{field.name}", **options)


def _with_default(text: str, field: "dataclasses.Field[Any]", values: Mapping[str, Any]) -> str:
    """The help of a field with its default, or with its value in a recipe."""
    if text == argparse.SUPPRESS:
        return text
    if field.name in values:
        return f"{text} (recipe: {_escaped(values[field.name])})"
    if field.metadata.get(REQUIRED) or field.default is field.default_factory is dataclasses.MISSING:
        return f"{text} (required)"
    if "default" in text:
        return text
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"{text} (default: {_escaped(default)})"


def _escaped(value: Any) -> str:
    return describe_default(value).replace("%", "%%")  # argparse formats the help


def as_plain(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as values that YAML can represent."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in ((name, getattr(instance, name)) for name in _known_names(type(instance)))
    }


def save_resolved(instance: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_recipe` reads."""
    write_text(path, yaml.safe_dump(as_plain(instance), sort_keys=False))
