# SPDX-License-Identifier: Apache-2.0
"""The alerts by which a server ends a handshake (RFC 8446, section 6), each told as what it is."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d1_signer import D1SignerError, Limits, TlsError, TokenUnavailable
from d1_signer.token import pauses
from tests.servers.certificates import self_signed
from tests.token.conftest import FetcherMaker

ABOUT_OURS = "for the client certificate"
IN_COMMON = "in common with this machine"
NEUTRAL = "refuses the TLS handshake ("
# Before the server has said anything else, and so before it has asked for a certificate.
AT_ONCE = {
    40: (False, IN_COMMON),
    71: (False, IN_COMMON),
    70: (False, "no TLS 1.2 or newer"),
    112: (False, "does not serve this host name"),
    80: (True, "TLS failed over there"),
    90: (True, "TLS failed over there"),
    10: (False, NEUTRAL),
    42: (False, NEUTRAL),
    47: (False, NEUTRAL),
    48: (False, NEUTRAL),
    49: (False, NEUTRAL),
    50: (False, NEUTRAL),
    86: (False, NEUTRAL),
    109: (False, NEUTRAL),
    110: (False, NEUTRAL),
    115: (False, NEUTRAL),
    120: (False, NEUTRAL),
}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "_FIRST_PAUSE", 0.001)


@contextmanager
def ending_with(alert: int) -> Iterator[int]:
    """A server that answers each ClientHello with a fatal alert; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):
                    client.settimeout(20)
                    client.recv(1 << 16)
                    client.sendall(bytes([21, 3, 3, 0, 2, 2, alert]))
                    client.recv(1 << 16)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(30)


@pytest.mark.parametrize("alert", AT_ONCE)
def test_an_alert_in_place_of_an_answer(make_fetcher: FetcherMaker, alert: int) -> None:
    retryable, words = AT_ONCE[alert]
    with ending_with(alert) as port:
        environment = f"https://localhost:{port}/authz/v1"
        fetcher = make_fetcher(environment=environment, limits=Limits(total=2.0))
        with pytest.raises(TokenUnavailable if retryable else TlsError) as failure:
            fetcher.token()
    error = failure.value
    assert (error.retryable, words in error.message) == (retryable, True), error.message
    assert ABOUT_OURS not in error.message
    assert "certificate" not in (error.hint or "")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_alert_after_a_certificate_was_asked_for(
    make_fetcher: FetcherMaker, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """A server of TLS 1.2 says of a certificate that is missing: handshake failure, too."""
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            fetcher = make_fetcher(
                environment=f"https://localhost:{server.getsockname()[1]}/authz/v1",
                client_certificate=None,
                ca_file=certificate,
            )
            with pytest.raises(D1SignerError) as failure:
                fetcher.token()
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(30)
    assert ABOUT_OURS in failure.value.message
    assert not failure.value.retryable
