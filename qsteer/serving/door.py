"""Who may come in: loopback or a key, so many connections, and so many requests a second of each."""

import base64
import hmac
import ipaddress
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from qsteer.checks import check_at_least, check_positive
from qsteer.serving.batching import RefusedError
from qsteer.serving.codec import CodecLimits

SCHEME = "Api-Key"
"""Of the ``Authorization`` header, as openpi-client sends it."""


@dataclass(frozen=True)
class ServerLimits:
    """What one client, and all together, may take of a server; times in seconds.

    Attributes:
        message: how large a message may be.
        connections: most robots at once.
        rate: most requests a second of one connection; bursts of a second's worth.
        handshake: longest time from a connection to its request.
        idle: longest time between a reply and the next request.
        send: longest time that a client may take to read a reply, or to answer a ping.
        grace: longest time for what was taken when the server stops.

    Raises:
        ValueError: a number is out of its range.
    """

    message: CodecLimits = CodecLimits()  # noqa: RUF009 (frozen)
    connections: int = 64
    rate: float = 100.0
    handshake: float = 10.0
    idle: float = 600.0
    send: float = 20.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(self, 1, "connections", "rate")
        check_positive(self, "handshake", "idle", "send", "grace")


@dataclass
class Rate:
    """A bucket of requests that fills at ``rate`` a second, up to a second's worth."""

    rate: float
    left: float = field(init=False)
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Fill it."""
        self.left = self.rate

    def take(self) -> None:
        """Take a request.

        Raises:
            RefusedError: there is none.
        """
        now = time.monotonic()
        self.left, self.since = min(self.rate, self.left + (now - self.since) * self.rate), now
        if self.left < 1:
            raise RefusedError(
                f"rate: expected at most {self.rate:g} requests a second of one connection, got more; ask "
                "less often, or raise the server's --max-rate"
            )
        self.left -= 1


def is_loopback(host: str) -> bool:
    """Return whether an address, or all that a name stands for, is this machine's own.

    Raises:
        ValueError: there is no such name.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: expected an address of this machine, got {host!r} ({error})") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def is_allowed(request: Request, key: str | None, *, browser: bool = False) -> bool:
    """Return whether a request carries the key, compared in constant time; without a key, all do.

    Args:
        request: over HTTP.
        key: that is expected.
        browser: take it as a password, too, with any name: what a browser asks a person for.
    """
    if key is None:
        return True
    given = request.headers.get_all("Authorization")
    if len(given) != 1:
        return False
    scheme, _, credentials = given[0].partition(" ")
    if browser and scheme.lower() == "basic":
        try:
            _, _, password = base64.b64decode(credentials, validate=True).partition(b":")
        except ValueError:
            return False
        return hmac.compare_digest(password, key.encode())
    return hmac.compare_digest(given[0].encode(errors="surrogateescape"), f"{SCHEME} {key}".encode())


def respond(
    connection: ServerConnection, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer over HTTP, after which the connection is closed; given headers replace the usual."""
    response = connection.respond(status, text)
    own = {name.lower() for name in headers or {}}
    kept = [(name, value) for name, value in response.headers.raw_items() if name.lower() not in own]
    response.headers = Headers([*kept, *(headers or {}).items()])
    return response
