# SPDX-License-Identifier: Apache-2.0
"""Name servers that do not answer, or answer with addresses of which some are dead."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3

from d1_signer import Limits, TokenFetcher, TokenUnavailable
from d1_signer.sandbox import Sandbox
from d1_signer.transport import names
from d1_signer.transport.connections import Connections
from d1_signer.transport.names import addresses_of
from d1_signer.transport.reach import place_of, reach
from tests.token.conftest import FetcherMaker
from tests.token.test_fetcher import together, until

real = socket.getaddrinfo
HOST = "d1.example.test"


@dataclass
class NameServers:
    """What they answer for one host; other names are looked up as ever.

    Attributes:
        addresses: In this order; None: no answer until `released`.
        asked: How often.
        most: How many asked at one time, at most.
    """

    host: str = HOST
    addresses: list[str] | None = None
    failure: Exception | None = None
    asked: int = 0
    most: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def getaddrinfo(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != self.host:
            return real(host, port, *args, **options)
        self.asked += 1
        self.most = max(self.most, len(looking()))
        if self.failure is not None:
            raise self.failure
        if self.addresses is None:
            self.released.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [info for one in self.addresses for info in real(one, port, *args, **options)]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServers]:
    servers = NameServers()
    monkeypatch.setattr(socket, "getaddrinfo", servers.getaddrinfo)
    yield servers
    servers.released.set()
    until(lambda: not looking())


def looking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "d1-signer-name"]


def test_name_servers_that_hang_are_told_as_that(
    make_fetcher: FetcherMaker, servers: NameServers
) -> None:
    limits = Limits(total=1.0, connect=0.1, read=0.1)
    fetcher = make_fetcher(
        environment=f"https://{HOST}/authz/v1", limits=limits, retry_interval=0.01
    )
    for _ in range(6):  # more than there may be renewals that hang
        with pytest.raises(TokenUnavailable) as failure:
            fetcher.token()
        error = failure.value
        assert error.details["failed"] == "name", error
        assert error.details["host"] == f"{HOST}:443"
        assert "its name failed: the name servers gave no answer" in error.message
        assert "DNS" in error.hint
    # Few threads are left behind, however many asked.
    assert 1 <= len(looking()) <= 4
    assert servers.asked <= 4


@pytest.mark.usefixtures("servers")
def test_a_session_says_so_too_and_in_time(make_fetcher: FetcherMaker) -> None:
    fetcher = make_fetcher(environment=f"https://{HOST}/authz/v1", limits=Limits(connect=0.2))
    with fetcher.session() as session:
        session.auth = None
        began = time.monotonic()
        with pytest.raises(requests.ConnectionError, match="resolve"):
            session.get(f"{fetcher.environment.banking_url}/ping")
        assert time.monotonic() - began < 5


@pytest.fixture
def fetcher(make_fetcher: FetcherMaker, sandbox: Sandbox) -> TokenFetcher:
    url = sandbox.base_url.replace("127.0.0.1", "localhost")
    return make_fetcher(environment=url, audience=sandbox.token_endpoint, retry_interval=0.01)


def test_it_goes_on_when_they_answer_again(fetcher: TokenFetcher, servers: NameServers) -> None:
    """Although what was asked before goes on hanging."""
    servers.host = "localhost"
    fetcher.prefetch()
    until(lambda: servers.asked == 1)
    servers.addresses = ["127.0.0.1"]
    assert fetcher.token().value


def test_addresses_are_tried_one_after_the_other(
    fetcher: TokenFetcher, servers: NameServers
) -> None:
    servers.host, servers.addresses = "localhost", ["127.0.0.2", "127.0.0.1"]
    assert fetcher.token().value
    servers.addresses = ["127.0.0.2", "127.0.0.3"]
    with fetcher.session() as session:
        session.auth = None
        with pytest.raises(requests.ConnectionError, match="refused"):
            session.get(f"{fetcher.environment.banking_url}/ping")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "the name servers gave no answer"),
        (socket.gaierror(socket.EAI_NONAME, "not known"), "the host name is not known here"),
        (UnicodeError("label too long"), "the host name is not known here"),
    ],
)
def test_what_they_say_is_told(
    make_fetcher: FetcherMaker, servers: NameServers, failure: Exception, words: str
) -> None:
    servers.failure = failure
    fetcher = make_fetcher(environment=f"https://{HOST}/authz/v1", limits=Limits(total=2.0))
    with pytest.raises(TokenUnavailable, match=words) as error:
        fetcher.token()
    assert error.value.details["failed"] == "name"


def test_a_proxys_name_is_the_proxys(make_fetcher: FetcherMaker, servers: NameServers) -> None:
    servers.failure = socket.gaierror(socket.EAI_NONAME, "not known")
    fetcher = make_fetcher(proxy=f"http://{HOST}:3128", limits=Limits(total=0.3))
    with pytest.raises(TokenUnavailable, match=f"the proxy {HOST}:3128 failed") as error:
        fetcher.token()
    assert error.value.details["failed"] == "proxy"


def test_a_crowd_shares_a_few_look_ups(servers: NameServers) -> None:
    def look() -> object:
        try:
            return addresses_of(HOST, 443, time.monotonic() + 20)
        except OSError as error:
            return error

    def release() -> None:
        until(lambda: servers.asked > 0)
        servers.released.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    results = together(50, look)
    releasing.join()
    errors = [result for result in results if isinstance(result, socket.gaierror)]
    assert len(errors) == 50
    assert len({id(error) for error in errors}) == 50
    assert 1 <= servers.most <= 4


def test_a_child_of_a_fork_looks_for_itself(servers: NameServers) -> None:
    with pytest.raises(socket.gaierror):
        addresses_of(HOST, 443, time.monotonic() + 0.05)
    servers.addresses = ["127.0.0.1"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            empty = not names._under_way
            found = addresses_of(HOST, 443, time.monotonic() + 20)
            status = 0 if empty and found == ["127.0.0.1"] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("servers")
def test_no_thread_for_a_look_up_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="no thread"):
        addresses_of(HOST, 443, time.monotonic() + 1)


@pytest.fixture
def dead() -> Iterator[tuple[list[str], int]]:
    """Addresses whose queue is full, so that the kernel answers no SYN; and their port."""
    addresses = [f"127.0.0.{last}" for last in range(11, 15)]
    with contextlib.ExitStack() as opened:
        port = 0
        for address in addresses:
            listener = opened.enter_context(socket.socket())
            listener.bind((address, port))
            listener.listen(0)
            port = listener.getsockname()[1]
            for _ in range(4):
                filling = opened.enter_context(socket.socket())
                filling.setblocking(False)  # noqa: FBT003 (its name)
                filling.connect_ex((address, port))
        yield addresses, port


@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_a_call_ends_in_time_however_many_addresses_do_not_answer(
    servers: NameServers, dead: tuple[list[str], int], seconds: float
) -> None:
    servers.addresses, port = dead
    connections = Connections()
    pool = connections.pools()["http"](HOST, port, timeout=seconds)
    began = time.monotonic()
    with (
        connections.bounded(began + seconds),
        pytest.raises(urllib3.exceptions.ConnectTimeoutError),
    ):
        pool.request("GET", "/", retries=False)
    assert time.monotonic() - began < seconds * 2


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    servers: NameServers, dead: tuple[list[str], int]
) -> None:
    (first, *_), port = dead
    servers.addresses = [first, "127.0.0.1"]
    with socket.create_server(("127.0.0.1", port)) as listener:
        pool = Connections().pools()["http"](HOST, port, timeout=6.0)
        connection: Any = pool._get_conn()
        connection.connect()
        assert connection.sock.gettimeout() > 2.0, "the share is for connecting alone"
        listener.accept()[0].close()
        connection.close()


def test_each_address_has_the_limit_where_a_call_has_no_moment_to_end_by(
    servers: NameServers, dead: tuple[list[str], int]
) -> None:
    (first, *_), port = dead
    servers.addresses = [first, "127.0.0.1"]
    with socket.create_server(("127.0.0.1", port)) as listener:
        pool = Connections().pools()["http"](HOST, port, timeout=1.0)
        connection: Any = pool._get_conn()
        connection.connect()
        listener.accept()[0].close()
        connection.close()


def test_a_body_that_is_made_while_it_is_sent_goes_as_it_comes() -> None:
    came = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                received = b""
                while b"first" not in received:
                    received += connection.recv(4096)
                came.set()
                while b"0\r\n\r\n" not in received:
                    received += connection.recv(4096)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

        serving = threading.Thread(target=serve)
        serving.start()

        def body() -> Iterator[bytes]:
            yield b"first"
            assert came.wait(20)
            yield b"second"

        pool = Connections().pools()["http"]("127.0.0.1", listener.getsockname()[1], timeout=30)
        assert pool.request("POST", "/", body=body(), retries=False).status == 204
        serving.join(20)


def test_a_connection_that_is_being_made_is_cut(
    servers: NameServers, dead: tuple[list[str], int]
) -> None:
    servers.addresses, port = dead
    connections = Connections()
    pool = connections.pools()["http"](HOST, port, timeout=60.0)
    ended: list[BaseException] = []

    def call() -> None:
        try:
            pool.request("GET", "/", retries=False)
        except urllib3.exceptions.HTTPError as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    # From here on it connects, and would do so for four minutes.
    until(lambda: bool(connections._handles), seconds=20)
    while thread.is_alive():  # it may be between two addresses
        connections.cut()
        thread.join(0.1)
    assert "abort" in str(ended)


def test_a_signals_exception_amid_connecting_leaves_no_socket(
    dead: tuple[list[str], int],
) -> None:
    class Stop(Exception):
        pass

    def refuse(_: socket.socket) -> None:
        raise Stop

    (first, *_), port = dead
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(Stop):
        reach([place_of(first, port)], limit=1.0, until=None, options=(), claim=refuse)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_place_that_does_not_answer_leaves_time_to_the_next(dead: tuple[list[str], int]) -> None:
    (first, *_), port = dead
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        places = [place_of(first, port), place_of(*listener.getsockname())]
        began = time.monotonic()
        sock = reach(places, limit=60.0, until=began + 6.0, options=(), claim=lambda _: None)
        with sock:
            assert sock.getpeername() == listener.getsockname()
            assert time.monotonic() - began < 6.0
