# SPDX-License-Identifier: Apache-2.0
"""Looking up host names, under a limit of time.

No limit reaches ``getaddrinfo``; with name servers that do not answer and a few search domains it
takes minutes. So it runs in a thread that is left behind, and only a few of them for each host.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

from urllib3.util.connection import allowed_gai_family

from d1_signer.signing import forks

# Look-ups of one host at a time. More than one, since that begun before the name servers came back
# may go on waiting.
_MOST = 4

_lock = threading.Lock()
_under_way: dict[tuple[str, int], list[Future[list[str]]]] = {}


def addresses_of(host: str, port: int, until: float) -> list[str]:
    """Look up a host name.

    Args:
        host: The name.
        port: For which service.
        until: Moment on ``time.monotonic()``.

    Returns:
        Addresses, each once, in the order in which to try them.

    Raises:
        socket.gaierror: There is none; ``EAI_AGAIN`` also where no answer came in time.
        OSError: No thread can be started (``EAGAIN``).
    """
    key = (host, port)
    with _lock:
        looking = _under_way.setdefault(key, [])
        if len(looking) < _MOST:
            looking.append(_begun(key))
        looking = list(looking)
    ended, _ = wait(looking, max(until - time.monotonic(), 0.0), FIRST_COMPLETED)
    if not ended:
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time")
    first = ended.pop()
    error = first.exception()
    if isinstance(error, UnicodeError):
        raise socket.gaierror(socket.EAI_NONAME, "not a host name")
    if isinstance(error, socket.gaierror):
        # One object raised in many threads would collect all their tracebacks.
        raise socket.gaierror(*error.args)
    return first.result()


def _begun(key: tuple[str, int]) -> Future[list[str]]:
    """A look-up in a thread of its own. The lock is held."""
    found: Future[list[str]] = Future()

    def look() -> None:
        try:
            family = allowed_gai_family()
            infos = socket.getaddrinfo(*key, family=family, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except BaseException as error:  # noqa: BLE001 (raised by those who wait)
            _forget(key, found)
            found.set_exception(error)
        else:
            _forget(key, found)
            found.set_result(addresses)

    try:
        threading.Thread(target=look, name="d1-signer-name", daemon=True).start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread can be started, the limit is reached") from None
    return found


def _forget(key: tuple[str, int], found: Future[list[str]]) -> None:
    with _lock:
        looking = _under_way.get(key, [])
        if found in looking:
            looking.remove(found)
        if not looking:
            _under_way.pop(key, None)


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (the parent's may have been held at the moment of the fork)
    _lock = threading.Lock()
    _under_way.clear()  # its threads are the parent's


forks.in_child(_after_fork_in_child)
