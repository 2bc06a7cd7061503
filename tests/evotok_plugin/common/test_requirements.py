"""Missing or old libraries of the extra `models`."""

import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest

from evotok_plugin.cli import main
from evotok_plugin.common import requirements
from evotok_plugin.common.lazy import lazy_package
from evotok_plugin.errors import UserError

Version = namedtuple("Version", "major minor micro")


@pytest.fixture(autouse=True)
def fresh():
    requirements.missing_models.cache_clear()
    yield
    requirements.missing_models.cache_clear()


def absent(name):
    raise PackageNotFoundError(name)


def test_this_environment_has_everything():
    assert requirements.missing_models() is None
    requirements.require_models("this")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", lambda name: "4.37.2", "requires transformers 5.17 or newer, found 4.37.2; pip install 'evotok"),
        ("version", absent, "requires transformers, which is not installed; pip install 'evotok.models.'"),
        ("find_spec", lambda name: None, "requires yaml, which is not installed"),
    ],
)
def test_what_is_missing_is_named_with_the_command(monkeypatch, capsys, name, value, message):
    monkeypatch.setattr(requirements, name, value)
    with pytest.raises(UserError, match=message):
        requirements.require_models("this command")
    assert main(["encode"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this command requires") and error.count("\n") == 1


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", Version(3, 10, 13))
    with pytest.raises(UserError, match=r"requires Python 3.11 or newer, found 3.10"):
        requirements.require_models("this")


def test_only_light_names_are_imported_without_the_extra(monkeypatch):
    get, _ = lazy_package(
        "evotok_plugin", {"UserError": "errors", "EvoTokConfig": "configuration_evotok"}, [], ["errors"]
    )
    monkeypatch.setattr(requirements, "version", absent)
    requirements.missing_models.cache_clear()
    assert get("UserError") is UserError
    with pytest.raises(UserError, match="evotok_plugin.EvoTokConfig requires transformers"):
        get("EvoTokConfig")
