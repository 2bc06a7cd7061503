"""Images of the web: fetched only from public addresses, in bounds of size and time."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import quote, urljoin, urlsplit

from evotok_plugin.errors import UserError

_TIMEOUT_S, _DEADLINE_S, _MAX_REDIRECTS = 10.0, 30.0, 3  # of one operation, of a whole answer


# NAT64, 6to4 and addresses "compatible" with IPv4: what they lead to may be of this machine or a local network.
_CARRIERS_OF_IPV4 = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96")))


def fetch(url: str, max_bytes: int) -> bytes:
    """What a server answers to GET.

    The addresses of the host are looked up once, all must be public ones, and the connection is made to one of those
    that were checked; so it is again after a redirect. Proxies are not used.

    Raises:
        UserError: another scheme than http or https, an address that is not public, no answer, more than `max_bytes`.
    """
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            answer = _get(url, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} cannot be fetched: {error or type(error).__name__}") from error
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise UserError(f"{url} cannot be fetched: more than {_MAX_REDIRECTS} redirects")


def _get(url: str, max_bytes: int) -> bytes | str:
    """The body, or where a redirect leads."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{url!r} cannot be fetched: expected http:// or https:// and a host")
    kind = _PinnedHTTPS if parts.scheme == "https" else _PinnedHTTP
    connection = kind(host, port or kind.default_port, timeout=_TIMEOUT_S)
    connection.address = _public_address(host, connection.port)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = quote(target, safe="/%?&=+:;,@!$'()*~-._")
        started = time.monotonic()
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "evotok-llava"})
        # Single lines of the header may each come in time, and their end never.
        watch = threading.Timer(_DEADLINE_S, lambda: connection.sock and connection.sock.shutdown(socket.SHUT_RDWR))
        watch.daemon = True
        watch.start()
        try:
            response = connection.getresponse()
        finally:
            watch.cancel()
        if response.status in (301, 302, 303, 307, 308) and response.getheader("Location"):
            return response.getheader("Location")
        if response.status != 200:
            raise UserError(f"{url} cannot be fetched: the server answered {response.status} {response.reason}")
        return _read(response, url, max_bytes, started + _DEADLINE_S)
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, url: str, max_bytes: int, deadline: float) -> bytes:
    body, announced = bytearray(), response.getheader("Content-Length")
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise UserError(f"{url} has more than the {max_bytes / 2**20:g} MB allowed")
        if time.monotonic() > deadline:
            raise UserError(f"{url} took longer than {_DEADLINE_S:g} s")
    if announced is not None and announced.isdigit() and len(body) < int(announced):
        raise UserError(f"{url} cannot be fetched: {len(body)} of {announced} bytes came")
    return bytes(body)


def _public_address(host: str, port: int) -> str:
    """An address of the host.

    Raises:
        UserError: one of its addresses is not public: of this machine, of a local network, or reserved.
    """
    addresses = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in addresses:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        carries = parsed.version == 6 and any(parsed in network for network in _CARRIERS_OF_IPV4)
        if not parsed.is_global or parsed.is_multicast or carries:
            raise UserError(f"{host} is at {address}, which is no public address; save the image and give its path")
    return min(addresses, key=lambda address: (":" in address, address))  # IPv4 first: it is there everywhere


class _PinnedHTTP(http.client.HTTPConnection):
    """Connects to `address`, whatever the name means by now."""

    address: str

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)


class _PinnedHTTPS(http.client.HTTPSConnection):
    """The same, with a certificate that must be the host's."""

    address: str

    def connect(self) -> None:
        raw = socket.create_connection((self.address, self.port), self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=self.host)
