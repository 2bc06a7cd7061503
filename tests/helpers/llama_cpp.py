"""A llama.cpp server in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest


class LlamaServer:
    """Client of the HTTP interface of llama.cpp's server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urlopen(request))

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]


@contextmanager
def llama_server(path: Path) -> Iterator[LlamaServer]:
    """Serve a GGUF file with one thread; skips the test if the package xllamacpp is not installed."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'evotok[test]'")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    # In float32, as transformers; by default keys and values are rounded to float16.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)  # stops when it is garbage-collected
    yield LlamaServer(server.listening_address)
    del server
