# SPDX-License-Identifier: Apache-2.0
"""Files of mutual TLS as they are found: pipes, endless, unreadable or changed half-way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from d1_signer import (
    ClientCertificate,
    ConfigurationError,
    D1SignerError,
    InvalidKeyError,
    LazySigner,
    Signer,
    TokenFetcher,
    errors,
    generate_key,
    open_signer,
)
from d1_signer.events import Event, SignEvent
from d1_signer.sandbox import Sandbox
from d1_signer.transport import client
from d1_signer.transport.client import ClientTls
from d1_signer.transport.tls import verifying_context
from tests.owners import give_away
from tests.token.conftest import FetcherMaker
from tests.transport.in_memory import Pair
from tests.transport.test_client_key import request_of
from tests.transport.test_renewed_files import ping, put, serial

PASSPHRASES = (b"correct horse battery", b"another horse")


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_LOOK_INTERVAL", 0.0)


class Files:
    """Certificate, key, CA file and passphrase in places of their own, and what is renewed."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox = sandbox
        self.certificate, self.key = folder / "tls.pem", folder / "tls.key"
        self.ca_file, self.passphrase = folder / "ca.pem", folder / "passphrase"
        put(sandbox.client_certificate, self.certificate)
        put(sandbox.client_key, self.key)
        put(sandbox.ca_file, self.ca_file)

    def renew(self, passphrase: bytes | None = None) -> int:
        """A new certificate and key; returns its serial number."""
        certificate, key = self.sandbox.issue_client_certificate(passphrase=passphrase)
        put(key, self.key)
        put(certificate, self.certificate)
        return serial(certificate)

    def client(self, **options: Any) -> ClientCertificate:
        return ClientCertificate(self.certificate, self.key, **options)


@pytest.fixture
def files(sandbox: Sandbox, tmp_path: Path) -> Files:
    return Files(sandbox, tmp_path)


def shown(fetcher: TokenFetcher) -> int:
    """The serial number of what it shows, after a call that the server took."""
    assert ping(fetcher) == 200
    certificate = fetcher._tls.certificate
    assert certificate is not None
    return certificate.serial_number


# -- what is no file of a certificate -------------------------------------------------------------


def a_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 1 << 36)


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [a_pipe, endless, huge, a_folder])
@pytest.mark.parametrize("which", ["certificate", "key", "ca_file"])
def test_what_is_no_file_keeps_nobody(
    make_fetcher: FetcherMaker, files: Files, which: str, kind: Callable[[Path], None]
) -> None:
    fetcher = make_fetcher(client_certificate=files.client(), ca_file=files.ca_file)
    before = shown(fetcher)
    path: Path = getattr(files, which)
    path.unlink()
    kind(path)
    assert shown(fetcher) == before
    with pytest.raises(ConfigurationError, match=r"regular file|1 MiB|directory"):
        fetcher.reload()
    with pytest.raises(ConfigurationError, match=r"regular file|1 MiB|directory"):
        make_fetcher(client_certificate=files.client(), ca_file=files.ca_file)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [a_pipe, endless, huge, a_folder])
def test_the_authorities_of_a_key_service_are_read_with_the_same_care(
    tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    kind(tmp_path / "ca.pem")
    with pytest.raises(OSError, match=r"regular file|1 MiB|directory"):
        verifying_context(str(tmp_path / "ca.pem"))


# -- what is tried again --------------------------------------------------------------------------


def test_a_key_whose_permissions_are_mended_is_taken(
    make_fetcher: FetcherMaker,
    files: Files,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At once, and not only when the same is tried again.
    monkeypatch.setattr(client, "_LOOK_INTERVAL", 600.0)
    fetcher = make_fetcher(client_certificate=files.client())
    before = shown(fetcher)
    certificate, key = files.sandbox.issue_client_certificate()
    key.chmod(0o644)
    put(key, files.key)
    put(certificate, files.certificate)
    files.key.chmod(0o644)
    with caplog.at_level(logging.WARNING, "d1_signer.tls"):
        assert [shown(fetcher) for _ in range(5)] == [before] * 5
    assert caplog.text.count("tls.files_unusable") == 1
    files.key.chmod(0o600)
    assert shown(fetcher) == serial(certificate)


def test_key_and_passphrase_of_another_user_need_that_user_to_be_trusted(
    make_fetcher: FetcherMaker, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = files.renew(PASSPHRASES[0])
    files.passphrase.touch(0o600)
    files.passphrase.write_bytes(PASSPHRASES[0])
    give_away(files.passphrase, monkeypatch)
    owner = give_away(files.key, monkeypatch)
    source = f"file:{files.passphrase}"
    with pytest.raises(errors.SecretSourceError, match="another user"):
        make_fetcher(client_certificate=files.client(passphrase=source))
    trusting = files.client(passphrase=source, trusted_owner=owner)
    assert shown(make_fetcher(client_certificate=trusting)) == after


@pytest.mark.parametrize("owner", ["root", True, 1.5])
def test_trusted_owner_that_is_no_number_is_refused(files: Files, owner: object) -> None:
    with pytest.raises(errors.ConfigurationError, match="uid"):
        files.client(trusted_owner=owner)


def test_what_does_not_show_in_the_files_is_tried_again(
    make_fetcher: FetcherMaker, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLS_PASSPHRASE", PASSPHRASES[0].decode())
    files.renew(PASSPHRASES[0])
    fetcher = make_fetcher(client_certificate=files.client(passphrase="env:TLS_PASSPHRASE"))
    before = shown(fetcher)
    after = files.renew(PASSPHRASES[1])
    assert shown(fetcher) == before
    monkeypatch.setenv("TLS_PASSPHRASE", PASSPHRASES[1].decode())
    assert shown(fetcher) == after


def test_a_passphrase_that_comes_last_is_taken(
    make_fetcher: FetcherMaker, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LOOK_INTERVAL", 600.0)

    def write(passphrase: bytes) -> None:
        files.passphrase.touch(0o600)
        files.passphrase.write_bytes(passphrase + b"\n")

    write(PASSPHRASES[0])
    files.renew(PASSPHRASES[0])
    source = f"file:{files.passphrase}"
    fetcher = make_fetcher(client_certificate=files.client(passphrase=source))
    before = shown(fetcher)
    after = files.renew(PASSPHRASES[1])
    assert shown(fetcher) == before
    write(PASSPHRASES[1])
    assert shown(fetcher) == after


def test_a_function_is_asked_once_for_each_key_and_again_after_a_failure(
    make_fetcher: FetcherMaker, files: Files
) -> None:
    answers = [PASSPHRASES[0], b"wrong", PASSPHRASES[1]]
    asked = 0

    def passphrase() -> bytes:
        nonlocal asked
        asked += 1
        return answers[asked - 1]

    files.renew(PASSPHRASES[0])
    fetcher = make_fetcher(client_certificate=files.client(passphrase=passphrase))
    for _ in range(5):
        _ = fetcher.ssl_context
    assert asked == 1
    after = files.renew(PASSPHRASES[1])
    with pytest.raises(D1SignerError):
        fetcher.reload()
    assert shown(fetcher) == after
    assert asked == 3


def test_a_new_connection_waits_for_no_interval_and_what_fails_does(
    make_fetcher: FetcherMaker, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LOOK_INTERVAL", 600.0)
    asked: list[bytes] = []

    def passphrase() -> bytes:
        asked.append(PASSPHRASES[0])
        return PASSPHRASES[0]

    fetcher = make_fetcher(client_certificate=files.client(passphrase=passphrase))
    context: Any = fetcher.ssl_context

    def call() -> int:
        with httpx.Client(verify=context, trust_env=False) as http:
            assert http.get(f"{files.sandbox.banking_url}/ping").status_code == 401
        number: int = context.client_certificate.serial_number
        return number

    call()
    after = files.renew()
    assert call() == after
    files.renew(PASSPHRASES[1])
    assert [call() for _ in range(5)] == [after] * 5
    assert len(asked) == 1


# -- all contexts hold the same -------------------------------------------------------------------


def test_each_file_is_read_once_for_all_contexts(make_fetcher: FetcherMaker, files: Files) -> None:
    opened: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and arguments[1] is None:  # by os.open()
            opened.append(str(arguments[0]))

    fetcher = make_fetcher(client_certificate=files.client(), ca_file=files.ca_file)
    contexts = [fetcher.ssl_context for _ in range(4)]
    files.renew()
    sys.addaudithook(hook)  # which stays for the process
    watching = True
    fetcher.reload()
    contexts += [fetcher.ssl_context for _ in range(4)]
    watching = False
    paths = [files.ca_file, files.certificate, files.key]
    assert [path for path in opened if path in map(str, paths)] == [str(path) for path in paths]
    certificates = {context.client_certificate for context in contexts}  # type: ignore[attr-defined]
    assert certificates == {fetcher._tls.certificate}


def test_a_renewal_that_fails_half_way_leaves_no_context_changed(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    contexts = [pair.tls.context() for _ in range(3)]
    before = pair.tls.certificate

    def no_memory(_: bytes) -> None:
        raise MemoryError

    pair.authority.write(pair.signer.public_key, "client", pair.path)
    contexts[1].trust = no_memory  # type: ignore[attr-defined]
    with pytest.raises(MemoryError):
        pair.tls.reload()
    del contexts[1].trust  # type: ignore[attr-defined]
    # Nor is the one that could not be changed without a certificate.
    assert pair.tls.certificate == before
    for context in contexts:
        assert context.client_certificate == before  # type: ignore[attr-defined]
        context.before_each = lambda: None  # type: ignore[attr-defined]
        pair.handshake(context)
        del context.before_each  # type: ignore[attr-defined]
    for context in contexts:
        context.before_each = pair.tls.look  # type: ignore[attr-defined]
    for context in contexts:
        pair.handshake(context)
        assert context.client_certificate == pair.tls.certificate != before  # type: ignore[attr-defined]


FORK_AMID_A_RENEWAL = """
import os, ssl, sys, threading, time
from pathlib import Path
from d1_signer.transport.processes import fork_gate
from tests.transport.in_memory import Pair

pair = Pair(Path(sys.argv[1]))
contexts = [pair.tls.context() for _ in range(5)]
before = pair.tls.certificate
pair.authority.write(pair.signer.public_key, "client", pair.path)
half_way = threading.Event()
trust = type(contexts[0]).trust

def trusting(number):
    def slowly(authorities):
        trust(contexts[number], authorities)
        half_way.set()
        while not fork_gate._forks:  # until the fork waits
            time.sleep(0.001)
    return slowly

for number in range(5):
    contexts[number].trust = trusting(number)
thread = threading.Thread(target=pair.tls.reload)
thread.start()
half_way.wait(20)
child = os.fork()
if child == 0:
    status = 1
    try:
        new = pair.tls.certificate
        whole = all(context.client_certificate == new != before for context in contexts)
        for context in contexts:
            pair.handshake(context)
            del context.trust
        # And it goes on from there.
        pair.authority.write(pair.signer.public_key, "client", pair.path)
        pair.tls.reload()
        for context in contexts:
            pair.handshake(context)
        status = 7 if whole and pair.tls.certificate != new else 2
    finally:
        os._exit(status)
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_of_a_fork_amid_a_renewal_has_it_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK_AMID_A_RENEWAL, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.stdout.split() == ["7"], ran.stderr


# -- certificates and keys ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate on a curve that `cryptography` does not know."""
    folder: Path = tmp_path_factory.mktemp("odd")
    certificate, key = folder / "odd.pem", folder / "odd.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp224k1 -nodes -days 60"
    subprocess.run(
        [*command.split(), "-subj", "/CN=odd", "-out", certificate, "-keyout", key],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    return certificate, key


def test_a_certificate_on_an_unknown_curve_is_none_of_a_signers(
    make_fetcher: FetcherMaker, files: Files, odd_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with open_signer(generate_key((tmp_path / "key.pem").as_uri()).uri) as signer:
        certificate = files.sandbox.sign_client_request(request_of(signer))
        put(certificate, files.certificate)
        fetcher = make_fetcher(client_certificate=ClientCertificate(files.certificate, signer))
        put(odd_pair[0], files.certificate)
        assert shown(fetcher) == serial(certificate)
        with pytest.raises(InvalidKeyError, match="not for a P-256 key"):
            fetcher.reload()


def test_a_key_file_on_an_unknown_curve_is_openssls_affair(
    make_fetcher: FetcherMaker, files: Files, odd_pair: tuple[Path, Path]
) -> None:
    fetcher = make_fetcher(client_certificate=files.client())
    put(odd_pair[1], files.key)
    put(odd_pair[0], files.certificate)
    fetcher._tls.look()
    fetcher.reload()
    assert fetcher._tls.certificate is not None
    assert fetcher._tls.certificate.serial_number == serial(odd_pair[0])


def test_the_key_of_assertions_is_not_taken_later_either(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer, tmp_path: Path
) -> None:
    with open_signer(generate_key((tmp_path / "key.pem").as_uri()).uri) as own:
        path = tmp_path / "tls.pem"
        right = sandbox.sign_client_request(request_of(own))
        put(right, path)
        fetcher = make_fetcher(client_certificate=ClientCertificate(path, [signer, own]))
        put(sandbox.sign_client_request(request_of(signer)), path)
        assert shown(fetcher) == serial(right)
        with pytest.raises(ConfigurationError, match="key that signs assertions"):
            fetcher.reload()
        assert shown(fetcher) == serial(right)


def test_nor_in_a_context_that_another_fetcher_made(
    make_fetcher: FetcherMaker, sandbox: Sandbox, signer: Signer
) -> None:
    certificate = sandbox.sign_client_request(request_of(signer))
    context = ClientTls(ClientCertificate(certificate, signer), sandbox.ca_file).context()
    with pytest.raises(ConfigurationError, match="key that signs assertions"):
        make_fetcher(client_certificate=context, ca_file=None)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_signer_that_is_closed_leaves_it_to_the_next(
    make_fetcher: FetcherMaker, sandbox: Sandbox, tmp_path: Path, *, lazy: bool
) -> None:
    uri = generate_key((tmp_path / "key.pem").as_uri()).uri
    events: list[Event] = []
    with (
        open_signer(uri, kid="tls") as closed,
        open_signer(uri, kid="tls", observers=[events.append]) as signer,
    ):
        certificate = sandbox.sign_client_request(request_of(signer))
        first: Signer | LazySigner = closed
        if lazy:
            first = LazySigner(lambda: closed, kid="tls", public_key=signer.public_key)
        fetcher = make_fetcher(client_certificate=ClientCertificate(certificate, [first, signer]))
        first.close()
        events.clear()
        assert ping(fetcher) == 200
    assert [event for event in events if isinstance(event, SignEvent) and event.use]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "2", None, True])
def test_a_timeout_that_is_none(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        ClientCertificate("client.pem", "client.key", timeout=timeout)


def test_a_passphrase_that_is_too_long(make_fetcher: FetcherMaker, files: Files) -> None:
    files.renew(PASSPHRASES[0])
    with pytest.raises(ConfigurationError, match="passphrase is longer"):
        make_fetcher(client_certificate=files.client(passphrase=lambda: "a" * 5000))


def test_a_passphrase_that_does_not_open_the_key_is_told_as_that(
    make_fetcher: FetcherMaker, files: Files
) -> None:
    files.renew(PASSPHRASES[0])
    with pytest.raises(D1SignerError) as failure:
        make_fetcher(client_certificate=files.client(passphrase=lambda: "wrong"))
    assert failure.value.hint.startswith("Look at the source of its passphrase")
    with pytest.raises(D1SignerError) as failure:
        make_fetcher(client_certificate=files.client())
    assert failure.value.hint.startswith("Name the source of its passphrase")


def test_a_key_of_another_kind_than_the_certificates_is_another_ones(
    make_fetcher: FetcherMaker, files: Files
) -> None:
    certificate, _ = files.sandbox.issue_client_certificate(key="rsa")
    put(certificate, files.certificate)
    with pytest.raises(ConfigurationError, match="does not belong to the client certificate"):
        make_fetcher(client_certificate=files.client())


@pytest.mark.parametrize("by_signer", [False, True])
def test_a_chain_that_stands_first_is_told_of(
    make_fetcher: FetcherMaker, files: Files, *, by_signer: bool
) -> None:
    own = files.certificate.read_bytes()
    files.certificate.write_bytes(files.ca_file.read_bytes() + own)
    with open_signer(files.key.as_uri()) as signer:
        client = ClientCertificate(files.certificate, signer if by_signer else files.key)
        with pytest.raises(D1SignerError) as failure:
            make_fetcher(client_certificate=client)
    assert "stands first in its file" in failure.value.hint


def test_no_secret_stands_in_an_error_of_a_key(make_fetcher: FetcherMaker, files: Files) -> None:
    files.renew(PASSPHRASES[0])
    client_certificate = files.client(passphrase=lambda: PASSPHRASES[1])
    key = files.key.read_text()
    with pytest.raises(D1SignerError) as failure:
        make_fetcher(client_certificate=client_certificate)
    told = [repr(failure.value)]
    frame = failure.value.__traceback__
    while frame is not None:
        if "/tests/" not in frame.tb_frame.f_code.co_filename:
            told += [repr(value) for value in frame.tb_frame.f_locals.values()]
        frame = frame.tb_next
    line = key.splitlines()[2]
    assert not [text for text in told if line in text or PASSPHRASES[1].decode() in text]
    assert told
    load_pem_private_key(key.encode(), PASSPHRASES[0])
