import pytest
from encoding_runs import CHILDREN

from evotok_plugin.tokenizer_folder import open_tokenizer


@pytest.fixture(scope="package")
def model(tiny_evotok_folder):
    return open_tokenizer(str(tiny_evotok_folder), "cpu")[0]


@pytest.fixture(autouse=True)
def kill_children():
    yield
    while CHILDREN:
        CHILDREN[-1].kill()
        CHILDREN.pop().join()
