# SPDX-License-Identifier: Apache-2.0
"""A Vault that is not there is told as that and not as one that is slow, in everybody's words."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from d1_signer import Limits, TokenFetcher, errors
from d1_signer.signing.opening import open_signer
from d1_signer.testing import make_in_memory_signer
from tests.servers import vault
from tests.servers.process import closed_port

REFUSED = "the connection failed: connection refused"
UNKNOWN = "its name failed: the host name is not known here"


@contextmanager
def black_hole() -> Iterator[int]:
    """A port whose connections are neither taken nor refused: its queue is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0)
            with suppress(BlockingIOError):
                waiting.connect(server.getsockname())
        yield server.getsockname()[1]


@pytest.fixture(params=["refused", "unknown host"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """An address where nobody is, and the words for it."""
    if request.param == "refused":
        with closed_port() as port:
            yield f"127.0.0.1:{port}", REFUSED
    else:
        yield "nobody.invalid:8200", UNKNOWN


def test_an_address_where_no_vault_is(
    place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, words = place
    monkeypatch.setenv("VAULT_TOKEN", "unused")
    monkeypatch.setenv("VAULT_ADDR", f"https://{host}")
    with pytest.raises(errors.SignerUnavailable) as raised:
        open_signer("hashivault://d1", timeout=2.0)
    error = raised.value
    assert (error.code, error.retryable) == ("signer_unavailable", True)
    assert f"Vault at {host}" in error.message
    assert error.message.endswith(f": {words}.")
    assert error.details["endpoint"] == host
    assert "VAULT_ADDR" in error.hint


def test_tls_where_none_is_spoken_and_the_other_way_round(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "unused")
    monkeypatch.setenv("VAULT_ADDR", server.url.replace("http:", "https:"))
    with pytest.raises(errors.SignerUnavailable, match="TLS failed") as raised:
        open_signer("hashivault://d1")
    assert "speaks no TLS" in raised.value.hint
    assert not raised.value.retryable
    monkeypatch.setenv("VAULT_ADDR", server.tls_url.replace("https:", "http:"))
    with pytest.raises(errors.ConfigurationError, match="speaks TLS") as told:
        open_signer("hashivault://d1")
    assert told.value.details["phase"] == "look-up"


def test_the_others_say_it_in_the_same_words(
    place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, words = place
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "unused")
    with pytest.raises(errors.SignerUnavailable) as of_aws:
        open_signer("awskms:///alias/d1?region=eu-west-3", endpoint=f"https://{host}", timeout=2.0)
    with (
        make_in_memory_signer() as signer,
        TokenFetcher(
            signer,
            issuer_id="i",
            environment=f"https://{host}/authz",
            limits=Limits(total=2.0),
        ) as fetcher,
        pytest.raises(errors.TokenUnavailable) as of_d1,
    ):
        fetcher.token()
    for error in (of_aws.value, of_d1.value):
        assert host in error.message
        assert error.message.endswith(f"{words}.")


def test_a_vault_that_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "unused")
    with black_hole() as port:
        monkeypatch.setenv("VAULT_ADDR", f"https://127.0.0.1:{port}")
        with pytest.raises(errors.SignerTimeout) as raised:
            open_signer("hashivault://d1", timeout=1.0)
    assert f"Vault at 127.0.0.1:{port} " in raised.value.message
    assert raised.value.message.endswith("the connection failed: no connection in time.")
    assert raised.value.retryable


def test_a_vault_that_takes_them_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "unused")
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("VAULT_ADDR", f"https://{host}")
        with pytest.raises(errors.SignerTimeout, match=f"Vault at {host} ") as raised:
            open_signer("hashivault://d1", timeout=1.0)
    assert raised.value.message.endswith("TLS failed: the handshake did not end in time.")
