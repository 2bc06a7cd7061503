"""Parser of GenEval's prompts: from a text of its templates to the record that judges it."""

import re
from typing import Any

from eval_tasks.judging.vocabulary import CLASSES, COLORS
from eval_tasks.tasks.geneval.prompts import NUMBERS, POSITIONS, article, plural
from evotok_plugin.errors import UserError

_PREFIX = "a photo of "
_COUNTS = {name: count for count, name in NUMBERS.items()}
_SINGULAR = {plural(label): label for label in CLASSES}
_COUNTED = re.compile(rf"(?P<number>{'|'.join(_COUNTS)}) (?P<label>{'|'.join(_SINGULAR)})")
_OBJECT = re.compile(rf"an? (?:(?P<color>{'|'.join(COLORS)}) )?(?P<label>{'|'.join(CLASSES)})")
_LINK = re.compile(rf" (and|{'|'.join(POSITIONS)}) ")


def parse_prompt(text: str) -> dict[str, Any]:
    """Parse a prompt of one of GenEval's templates into its record, as in `geneval_records`.

    Raises:
        UserError: the text is not such a prompt.
    """
    if not text.startswith(_PREFIX):
        raise _not_understood(text)
    plain = text.removeprefix(_PREFIX)
    if counted := _COUNTED.fullmatch(plain):
        label, count = _SINGULAR[counted["label"]], _COUNTS[counted["number"]]
        return {
            "tag": "counting",
            "include": [{"class": label, "count": count}],
            "exclude": [{"class": label, "count": count + 1}],
            "prompt": text,
        }
    first, *linked = _LINK.split(plain, maxsplit=1)
    clauses = [_clause(part, text) for part in (first, *linked[1:])]
    if not linked:
        return {"tag": "colors" if "color" in clauses[0] else "single_object", "include": clauses, "prompt": text}
    num_colored = sum("color" in clause for clause in clauses)
    if clauses[0]["class"] == clauses[1]["class"]:
        raise _not_understood(text)
    if linked[0] == "and" and num_colored != 1:
        return {"tag": "color_attr" if num_colored else "two_object", "include": clauses, "prompt": text}
    if linked[0] == "and" or num_colored:
        raise _not_understood(text)
    include = [clauses[1], {**clauses[0], "position": [linked[0], 0]}]
    return {"tag": "position", "include": include, "prompt": text}


def _clause(part: str, text: str) -> dict[str, Any]:
    match = _OBJECT.fullmatch(part)
    if match is None or part != article(part.partition(" ")[2]):
        raise _not_understood(text)
    return {"class": match["label"], "count": 1, **({"color": match["color"]} if match["color"] else {})}


def _not_understood(text: str) -> UserError:
    return UserError(
        f"prompt {text!r} is not one of GenEval's; expected 'a photo of' and one object ('a dog', 'a red cup'), "
        "several ('three dogs'), two different ones ('a dog and a cup', 'a dog left of a cup'), or two with colors "
        f"('a red dog and a blue cup'); classes are COCO's; colors: {', '.join(COLORS)}; "
        f"numbers: {', '.join(_COUNTS)}; positions: {', '.join(POSITIONS)}"
    )
