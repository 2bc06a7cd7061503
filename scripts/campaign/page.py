"""Attack the page and put it under load; only on 127.0.0.1, with bounded numbers and times.

    python scripts/campaign/page.py

The page of the included model is started as a process of its own and attacked as a foreign web site, a hostile visitor
and a slow client would: requests of other origins, uploads without end, interrupted and malformed uploads, endless
identifiers, clients that send slowly. Then several visitors draw at the same time. The table is printed as Markdown.
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio_client

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError

_HOST = "127.0.0.1"
_TIMEOUT_S = 120.0
_BOUNDARY = "campaign"
_UPLOAD, _STOP = "/gradio_api/upload", "/gradio_api/call/stop"
_QUOTA_MB, _FILE_MB = 16, 2
_DRAWING = ["an image", 8, 1.0, "constant", 0.0, 1.0, 0.0, "", 0, 1, 1.0, 0, 1.0, 0.0]  # the settings on the page


@dataclass(frozen=True)
class Page:
    """A running page: its process, port, and the folder of its files."""

    process: subprocess.Popen
    port: int
    files: Path

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
        """Send a request and return the status of the answer; 0 if the connection is closed without one."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", path, body, headers or {})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def memory_mb(self) -> float:
        """Memory of the process in MB."""
        line = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert line is not None
        return int(line[1]) / 2**10

    def kept(self) -> list[Path]:
        return [path for path in self.files.rglob("*") if path.is_file()]

    def kept_mb(self) -> float:
        return sum(path.stat().st_size for path in self.kept()) / 2**20


@contextmanager
def running_page(folder: Path) -> Iterator[Page]:
    """Start the page of the included model in a process, and end it."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava_ext.cli", "demo"]
    flags = ["--port", str(port)]
    if "--max_total_mb" in subprocess.run([*command, "--help"], capture_output=True, text=True).stdout:
        flags += ["--max_total_mb", str(_QUOTA_MB)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder)}
    process = subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any("press Ctrl-C" in line for line in process.stdout):  # the page is ready
            raise UserError(f"the page ended with exit code {process.wait()}")
        yield Page(process, port, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def multipart(content: bytes, name: str = "files", is_complete: bool = True) -> bytes:
    """The body of an upload of one file."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    return head.encode() + content + (f"\r\n--{_BOUNDARY}--\r\n".encode() if is_complete else b"")


def upload(page: Page, body: bytes, **headers: str) -> int:
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return page.post(_UPLOAD, body, {"Content-Type": kind, **given})


# The attacks: each returns its figure ----------------------------------------------------------------------------


def foreign_pages(page: Page) -> str:
    """Uploads that a web site sends through a visitor's browser."""
    headers = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
    headers += [{"Origin": f"http://{_HOST}:1"}, {"Sec_Fetch_Site": "same-site"}]
    accepted = sum(upload(page, multipart(b"x"), **each) == 200 for each in headers)
    return f"{accepted} of {len(headers)} accepted"


def endless_uploads(page: Page) -> str:
    """Four times as many files as the quota allows."""
    count = 4 * _QUOTA_MB // _FILE_MB
    accepted = sum(upload(page, multipart(os.urandom(_FILE_MB * 2**20))) == 200 for _ in range(count))
    return f"{accepted} of {count} files of {_FILE_MB} MB accepted, {page.kept_mb():.0f} MB on disk"


def bad_uploads(page: Page) -> str:
    """Interrupted and malformed uploads, which leave files that nobody deletes."""
    before = set(page.kept())
    for number in range(20):
        content = multipart(bytes(200_000), is_complete=False)
        head = f"POST {_UPLOAD} HTTP/1.1\r\nHost: {_HOST}:{page.port}\r\nContent-Length: 400000\r\n"
        head += f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n\r\n"
        with socket.create_connection((_HOST, page.port)) as connection:
            connection.sendall(head.encode() + content)
            time.sleep(0.05)
        upload(page, multipart(b"x" * number, name="other"))
        upload(page, multipart(b"y" * number, is_complete=False))
    time.sleep(1)
    return f"{len(set(page.kept()) - before)} files left by 60 uploads"


def long_identifiers(page: Page) -> str:
    """Stops of sessions that do not exist, each with an identifier of 200 KB."""
    before = page.memory_mb()
    for number in range(200):
        body = {"data": [], "session_hash": f"{number:06d}" + "x" * 200_000}
        page.post(_STOP, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return f"{page.memory_mb() - before:.0f} MB more memory after 200 calls"


def many_sessions(page: Page) -> str:
    """Stops of sessions that do not exist."""
    before = page.memory_mb()
    for number in range(200):
        body = {"data": [], "session_hash": f"session{number}"}
        page.post(_STOP, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return f"{page.memory_mb() - before:.0f} MB more memory after 200 calls"


def slow_clients(page: Page) -> str:
    """Clients that send a part of a request and then nothing."""
    starts = [b"", b"GET / HTTP/1.1\r\nHost: x", f"POST {_STOP} HTTP/1.1\r\nHost: {_HOST}\r\n".encode()]
    body = f"POST {_STOP} HTTP/1.1\r\nHost: {_HOST}:{page.port}\r\nContent-Length: 100\r\n\r\n" + "{"
    connections = [socket.create_connection((_HOST, page.port)) for _ in range(40)]
    for number, connection in enumerate(connections):
        connection.sendall([*starts, body.encode()][number % 4])
    time.sleep(15)
    still = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            while connection.recv(2**16):
                pass
        except BlockingIOError:
            still += 1
        except OSError:
            pass
        connection.close()
    return f"{still} of {len(connections)} connections still open after 15 s"


def visitors(page: Page, count: int) -> str:
    """Visitors that draw at the same time, and what as many drawings take one after the other."""
    clients = [gradio_client.Client(f"http://{_HOST}:{page.port}/", verbose=False) for _ in range(count)]

    def draw(client: gradio_client.Client, number: int) -> None:
        client.predict({"text": f"a red ring {number}", "files": []}, *_DRAWING, api_name="/ask")

    draw(clients[0], 0)
    for client in clients:
        client.predict(api_name="/reset")
    started = time.monotonic()
    for number, client in enumerate(clients):
        draw(client, number)
        client.predict(api_name="/reset")
    alone, started = time.monotonic() - started, time.monotonic()
    threads = [threading.Thread(target=draw, args=each) for each in zip(clients, range(count), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{time.monotonic() - started:.1f} s for {count} at the same time, {alone:.1f} s one after the other"


def main(arguments: argparse.Namespace) -> None:
    attacks: dict[str, Callable[[Page], str]] = {
        "uploads by foreign web sites": foreign_pages,
        "slow clients": slow_clients,
        "drawing visitors": lambda page: visitors(page, arguments.visitors),
        "stops with long identifiers": long_identifiers,
        "stops of unknown sessions": many_sessions,
        "interrupted and malformed uploads": bad_uploads,
        "uploads without end": endless_uploads,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with running_page(Path(folder)) as page:
            for name, attack in attacks.items():
                rows.append((name, attack(page)))
                print(*rows[-1], sep=": ", file=sys.stderr)
            rows.append(("the page afterwards", "runs" if page.process.poll() is None else "has ended"))
        rows.append(("files after its end", f"{len([p for p in Path(folder).rglob('*') if p.is_file()])}"))
    print("\n".join(["| attack | result |", "|---|---|", *(f"| {name} | {result} |" for name, result in rows)]))


if __name__ == "__main__":
    parser = CommandParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=8, help="visitors that draw at the same time")
    sys.exit(command_line.run(parser, work=main))
