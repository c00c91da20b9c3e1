# SPDX-License-Identifier: Apache-2.0
"""What passes is waited for within the time limit; what breaks is replaced, for all threads."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.backends.vault.conftest import signs
from tests.servers import vault
from tests.servers.fault_proxy import Answer, Dropped, FaultProxy, listening
from tests.servers.process import free_port
from tests.servers.vault import calls, on_sign, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.fault_proxy import Fault


def _times(count: int, fault: Fault) -> Fault:
    """The fault for the first requests."""
    left = iter(range(count))

    def passing(request: Any, forward: Any) -> Answer:
        return (fault if next(left, None) is not None else forward_of)(request, forward)

    def forward_of(request: Any, forward: Any) -> Answer:
        return forward(request)  # type: ignore[no-any-return]

    return passing


def _dropped(*_: object) -> Answer:
    raise Dropped


def _lost(request: Any, forward: Any) -> Answer:
    forward(request)
    raise Dropped


PASSING: dict[str, Fault] = {
    "307": refusal(307, Location="https://leader-that-is-gone:8200/v1/x"),
    "412": refusal(412, "required index state not present"),
    "429": refusal(429, "request path 'transit/sign': rate limit quota exceeded"),
    "472": refusal(472),
    "473": refusal(473),
    "500": refusal(500, "internal error"),
    "standby": refusal(500, "local node not active but active cluster node not found"),
    "502": refusal(502),
    "503": refusal(503, "Vault is sealed"),
    "504": refusal(504),
    "521": refusal(521),
    "dropped": _dropped,
    "answer-lost": _lost,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_passing_fault_is_waited_for(signer: Signer, proxy: FaultProxy, fault: Fault) -> None:
    proxy.fault = on_sign(_times(3, fault))
    signature = signer.sign(b"m", timeout=30)
    signer.public_key.verify(signature, b"m")
    assert len([call for call in calls(proxy) if "/sign/" in call]) == 4


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_opening_waits_as_well(proxy: FaultProxy, fault: Fault) -> None:
    proxy.fault = _times(2, fault)
    with open_signer("hashivault://d1", address=proxy.url, timeout=30) as signer:
        signs(signer)


def test_refused_port_is_waited_for(server: vault.Vault) -> None:
    port = free_port()

    def restart() -> None:
        time.sleep(0.3)
        with FaultProxy(("127.0.0.1", server.port)) as real, _forwarding(port, real):
            finished.wait(60)

    finished = threading.Event()
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        with open_signer(
            "hashivault://d1", address=f"http://127.0.0.1:{port}", timeout=30
        ) as signer:
            signs(signer)
    finally:
        finished.set()
        thread.join()


@contextlib.contextmanager
def _forwarding(port: int, real: FaultProxy) -> Iterator[None]:
    upstream = int(real.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(
                        target=_relay, args=(connection, upstream), daemon=True
                    ).start()

        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


def _relay(connection: socket.socket, port: int, is_deaf: Any = lambda: False) -> None:
    """Pass on until either side ends; swallow what comes once the connection is deaf."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not is_deaf():
                    target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with connection, socket.create_connection(("127.0.0.1", port)) as upstream:
        back = threading.Thread(target=copy, args=(upstream, connection), daemon=True)
        back.start()
        copy(connection, upstream)
        back.join()


@pytest.mark.parametrize("wait", [1, 2])
def test_vault_says_how_long_to_wait(signer: Signer, proxy: FaultProxy, wait: int) -> None:
    throttled = refusal(429, "quota", **{"Retry-After": str(wait)})
    proxy.fault = on_sign(_times(1, throttled))
    started = time.monotonic()
    signer.sign(b"m", timeout=30)
    assert time.monotonic() - started >= wait


def test_wait_that_does_not_fit_is_not_begun(signer: Signer, proxy: FaultProxy) -> None:
    proxy.fault = on_sign(refusal(429, "quota", **{"Retry-After": "3600"}))
    started = time.monotonic()
    with pytest.raises(errors.SignerThrottled) as refused:
        signer.sign(b"m", timeout=60)
    assert time.monotonic() - started < 30
    assert refused.value.details["attempts"] == 1


def test_fault_that_stays_is_told_by_its_own_name_when_the_time_is_over(
    signer: Signer, proxy: FaultProxy
) -> None:
    proxy.fault = on_sign(refusal(503, "Vault is sealed"))
    with pytest.raises(errors.SignerUnavailable, match="Vault is sealed") as refused:
        signer.sign(b"m", timeout=2)
    attempts = refused.value.details["attempts"]
    assert isinstance(attempts, int)
    assert 2 <= attempts <= 8
    assert refused.value.details["phase"] == "signature"


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_what_stays_is_not_asked_again(signer: Signer, proxy: FaultProxy, status: int) -> None:
    proxy.fault = on_sign(refusal(status, "no"))
    with pytest.raises(errors.SignerError):
        signer.sign(b"m")
    assert len([call for call in calls(proxy) if "/sign/" in call]) == 1


# -- connections that are dead, eight threads -----------------------------------------------------


def _all_sign(signer: Signer, *, each: int = 3, timeout: float = 30) -> Counter[str]:
    """What becomes of the signatures of eight threads."""

    def one(_: int) -> str:
        try:
            signature = signer.sign(b"m", timeout=timeout)
        except errors.D1SignerError as error:
            return error.code
        signer.public_key.verify(signature, b"m")
        return "signed"

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(one, range(8 * each)))


@contextlib.contextmanager
def _switch(
    port: int, *, host: str = "127.0.0.1", own_port: int = 0
) -> Iterator[tuple[int, list[int], list[socket.socket]]]:
    """Connections that go deaf together: raise the number, and those of before pass nothing."""
    generation, connections = [0], list[socket.socket]()

    def serve(connection: socket.socket) -> None:
        mine = generation[0]
        connections.append(connection)
        _relay(connection, port, lambda: generation[0] != mine)

    with listening(serve, host=host, port=own_port) as own:
        yield own, generation, connections


def test_connections_into_a_black_hole_are_replaced(server: vault.Vault, token: str) -> None:
    with (
        _switch(server.port) as (port, generation, connections),
        open_signer(
            "hashivault://d1",
            address=f"http://127.0.0.1:{port}",
            token_source=lambda: token,
            read_timeout=1.5,
        ) as signer,
    ):
        assert _all_sign(signer) == {"signed": 24}
        before = len(connections)
        generation[0] += 1
        # Nobody loses a signature: the wait for bytes ends, and a new connection is good.
        assert _all_sign(signer) == {"signed": 24}
        assert len(connections) > before
        # Who has less time than one wait for bytes fails in time, once, for all.
        generation[0] += 1
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            signer.sign(b"m", timeout=0.5)
        assert time.monotonic() - started < 10
        assert _all_sign(signer) == {"signed": 24}


def test_connections_that_are_reset_are_replaced(server: vault.Vault, token: str) -> None:
    with (
        _switch(server.port) as (port, _, connections),
        open_signer(
            "hashivault://d1", address=f"http://127.0.0.1:{port}", token_source=lambda: token
        ) as signer,
    ):
        assert _all_sign(signer) == {"signed": 24}
        for connection in list(connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        assert _all_sign(signer) == {"signed": 24}


def test_name_that_moves_to_another_address(
    server: vault.Vault, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    with (
        _switch(server.port) as (port, generation, _),
        _switch(server.port, host="127.0.0.2", own_port=port) as (_, _, moved),
    ):
        at = ["127.0.0.1"]

        def look_up(host: str, *rest: Any, **options: Any) -> Any:
            return real(at[0] if host == "localhost" else host, *rest, **options)

        monkeypatch.setattr("socket.getaddrinfo", look_up)
        with open_signer(
            "hashivault://d1",
            address=f"http://localhost:{port}",
            token_source=lambda: token,
            read_timeout=1.5,
        ) as signer:
            assert _all_sign(signer) == {"signed": 24}
            assert not moved
            at[0] = "127.0.0.2"
            generation[0] += 1
            assert _all_sign(signer) == {"signed": 24}
            assert moved


# -- a cluster ------------------------------------------------------------------------------------


@pytest.mark.stress
def test_leader_of_three_nodes_is_killed_under_load(tmp_path: Path) -> None:
    with (
        vault.cluster(tmp_path) as cluster,
        open_signer(
            "hashivault://d1",
            address=cluster.url,
            token_source=lambda: cluster.token,
            timeout=45,  # the default, ten seconds, is enough on a machine that is not busy
        ) as signer,
    ):
        counts: list[str] = []
        killed = threading.Event()

        def one(number: int) -> str:
            if number == 150:
                cluster.kill_leader()
                killed.set()
            try:
                signs(signer)
            except errors.D1SignerError as error:
                return str(error)
            return "signed"

        with ThreadPoolExecutor(8) as pool:
            counts += pool.map(one, range(500))
        assert killed.is_set()
        assert Counter(counts) == {"signed": 500}
