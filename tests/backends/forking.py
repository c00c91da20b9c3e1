# SPDX-License-Identifier: Apache-2.0
"""Forks again and again while threads sign: ``python -m tests.backends.forking COUNT URI [PORT]``.

A program of its own, so that a hang or a crash is a failed test and not a dead runner. ``PORT`` is
that of a Cloud KMS server of the tests.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from typing import Any

import grpc
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceGrpcTransport,
)

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer

_PATIENCE = 20.0


def main(count: int, uri: str, port: str = "") -> int:
    options: dict[str, Any] = {}
    if port:

        def client() -> kms.KeyManagementServiceClient:
            channel = grpc.insecure_channel(f"127.0.0.1:{port}")
            return kms.KeyManagementServiceClient(
                transport=KeyManagementServiceGrpcTransport(channel=channel)
            )

        options["client"] = client
    stop, failures = threading.Event(), list[BaseException]()
    with open_signer(uri, **options) as signer:

        def work() -> None:
            try:
                while not stop.is_set():
                    signer.public_key.verify(signer.sign(b"parent"), b"parent")
            except BaseException as error:  # noqa: BLE001 (counted)
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        good = sum(_child_signs(signer) for _ in range(count))
        stop.set()
        for thread in threads:
            thread.join()
    print(f"{good} of {count} children signed, {len(failures)} threads failed")
    return 0 if good == count and not failures else 1


def _child_signs(signer: Signer) -> bool:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, signer.sign(b"child"))
        except BaseException as error:  # noqa: BLE001 (told to the parent)
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], _PATIENCE)
    told = os.read(reader, 4096) if ready else b"hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    try:
        signer.public_key.verify(told, b"child")
    except Exception as error:  # noqa: BLE001 (a signature of another key, or none)
        print(told[:200], type(error).__name__)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
