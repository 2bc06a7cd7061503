"""Jinja templates that are shipped as package data."""

import importlib.resources

import jinja2


def open_template(package: str, name: str) -> jinja2.Template:
    """Load a template; a variable without a value is an error, and an HTML template escapes values.

    Args:
        package: dotted name of the package whose folder holds the template.
        name: file name, such as `page.html.jinja`.
    """
    environment = jinja2.Environment(
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.from_string(importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8"))
