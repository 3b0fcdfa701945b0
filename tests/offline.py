"""No network but loopback, in every test and in the child processes of tests."""

import os
import socket
from collections.abc import Callable
from typing import Any

CLOSED = "http://127.0.0.1:9"  # no proxy listens there: for child processes
PROXIES = {"http_proxy": CLOSED, "https_proxy": CLOSED, "all_proxy": CLOSED, "no_proxy": "localhost,127.0.0.1,::1"}


class Refused(BaseException):
    """A connection that no test may make. A BaseException, so that no `except OSError` hides it."""


def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def check(connection: socket.socket, address: Any) -> Any:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host in ("localhost", "::1") or host.startswith("127.")):
                raise Refused(f"connection to {host}: the tests have no network")
        return connect(connection, address)

    return check


def block() -> None:
    """Refuse connections of this process outside loopback from now on."""
    os.environ.update(PROXIES)
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
