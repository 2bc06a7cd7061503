"""Model cards: Jinja templates of this package, rendered to the README.md of an exported folder."""

from importlib import resources
from typing import Any

import jinja2


def render_card(template: str, **values: Any) -> str:
    """Render a template file of this package; a value that the template uses but does not get is an error."""
    source = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(values)
