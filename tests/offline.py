"""No network but this machine's own: in every test, and in the child processes of tests."""

import os
import socket
from collections.abc import Callable
from typing import Any

CLOSED = "http://127.0.0.1:9"  # a proxy that nobody is: for children that are started anew
PROXIES = {"http_proxy": CLOSED, "https_proxy": CLOSED, "all_proxy": CLOSED, "no_proxy": "localhost,127.0.0.1,::1"}


class Refused(BaseException):
    """A connection that no test may make. Nobody catches it on the way, as they may an OSError."""


def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def check(own: socket.socket, address: Any) -> Any:
        if own.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host in ("localhost", "::1") or host.startswith("127.")):
                raise Refused(f"a connection to {host}: the tests have no network")
        return connect(own, address)

    return check


def block() -> None:
    """Refuse connections of this process outside loopback from now on."""
    os.environ.update(PROXIES)
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
