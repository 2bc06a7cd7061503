"""Measure the server under load: requests a second and latency for 1, 4 and 16 clients that ask one after another.

    python scripts/benchmark/serving.py --clients 1 4 16 --seconds 20 --json serving.json

The server runs in a process of its own on this machine, and the clients in this one, each with one open connection.
Every request draws one image (or answers a question about one). The clients send plain HTTP, because OpenAI's client
needs CPU time that the server would lack on a machine with few cores. The phases are repeated in turn, and the median
of each is shown. One of the images is compared with the one that the model draws without a server.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.data.images import open_picture

PROMPTS = ("a photo of a red circle", "a photo of two rings", "a photo of a blue square above a white cross")


@contextlib.contextmanager
def running_server(options: argparse.Namespace) -> Iterator[str]:
    """Start the server; yields its address."""
    command = [sys.executable, "-m", "llava_ext.cli", "serve", "--port", "0", "--max_rows", str(options.max_rows)]
    command += ["--model", options.model] if options.model else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            found = next(filter(None, (re.search(r"http://\S+/v1", line) for line in server.stderr)), None)
            if found is None:
                sys.exit("the server did not start")
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield found[0]
        finally:
            server.terminate()


class Client:
    """One connection to the server, which stays open."""

    def __init__(self, address: str) -> None:
        self._host, self._path = urlsplit(address).netloc, urlsplit(address).path
        self._connection = http.client.HTTPConnection(self._host)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        self._connection.request("POST", self._path + path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"the server answered {response.status}: {answer.decode()}")
        return json.loads(answer)


def draw(client: Client, number: int) -> bytes:
    """Ask for one image."""
    prompt = PROMPTS[number % len(PROMPTS)]
    answer = client.post("/images/generations", {"model": "default", "prompt": prompt, "seed": number})
    return base64.b64decode(answer["data"][0]["b64_json"])


def question(picture: str) -> Callable[[Client, int], bytes]:
    """A request that asks about an image, given as a data URL."""
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Describe the image."}]
    messages = [{"role": "user", "content": parts}]
    body = {"model": "default", "messages": messages, "modalities": ["text"], "max_tokens": 32}

    def ask(client: Client, number: int) -> bytes:
        return client.post("/chat/completions", body)["choices"][0]["message"]["content"].encode()

    return ask


def load(address: str, work: Callable[[Client, int], bytes], num_clients: int, seconds: float) -> list[float]:
    """Let clients ask for a time; returns the latency of every request that ended within it."""
    latencies: list[float] = []
    ends = time.monotonic() + seconds

    def ask(index: int) -> None:
        client, number = Client(address), index
        while True:
            started = time.monotonic()
            work(client, number)
            now = time.monotonic()
            if now > ends:
                return
            latencies.append(now - started)
            number += num_clients

    with ThreadPoolExecutor(num_clients) as pool:
        for _ in pool.map(ask, range(num_clients)):  # raises the error of a request
            pass
    return latencies


def row(latencies: list[float], seconds: float, clients: int, what: str) -> dict:
    """The figures of a phase."""
    return {
        "request": what, "clients": clients, "per_second": len(latencies) / seconds,
        "median_ms": 1000 * statistics.median(latencies), "p95_ms": 1000 * float(np.quantile(latencies, 0.95)),
    }  # fmt: skip


def check(address: str, model: str | None, number: int) -> bool:
    """Whether the server draws the image that the model draws alone (up to rounding)."""
    from llava_ext.model_folder import default_model_folder, load_model
    from llava_ext.serving.image_files import file_scale

    folder = model or default_model_folder()
    loaded, processor = load_model(folder)
    prompt = PROMPTS[number % len(PROMPTS)]
    (expected,) = loaded.generate_images(prompt, processor, seed=number)
    scale = file_scale(expected.width)
    found = open_picture(draw(Client(address), number), "served image").reduce(scale)
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max()) <= 1


def main() -> int:
    """Measure, and print the rows of the table."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: the newest in outputs/, or the included model)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of every phase")
    parser.add_argument("--rounds", type=int, default=3, help="times that every phase is measured")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the server")
    parser.add_argument("--max_rows", type=int, default=16, help="the server's --max_rows")
    add_json_option(parser)
    options = parser.parse_args()
    with running_server(options) as address:
        picture = "data:image/png;base64," + base64.b64encode(draw(Client(address), 0)).decode()
        kinds = {"one image": draw, "one answer": question(picture)}
        measured: dict[tuple[str, int], list[dict]] = {}
        for _ in range(options.rounds):
            for what, work in kinds.items():
                for clients in options.clients:
                    latencies = load(address, work, clients, options.seconds)
                    if not latencies:
                        sys.exit(f"no request ended within {options.seconds:g} s; pass more --seconds")
                    measured.setdefault((what, clients), []).append(row(latencies, options.seconds, clients, what))
        equal = check(address, options.model, 1)
    rows = [sorted(found, key=lambda one: one["per_second"])[len(found) // 2] for found in measured.values()]
    shown = table(rows, options.clients[0])
    on = machine(clock="wall") | {"threads": str(options.threads), "clients on": f"{os.cpu_count()} cores"}
    print(shown.markdown())
    print(f"\n{', '.join(f'{key} {value}' for key, value in on.items())}")
    print(f"the served image equals the model's own: {equal}")
    write_report(options.json, __file__, {"serving": shown}, on, {"rows": rows, "equal": equal})
    return 0 if equal else 1


def table(rows: list[dict], first: int) -> Table:
    """Throughput, also relative to that of the first number of clients, and latency."""
    base = {one["request"]: one["per_second"] for one in rows if one["clients"] == first}
    cells = [
        [
            f"{one['request']}, {one['clients']} client{'s' * (one['clients'] != 1)}",
            f"{one['per_second']:.1f}",
            f"{one['per_second'] / base[one['request']]:.1f}",
            f"{one['median_ms']:.0f} ms",
            f"{one['p95_ms']:.0f} ms",
        ]
        for one in rows
    ]
    return Table(["requests", "per second", "times the first", "median latency", "95 %"], cells)


if __name__ == "__main__":
    sys.exit(main())
