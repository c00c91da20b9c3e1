# SPDX-License-Identifier: Apache-2.0
"""The process that hosts a module for ``isolation="process"``; started by `isolated`.

Its arguments are the process ID of its parent, whether it may leave a core file, and the numbers of
inherited sockets: one for control, the others for signatures, each served by a thread. It ends when
its parent or the control socket does, within a second if the module hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

from d1_signer.backends.pkcs11 import generate_key, open_backend
from d1_signer.backends.pkcs11.backend import Pkcs11Backend
from d1_signer.backends.pkcs11.isolation import confinement
from d1_signer.backends.pkcs11.isolation.answers import answer_of
from d1_signer.backends.pkcs11.isolation.wire import (
    ACCEPTED,
    CUSTODY,
    DONE,
    FAILED,
    GENERATE,
    LOGIN,
    SIGN,
    Gone,
    encoded_error,
    receive,
    send,
)
from d1_signer.backends.pkcs11.session import at_exit, login
from d1_signer.backends.pkcs11.session.pin import refused
from d1_signer.errors import D1SignerError, SignerError
from d1_signer.signing.backend import GeneratedKey

T = TypeVar("T")

_ending = threading.Lock()


def main(parent: int, core_dumps: int, numbers: list[int]) -> None:
    """Open or make the key that the first frame describes; serve until the parent has gone."""
    control, *connections = [socket.socket(fileno=number) for number in numbers]
    confinement.watch(parent, control, _end)
    if not core_dumps:
        confinement.write_no_core()
    # What the vendor's library prints is for whoever looks for what is wrong with it.
    with contextlib.suppress(OSError):  # standard error is closed
        os.dup2(2, 1)
    try:
        kind, body = receive(control)
        request = json.loads(body)
        if kind == GENERATE:
            _told(control, request, _generated)
            return
        backend = _told(control, request, _opened)
        if backend is None:
            return
        for connection in connections:
            threading.Thread(target=_serve, args=(backend, connection), daemon=True).start()
        receive(control)  # nothing is ever sent: this waits for the end
    except Gone:
        pass
    except BaseException as error:  # noqa: BLE001 (it ends here, and nobody else would tell)
        _show(error)
    finally:
        _end()


def _end() -> NoReturn:
    with _ending:  # and whoever comes second waits for the end
        at_exit.leave()
        os._exit(0)  # threads may be in a call that does not return


def _opened(uri: str, options: dict[str, Any]) -> tuple[Pkcs11Backend, dict[str, object]]:
    backend = open_backend(uri, **options)
    assert isinstance(backend, Pkcs11Backend)  # noqa: S101 (the options name no isolation)
    return backend, {"public_key": backend.public_key().pem()}


def _generated(uri: str, options: dict[str, Any]) -> tuple[GeneratedKey, dict[str, object]]:
    made = generate_key(uri, **options)
    return made, {"uri": made.uri, "public_key": made.public_key.pem()}


def _told(
    control: socket.socket,
    request: dict[str, Any],
    work: Callable[[str, dict[str, Any]], tuple[T, dict[str, object]]],
) -> T | None:
    """Do what was asked for and tell the parent what came of it; None where it failed."""
    refused.take(request["refused"])
    options = request["options"]
    pin = request.get("pin")
    if pin is not None:
        options["pin_source"] = lambda: pin
    login.witness = lambda: _witnessed(control)
    try:
        result, answer = work(request["uri"], options)
    except D1SignerError as error:
        send(control, FAILED, encoded_error(error, refused=refused.export()))
        return None
    except Exception as error:  # noqa: BLE001 (the parent waits for an answer)
        send(control, FAILED, encoded_error(_unexpected(error), refused=refused.export()))
        return None
    finally:
        login.witness = contextlib.nullcontext
    send(control, DONE, json.dumps({**answer, "refused": refused.export()}).encode())
    return result


@contextlib.contextmanager
def _witnessed(control: socket.socket) -> Iterator[None]:
    """A login that the parent knows of before it begins."""
    send(control, LOGIN, b"")
    receive(control)
    yield
    send(control, ACCEPTED, b"")
    receive(control)


def _serve(backend: Pkcs11Backend, connection: socket.socket) -> None:
    try:
        while True:
            kind, body = receive(connection)
            try:
                answer = _answer(backend, kind, body)
            except D1SignerError as error:
                send(connection, FAILED, encoded_error(error, refused=refused.export()))
            except Exception as error:  # noqa: BLE001 (the parent waits for an answer)
                failed = _unexpected(error)
                send(connection, FAILED, encoded_error(failed, refused=refused.export()))
            else:
                send(connection, DONE, answer)
    except Gone:
        pass
    finally:
        connection.close()  # however this thread ends, the parent does not wait for it


def _answer(backend: Pkcs11Backend, kind: bytes, body: bytes) -> bytes:
    if kind == SIGN:
        return answer_of(backend.sign_digest(body, None), backend.openings)
    if kind == CUSTODY:
        return json.dumps(asdict(backend.custody())).encode()
    raise SignerError(f"The host process was asked for something unknown ({kind!r}).")


def _unexpected(error: Exception) -> SignerError:
    _show(error)
    return SignerError(
        f"The process that hosts the PKCS#11 module failed with {type(error).__name__}.",
        hint="Its standard error says where; report it to the maintainers of d1_signer.",
    )


def _show(error: BaseException) -> None:
    """Tell where it failed; not its text, which may hold the PIN."""
    traceback.print_tb(error.__traceback__)
    sys.stderr.write(f"{type(error).__name__} in the process that hosts the PKCS#11 module\n")


if __name__ == "__main__":
    parent, core_dumps, *numbers = map(int, sys.argv[1:])
    main(parent, core_dumps, numbers)
