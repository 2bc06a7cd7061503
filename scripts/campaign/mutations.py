"""Seeded damage to files: what interrupted copies, other programs and hostile senders do to them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Mutation = Callable[[Path, np.random.Generator], None]

HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 14458342\n"
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "1",
    "../../etc/passwd", "/", "a\nb", "\ud800", "\x00", [], [None], [1, "a"], {}, {"a": 1}, [[[]]], "none", "cuda",
)  # fmt: skip


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # the file may be a hard link to the original
    path.write_bytes(content)


# Any file ----------------------------------------------------------------------------------------------------


def empty(path: Path, rng: np.random.Generator) -> None:
    _replace(path, b"")


def zeros(path: Path, rng: np.random.Generator) -> None:
    _replace(path, bytes(path.stat().st_size))


def web_page(path: Path, rng: np.random.Generator) -> None:
    _replace(path, HTML)


def lfs_pointer(path: Path, rng: np.random.Generator) -> None:
    _replace(path, LFS)


def truncated(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    _replace(path, content[: int(rng.integers(len(content) + 1))])


def zero_tail(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    keep = int(rng.integers(len(content) + 1))
    _replace(path, content[:keep] + bytes(len(content) - keep))


def flipped(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    near = len(content) if rng.random() < 0.5 else min(len(content), 512)  # half of the damage hits headers
    for place in rng.integers(max(near, 1), size=int(rng.integers(1, 9))):
        if content:
            content[int(place) % len(content)] ^= 1 << int(rng.integers(8))
    _replace(path, bytes(content))


def noise(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    start, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 64))
    _replace(path, content[:start] + rng.bytes(length) + content[start + length * int(rng.integers(2)) :])


def cut_out(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    start, end = sorted(int(place) for place in rng.integers(len(content) + 1, size=2))
    _replace(path, content[:start] + content[end:])


def repeated(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    start, end = sorted(int(place) for place in rng.integers(len(content) + 1, size=2))
    _replace(path, content[:end] + content[start:])


def missing(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def folder_instead(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling_link(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(path.name)


ANY_FILE: tuple[Mutation, ...] = (
    empty, zeros, web_page, lfs_pointer, truncated, truncated, zero_tail, flipped, flipped, flipped, noise, cut_out,
    repeated, missing, folder_instead, pipe, dangling_link, link_to_itself,
)  # fmt: skip


# Text --------------------------------------------------------------------------------------------------------


def utf_16(path: Path, rng: np.random.Generator) -> None:
    _replace(path, path.read_bytes().decode(errors="replace").encode("utf-16"))


def byte_order_mark(path: Path, rng: np.random.Generator) -> None:
    _replace(path, b"\xef\xbb\xbf" + path.read_bytes())


def not_unicode(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    place = int(rng.integers(len(content) + 1))
    _replace(path, content[:place] + b"\xff\xfe\xc0" + content[place:])


def deep(path: Path, rng: np.random.Generator) -> None:
    _replace(path, rng.choice([b"[", b'{"a":']) * 100_000)


def open_string(path: Path, rng: np.random.Generator) -> None:
    _replace(path, b'[{"id": "' + b'\\"' * 200_000)


TEXT: tuple[Mutation, ...] = (*ANY_FILE, utf_16, byte_order_mark, not_unicode, deep, open_string)


# JSON and YAML -----------------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) pairs in nested lists and mappings."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in ((value, key), *_places(value[key]))]


def _changed(value: Any, rng: np.random.Generator) -> Any:
    """The value with one place replaced, removed or renamed."""
    places = _places(value)
    if not places or rng.random() < 0.05:
        return VALUES[int(rng.integers(len(VALUES)))]
    container, key = places[int(rng.integers(min(len(places), 40 if rng.random() < 0.7 else len(places))))]
    action = rng.random()
    if action < 0.7:
        container[key] = VALUES[int(rng.integers(len(VALUES)))]
    elif action < 0.85:
        del container[key]
    elif isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container.append(container[key])
    return value


def json_value(path: Path, rng: np.random.Generator) -> None:
    _replace(path, json.dumps(_changed(json.loads(path.read_bytes()), rng)).encode())


def json_line(path: Path, rng: np.random.Generator) -> None:
    lines = path.read_text().splitlines()
    number = int(rng.integers(len(lines)))
    lines[number] = json.dumps(_changed(json.loads(lines[number]), rng))
    _replace(path, "\n".join(lines).encode())


def yaml_value(path: Path, rng: np.random.Generator) -> None:
    value = _changed(yaml.safe_load(path.read_text()), rng)
    _replace(path, yaml.safe_dump(value, allow_unicode=False).encode(errors="surrogatepass"))


def yaml_bomb(path: Path, rng: np.random.Generator) -> None:
    name = str(rng.choice(list(yaml.safe_load(path.read_text()))))
    levels = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 10))
    _replace(path, f"b0: &b0 [x, x, x]\n{levels}{name}: *b9\n".encode())


def yaml_line(path: Path, rng: np.random.Generator) -> None:
    lines = path.read_text().splitlines()
    odd = (
        "seed: !!python/object/apply:os.system [true]", "seed: &a [*a]", "? [1]\n: 2", "2026-99-99: 1", "seed: 1_0:99",
        "<<: 1", "<<: [1]", "!!float x", "--- a\n--- b", "\t- x", "seed: *nothing", "seed: !x 1", lines[0],
        "seed: !!binary '=='", "seed: !!timestamp 2026-13-41",
    )  # fmt: skip
    lines.insert(int(rng.integers(len(lines) + 1)), odd[int(rng.integers(len(odd)))])
    _replace(path, "\n".join(lines).encode())


JSON: tuple[Mutation, ...] = (*TEXT, *[json_value] * 20)
JSON_LINES: tuple[Mutation, ...] = (*TEXT, *[json_line] * 20)
YAML: tuple[Mutation, ...] = (*TEXT, *[yaml_value] * 20, *[yaml_line] * 6, yaml_bomb)


# Tensors -----------------------------------------------------------------------------------------------------


def tensor_header(path: Path, rng: np.random.Generator) -> None:
    """Change the header of a safetensors file: names, types, shapes or offsets."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(_changed(json.loads(content[8 : 8 + length]), rng)).encode()
    _replace(path, len(header).to_bytes(8, "little") + header + content[8 + length :])


def tensor_values(path: Path, rng: np.random.Generator) -> None:
    """Replace one tensor: another type or shape, NaN, zeros, or none at all."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = list(tensors)[int(rng.integers(len(tensors)))]
    value = tensors.pop(name)
    made = (
        None, value.flatten(), value[..., None], value.double(), value.int(), value.bool(), torch.zeros_like(value),
        torch.zeros(0), value.half() if value.is_floating_point() else value.float(),
        torch.full(value.shape, float("nan")), torch.zeros(3, 5),
    )[int(rng.integers(11))]  # fmt: skip
    if made is not None:
        tensors[name] = made.contiguous().clone()
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


TENSORS: tuple[Mutation, ...] = (*ANY_FILE, *[tensor_header] * 6, *[tensor_values] * 6)


def mutations_of(path: Path) -> tuple[Mutation, ...]:
    """The damage that fits the kind of a file."""
    return {
        ".json": JSON, ".jsonl": JSON_LINES, ".yaml": YAML, ".jinja": TEXT, ".txt": TEXT, ".csv": TEXT,
        ".safetensors": TENSORS,
    }.get(path.suffix, ANY_FILE)  # fmt: skip
