"""The journal of a search: scores that are kept, so that the same command resumes after an interruption."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evotok_plugin.common.files import write_text, writing
from evotok_plugin.common.foreign_files import read_text
from evotok_plugin.errors import UserError
from llava_ext.generation.options import to_entry
from llava_ext.tuning.candidates import Candidate

_KIND = "evotok-llava tune-sampling"


@dataclass(frozen=True)
class Identity:
    """Everything besides the settings that the scores of a search depend on.

    Attributes:
        weights: fingerprint of the model's files except its generation_config.json.
        prompts: fingerprint of the prompts and their skills.
        judge: weights of the rewards by name.
        seed: of the first image.
    """

    weights: str
    prompts: str
    judge: dict[str, float]
    seed: int


@dataclass
class Journal:
    """Scores by settings, in a JSON Lines file: a header with the identity of the search, then one line per batch."""

    path: Path
    identity: Identity
    _lines: list[str] = field(default_factory=list)
    _scores: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, identity: Identity) -> "Journal":
        """Read a journal, or start a new one if the file does not exist.

        Raises:
            UserError: the file is not a journal or cannot be read, or it belongs to another search.
        """
        journal = cls(path, identity)
        if path.exists():
            journal._read()
        return journal

    def scores(self, candidate: Candidate) -> list[float]:
        """The kept scores of a candidate's first images."""
        return list(self._scores.get(_key(candidate), ()))

    def append(self, candidate: Candidate, scores: Sequence[float]) -> None:
        """Keep the scores of a candidate's next images.

        Raises:
            UserError: the file cannot be written.
        """
        known = self._scores.setdefault(_key(candidate), [])
        row = {"settings": to_entry(candidate.options), "first": len(known), "scores": list(scores)}
        known.extend(scores)
        self._lines.append(json.dumps(row))
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"journal": _KIND, **asdict(self.identity)})
        write_text(self.path, "".join(f"{line}\n" for line in (header, *self._lines)))

    def _read(self) -> None:
        another = "name another file with --journal"
        try:
            header, *lines = read_text(self.path).splitlines() or [""]
            found = json.loads(header)
            if not isinstance(found, dict) or found.pop("journal", None) != _KIND:
                raise ValueError("its first line is not the header of one")
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is not a journal of tune-sampling ({error}); {another}") from error
        wanted = asdict(self.identity)
        if differing := [name for name in wanted if found.get(name) != wanted[name]]:
            raise UserError(
                f"journal {self.path} belongs to a search with another value of {', '.join(differing)}; {another}"
            )
        for line, row in zip(lines, rows, strict=True):
            self._add(line, row)

    def _add(self, line: str, row: Any) -> None:
        try:
            known = self._scores.setdefault(json.dumps(row["settings"], sort_keys=True), [])
            if row["first"] != len(known):
                raise ValueError(f"expected scores from image {len(known)}, got {row['first']}")
            known.extend(map(float, row["scores"]))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"journal {self.path} is damaged ({error}): {line:.80}; delete it") from error
        self._lines.append(line)


def _key(candidate: Candidate) -> str:
    return json.dumps(to_entry(candidate.options), sort_keys=True)
