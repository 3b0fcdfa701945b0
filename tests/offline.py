"""No network but loopback, in every test and in the child processes of tests."""

import os
import socket
from collections.abc import Callable
from typing import Any

CLOSED = "http://127.0.0.1:9"  # no proxy listens there: for programs that tests start


class Refused(BaseException):
    """A connection that no test may make. A BaseException, so that no `except OSError` hides it."""


def block() -> None:
    """Refuse connections of this process outside loopback from now on."""
    os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), CLOSED)
    os.environ["no_proxy"] = "localhost,127.0.0.1,::1"
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def check(connection: socket.socket, address: Any) -> Any:
        host = str(address[0])
        if connection.family != socket.AF_UNIX and host not in ("localhost", "::1") and not host.startswith("127."):
            raise Refused(f"connection to {host}: the tests have no network")
        return connect(connection, address)

    return check
