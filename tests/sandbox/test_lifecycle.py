# SPDX-License-Identifier: Apache-2.0
"""Start and close: what is there in between, and that nothing remains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests

from d1_signer.errors import ConfigurationError, InvalidInputError
from d1_signer.sandbox import Fault, Sandbox
from tests.sandbox.client import ISSUER, KID, Client, public_jwk

if TYPE_CHECKING:
    from collections.abc import Callable

    from joserfc.jwk import ECKey


def port_of(sandbox: Sandbox) -> int:
    return urlsplit(sandbox.base_url).port or 0


def test_nothing_remains_after_close(client: Client, sandbox: Sandbox) -> None:
    folder = sandbox.ca_file.parent
    client.post()
    sandbox.close()
    assert [t for t in threading.enumerate() if t.name == "d1-signer-sandbox"] == []
    assert not folder.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(sandbox)), timeout=10)
    sandbox.close()
    assert sandbox.counters.tokens_issued == 1


def test_no_file_descriptor_remains(key: ECKey) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        descriptors = Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        with Sandbox(issuer_id=ISSUER) as sandbox:
            sandbox.register_key(KID, public_jwk(key))
            client = Client(sandbox, key)
            assert client.post().status_code == 200
            # Open while the sandbox closes: an idle client, and one that never says hello.
            silent = socket.create_connection(("127.0.0.1", port_of(sandbox)), timeout=10)
        assert silent.recv(1) == b""
        silent.close()
        client.session.close()
    assert len(list(descriptors.iterdir())) <= before


def delay(sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.DELAY, seconds=600)


def slow_body(sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.SLOW_BODY, seconds=600)


@pytest.mark.parametrize("order", [delay, slow_body])
def test_close_does_not_wait_for_a_fault(
    client: Client, sandbox: Sandbox, order: Callable[[Sandbox], None]
) -> None:
    order(sandbox)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, timeout=30)
        wait_for(lambda: len(sandbox.requests) == 1)
        before = time.monotonic()
        sandbox.close()
        assert time.monotonic() - before < 1.5
        assert isinstance(answer.exception(timeout=10), requests.exceptions.RequestException)


def test_close_does_not_wait_for_a_reader(client: Client, sandbox: Sandbox) -> None:
    sandbox.misbehave(Fault.HUGE_BODY)
    with client.post(stream=True):
        before = time.monotonic()
        sandbox.close()
        assert time.monotonic() - before < 1.5


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def test_it_starts_once(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigurationError, match="started once"):
        sandbox.start()
    sandbox.close()
    with pytest.raises(ConfigurationError, match="started once"):
        sandbox.start()


def test_it_has_no_url_before_it_starts() -> None:
    unstarted = Sandbox(issuer_id=ISSUER)
    for read in (
        lambda: unstarted.base_url,
        lambda: unstarted.token_endpoint,
        lambda: unstarted.banking_url,
        lambda: unstarted.ca_file,
    ):
        with pytest.raises(ConfigurationError):
            read()
    unstarted.close()


def test_urls(sandbox: Sandbox) -> None:
    origin = f"https://127.0.0.1:{port_of(sandbox)}"
    assert sandbox.base_url == f"{origin}/authz/v1"
    assert sandbox.token_endpoint == f"{origin}/authz/v1/oauth2/token"
    assert sandbox.banking_url == f"{origin}/banking"


def test_keys_and_orders_may_come_before_the_start(key: ECKey) -> None:
    sandbox = Sandbox(issuer_id=ISSUER)
    sandbox.register_key(KID, public_jwk(key))
    sandbox.misbehave(Fault.STATUS_500, times=1)
    with sandbox:
        client = Client(sandbox, key)
        with client.session:
            assert [client.post().status_code for _ in range(2)] == [500, 200]


def test_a_port_of_choice(key: ECKey) -> None:
    with Sandbox(issuer_id=ISSUER) as first:
        port = port_of(first)
        taken = Sandbox(issuer_id=ISSUER, port=port)
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            taken.start()
        taken.close()
    with Sandbox(issuer_id=ISSUER, port=port) as second:
        second.register_key(KID, public_jwk(key))
        client = Client(second, key)
        with client.session:
            assert port_of(second) == port
            assert client.post().status_code == 200
    with pytest.raises(ConfigurationError):
        Sandbox(issuer_id=ISSUER, port=70_000).start()


def test_a_folder_that_cannot_be_made_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    unstarted = Sandbox(issuer_id=ISSUER)
    with pytest.raises(ConfigurationError, match="cannot start") as caught:
        unstarted.start()
    assert caught.value.__cause__ is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(unstarted)), timeout=10)


def test_a_thread_that_cannot_serve_ends_the_start() -> None:
    # One descriptor is left for the listening socket, none for the event loop.
    code = (
        "import os, resource, threading\n"
        "from d1_signer.errors import ConfigurationError\n"
        "from d1_signer.sandbox import Sandbox\n"
        "unstarted = Sandbox(issuer_id='x', tls=False)\n"
        "lowest = os.dup(0)\n"
        "os.close(lowest)\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))\n"
        "try:\n"
        "    unstarted.start()\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
        "assert threading.active_count() == 1\n"
        "os.close(os.dup(0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The sandbox cannot start: [Errno 24]")


@pytest.mark.parametrize(
    "argument",
    [
        {"issuer_id": ""},
        {"issuer_id": None},
        {"port": "x"},
        {"port": True},
        {"port": 1.5},
        {"token_lifetime": 0},
        {"token_lifetime": -1},
        {"token_lifetime": float("inf")},
        {"token_lifetime": 10**400},
        {"token_lifetime": "x"},
        {"token_lifetime": None},
        {"clock": 5},
        {"leeway": "x"},
        {"leeway": float("nan")},
        {"leeway": -1},
    ],
)
def test_arguments_of_a_wrong_type_or_range(argument: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError), Sandbox(**{"issuer_id": ISSUER, **argument}):
        pass


def test_a_lifetime_of_a_wrong_type_is_not_set(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidInputError):
        sandbox.set_token_lifetime("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("passphrase", ["text", b"", b"x" * 1024])
def test_a_passphrase_that_cannot_be_one(sandbox: Sandbox, passphrase: Any) -> None:
    with pytest.raises(InvalidInputError):
        sandbox.issue_client_certificate(passphrase=passphrase)


def test_it_listens_on_loopback_only(sandbox: Sandbox) -> None:
    running = sandbox._running
    assert running is not None
    assert running._listener.getsockname()[0] == "127.0.0.1"


def test_fifty_clients_at_once(sandbox: Sandbox, key: ECKey) -> None:
    barrier = threading.Barrier(50)

    def run(_: int) -> int:
        client = Client(sandbox, key)
        with client.session:
            barrier.wait(timeout=30)
            return client.ping(client.token()).status_code

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(run, range(50))) == [200] * 50
    counters = sandbox.counters
    assert counters.connections == 50
    assert counters.token_requests == counters.tokens_issued == 50
    assert counters.banking_requests == 50
    assert len({str(request.claims["jti"]) for request in sandbox.requests}) == 50


def test_a_forked_child_leaves_its_parents_files_alone(sandbox: Sandbox) -> None:
    # sys.exit in a child runs the finalizers that it inherited; os._exit would not.
    code = (
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from d1_signer.sandbox import Sandbox\n"
        "sandbox = Sandbox(issuer_id='x').start()\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert sandbox.ca_file.exists()\n"
        "print(sandbox.ca_file)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    # The parent ended without close(): its files are gone all the same.
    assert not Path(done.stdout.strip()).exists()
    assert sandbox.ca_file.exists()


@pytest.mark.parametrize("package", ["aiohttp", "joserfc"])
def test_without_the_extra_only_the_sandbox_itself_is_missing(package: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules['{package}'] = None\n"
        "import d1_signer.sandbox\n"
        "from d1_signer.sandbox import Counters, Fault\n"
        "from d1_signer.errors import MissingExtraError\n"
        "assert Fault('delay') is Fault.DELAY\n"
        "try:\n"
        "    from d1_signer.sandbox import Sandbox\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=dict(os.environ),
    )
    assert f"The package {package} is not installed" in done.stdout
    assert 'pip install "d1-signer[sandbox]"' in done.stdout


def test_unknown_names_are_not_there() -> None:
    import d1_signer.sandbox

    with pytest.raises(AttributeError):
        _ = d1_signer.sandbox.Nothing
