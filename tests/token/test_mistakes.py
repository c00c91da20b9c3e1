# SPDX-License-Identifier: Apache-2.0
"""What people get wrong on the way to D1, and that each is told as what it is.

The table in docs/tls.md has a row for each mistake, as these tests find it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from d1_signer import (
    ClientCertificate,
    D1SignerError,
    Limits,
    Signer,
    TlsError,
    TokenFetcher,
    TokenRefusedError,
    TokenUnavailable,
    open_signer,
)
from d1_signer.sandbox import Sandbox
from d1_signer.transport import connections
from tests.cli.conftest import Run, no_settings, run
from tests.leaks.known import known
from tests.servers.certificates import Authority
from tests.servers.connect_proxy import ConnectProxy
from tests.servers.nginx import Nginx
from tests.servers.process import closed_port
from tests.token.conftest import ISSUER, KID

__all__ = ["no_settings", "run"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_attempt")

PAGE = (Path(__file__).parents[2] / "docs" / "tls.md").read_text()
SECRET = known("proxy-pass-word")
Pair = tuple[Path, Path]

PROXIES = {
    "proxy with a password": ConnectProxy(credentials="user:another-one"),
    "proxy that allows nothing": ConnectProxy(status=403),
    "proxy without a way": ConnectProxy(status=502),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """nginx before the sandbox, and everything beside it that people mistake for it."""

    ports: dict[str, int]
    audience: str
    ca_file: Path
    client: Pair
    expired: Pair
    not_yet: Pair
    foreign: Pair
    foreign_ca: Path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, pem_uri: str) -> Iterator[Scene]:
    folder: Path = tmp_path_factory.mktemp("gateway")
    (folder / "other").mkdir()
    authority, other = Authority(folder), Authority(folder / "other")
    here = authority.issue("server", x509.IPAddress(ip_address("127.0.0.1")))
    elsewhere = authority.issue("server", x509.DNSName("d1.example"))
    with Sandbox(issuer_id=ISSUER) as sandbox:
        register(sandbox, pem_uri)
        upstream = (
            f"location / {{ proxy_pass {sandbox.base_url.removesuffix('/authz/v1')};"
            f"proxy_ssl_certificate {sandbox.client_certificate};"
            f"proxy_ssl_certificate_key {sandbox.client_key}; }}"
        )
        verified = f"ssl_client_certificate {authority.ca_file}; ssl_verify_client on;\n"

        def page(status: int) -> str:
            return f"default_type text/html; return {status} '<html><body>no</body></html>';"

        gateway = Nginx(folder)
        ports = {
            "right": gateway.serve(verified + upstream, tls=here),
            "another host": gateway.serve(upstream, tls=elsewhere),
            "plain": gateway.serve(upstream, tls=None),
            "old": gateway.serve(
                "ssl_protocols TLSv1.1; ssl_ciphers ALL:@SECLEVEL=0;" + upstream, tls=here
            ),
            "other ciphers": gateway.serve(
                # For servers with RSA keys, which this one has not.
                "ssl_protocols TLSv1.2; ssl_ciphers ECDHE-RSA-AES256-GCM-SHA384;",
                tls=here,
            ),
            "unknown name": gateway.serve("ssl_reject_handshake on;", tls=here),
            "broken": gateway.serve(
                f"ssl_certificate {folder}/$ssl_server_name.pem;"
                f"ssl_certificate_key {folder}/$ssl_server_name.key;",
                tls=None,
                of_tls=True,
            ),
            "400": gateway.serve(page(400), tls=here),
            "403": gateway.serve(page(403), tls=here),
            "503": gateway.serve(page(503), tls=here),
            "redirect": gateway.serve("return 302 https://login.example/;", tls=here),
        }
        with gateway.running(), ExitStack() as stack:
            ports["closed"] = stack.enter_context(closed_port())
            for name, proxy in PROXIES.items():
                ports[name] = stack.enter_context(proxy.running()).port
            yield Scene(
                ports=ports,
                audience=f"{sandbox.base_url}/oauth2/token",
                ca_file=authority.ca_file,
                client=authority.issue("client"),
                expired=authority.issue("client", days=(-20, -10)),
                not_yet=authority.issue("client", days=(10, 20)),
                foreign=other.issue("client"),
                foreign_ca=other.ca_file,
            )


def register(sandbox: Sandbox, pem_uri: str) -> None:
    with open_signer(pem_uri, kid=KID) as signer:
        sandbox.register_key(KID, signer.public_key.jwk())


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake, made, and how it is told.

    Attributes:
        name: As the page has it.
        code: The error's.
        step: Where `check` fails.
        words: What the text has among others.
        retryable: Whether trying again can help.
        port: Of `Scene.ports`.
        certificate: Which certificate and which key; None for none.
        host: That is asked for.
        ca_file: Attribute of `Scene`.
        proxy: Of `Scene.ports`; empty for none.
        credentials: Whether the proxy is given a user and a password.
    """

    name: str
    code: str
    step: str
    words: str
    retryable: bool = False
    port: str = "right"
    certificate: tuple[str, str] | None = ("client", "client")
    host: str = "127.0.0.1"
    ca_file: str = "ca_file"
    proxy: str = ""
    credentials: bool = True

    def environment(self, scene: Scene) -> str:
        return f"https://{self.host}:{scene.ports[self.port]}/authz/v1"

    def pair(self, scene: Scene) -> Pair | None:
        if self.certificate is None:
            return None
        certificate, key = self.certificate
        return getattr(scene, certificate)[0], getattr(scene, key)[1]

    def proxy_url(self, scene: Scene) -> str | None:
        user = f"user:{SECRET}@" if self.credentials else ""
        return f"http://{user}127.0.0.1:{scene.ports[self.proxy]}" if self.proxy else None

    def row(self, error: D1SignerError, scene: Scene) -> str:
        """The row of the page: what is told, without what differs from run to run."""
        told = error.message.replace(self.environment(scene), "ENVIRONMENT")
        told = told.replace(str(scene.client[0]), "CERTIFICATE")
        told = told.replace(str(scene.foreign[1]), "KEY")
        told = re.sub(r"(127\.0\.0\.1|d1\.invalid):\d+", "HOST:PORT", told)
        told = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "DATE", told)
        # OpenSSL's own words, which differ among its releases.
        told = re.sub(r" \((?!HTTP)[a-z0-9 .]+\)", " (…)", told)
        again = "yes" if error.retryable else "no"
        return f"| {self.name} | `{error.code}` | {again} | `{self.step}` | {told} |"


AWAY = {"code": "token_unavailable", "step": "endpoint", "retryable": True}
MISTAKES = [
    Mistake(
        name="client certificate expired",
        code="tls",
        step="access-token",
        words="The client certificate expired on 20",
        certificate=("expired", "expired"),
    ),
    Mistake(
        name="client certificate not yet valid",
        code="tls",
        step="access-token",
        words="The client certificate is not valid before 20",
        certificate=("not_yet", "not_yet"),
    ),
    Mistake(
        name="client certificate of another CA",
        code="tls",
        step="access-token",
        words="refuses the client certificate",
        certificate=("foreign", "foreign"),
    ),
    Mistake(
        name="no client certificate",
        code="tls",
        step="access-token",
        words="No client certificate was given",
        certificate=None,
    ),
    Mistake(
        name="key of another certificate",
        code="configuration",
        step="client-certificate",
        words="does not belong to the client certificate",
        certificate=("client", "foreign"),
    ),
    Mistake(
        name="server of another name",
        code="tls",
        step="endpoint",
        words="not valid for '127.0.0.1'",
        port="another host",
    ),
    Mistake(
        name="wrong CA file",
        code="tls",
        step="endpoint",
        words="is not trusted: ",
        ca_file="foreign_ca",
    ),
    Mistake(name="proxy away", words="the proxy 127.0.0.1:", proxy="closed", **AWAY),  # type: ignore[arg-type]
    Mistake(
        name="proxy: wrong password",
        code="token_unavailable",
        step="endpoint",
        words="it answers HTTP 407, it refuses the credentials",
        proxy="proxy with a password",
    ),
    Mistake(
        name="proxy: no password given",
        code="token_unavailable",
        step="endpoint",
        words="it answers HTTP 407, it asks for credentials, and none are given",
        proxy="proxy with a password",
        credentials=False,
    ),
    Mistake(
        name="proxy: host not allowed",
        code="token_unavailable",
        step="endpoint",
        words="it answers HTTP 403, it does not let this host pass",
        proxy="proxy that allows nothing",
    ),
    Mistake(
        name="proxy: cannot reach D1",
        words="it answers HTTP 502, it does not reach the host now",
        proxy="proxy without a way",
        **AWAY,  # type: ignore[arg-type]
    ),
    Mistake(name="name unknown", words="its name failed", host="d1.invalid", **AWAY),  # type: ignore[arg-type]
    Mistake(name="port closed", words="the connection failed", port="closed", **AWAY),  # type: ignore[arg-type]
    Mistake(
        name="plain HTTP at an https URL",
        code="tls",
        step="endpoint",
        words="does not speak TLS",
        port="plain",
    ),
    Mistake(
        name="TLS 1.1 server",
        code="tls",
        step="endpoint",
        words="offers no TLS 1.2 or newer",
        port="old",
    ),
    Mistake(
        name="server with other cipher suites",
        code="tls",
        step="endpoint",
        words="no version or cipher suite of TLS in common",
        port="other ciphers",
    ),
    Mistake(
        name="server that does not know the host name",
        code="tls",
        step="endpoint",
        words="does not serve this host name",
        port="unknown name",
    ),
    Mistake(
        name="server with a fault in its TLS",
        code="token_unavailable",
        step="endpoint",
        words="TLS failed over there",
        retryable=True,
        port="broken",
    ),
    Mistake(
        name="gateway: 400 with a page",
        code="token_refused",
        step="access-token",
        words="(HTTP 400), which is not D1's answer",
        port="400",
    ),
    Mistake(
        name="gateway: 403 with a page",
        code="token_refused",
        step="access-token",
        words="(HTTP 403), which is not D1's answer",
        port="403",
    ),
    Mistake(
        name="gateway: 503 with a page",
        code="token_unavailable",
        step="access-token",
        words="(HTTP 503), which is not D1's answer",
        retryable=True,
        port="503",
    ),
    Mistake(
        name="redirect",
        code="token_response",
        step="access-token",
        words="with a redirect (HTTP 302)",
        port="redirect",
    ),
]


def fetcher_of(mistake: Mistake, scene: Scene, signer: Signer) -> TokenFetcher:
    pair = mistake.pair(scene)
    return TokenFetcher(
        signer,
        issuer_id=ISSUER,
        environment=mistake.environment(scene),
        client_certificate=ClientCertificate(*pair) if pair else None,
        ca_file=getattr(scene, mistake.ca_file),
        proxy=mistake.proxy_url(scene),
        audience=scene.audience,
    )


def arguments_of(mistake: Mistake, scene: Scene, key: str) -> list[str]:
    options = {
        "--key": f"{key}#test-key",
        "--issuer-id": ISSUER,
        "--environment": mistake.environment(scene),
        "--ca-file": str(getattr(scene, mistake.ca_file)),
        "--audience": scene.audience,
    }
    pair = mistake.pair(scene)
    if pair:
        options["--client-cert"], options["--client-key"] = map(str, pair)
    if mistake.proxy:
        options["--proxy"] = f"http://127.0.0.1:{scene.ports[mistake.proxy]}"
        if mistake.credentials:
            options["--proxy-credentials-source"] = "env:PROXY_CREDENTIALS"
    return [word for option in options.items() for word in option]


RIGHT = Mistake(name="none", code="", step="", words="")


def test_without_a_mistake_the_gateway_lets_through(
    scene: Scene, signer: Signer, run: Run, pem_uri: str
) -> None:
    with fetcher_of(RIGHT, scene, signer) as fetcher:
        assert fetcher.token().value
    result = run("check", "--json", *arguments_of(RIGHT, scene, pem_uri))
    assert result.document["ok"], result.out


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_told_as_what_it_is(
    scene: Scene,
    signer: Signer,
    run: Run,
    pem_uri: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Mistake,
) -> None:
    caplog.set_level(logging.WARNING, "d1_signer.token")
    monkeypatch.setenv("PROXY_CREDENTIALS", f"user:{SECRET}")

    def get() -> None:
        with fetcher_of(mistake, scene, signer) as fetcher:
            fetcher.token()

    with pytest.raises(D1SignerError) as failure:
        get()
    error = failure.value
    assert (error.code, error.retryable) == (mistake.code, mistake.retryable), error
    assert mistake.words in error.message
    assert error.hint
    if mistake.code != "configuration":  # before there is a fetcher that logs
        assert f"token.failed code={mistake.code}" in caplog.text
        assert mistake.words in caplog.text
        assert f"{mistake.host}:{scene.ports[mistake.port]}" in error.message
    texts = [str(error), repr(error), str(error.details), caplog.text]

    asked = run("token", "--json", *arguments_of(mistake, scene, pem_uri))
    assert asked.status != 0
    assert asked.document["code"] == mistake.code
    assert mistake.words in asked.document["message"]

    checked = run("check", "--json", *arguments_of(mistake, scene, pem_uri))
    stopped = checked.document["stopped_at"]
    assert (stopped["step"], stopped["error"]["code"]) == (mistake.step, mistake.code)
    assert mistake.words in stopped["detail"]
    assert "d1-signer check" not in checked.out
    if mistake.step == "access-token":
        (endpoint,) = (s for s in checked.document["steps"] if s["step"] == "endpoint")
        assert endpoint["status"] == "unclear"
        assert mistake.words in endpoint["detail"]
    assert not [text for text in [*texts, asked.out, checked.out] if SECRET in text]
    row = mistake.row(error, scene)
    assert row in PAGE.splitlines(), row


def test_the_page_has_these_mistakes_and_no_others() -> None:
    section = PAGE.partition("## What each mistake looks like")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [m.name for m in MISTAKES]


# -- servers that say less ------------------------------------------------------------------------


@dataclass
class Server:
    """A TLS server that takes connections one by one."""

    context: ssl.SSLContext
    listener: socket.socket
    answer: bytes | None = None
    served: int = 0
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.port = self.listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            try:
                plain = self.listener.accept()[0]
            except OSError:
                return
            self.served += 1
            with (
                contextlib.suppress(OSError),  # a client that ends the handshake
                self.context.wrap_socket(plain, server_side=True) as sock,
            ):
                if self.answer is not None:
                    sock.recv(1 << 16)
                    sock.sendall(self.answer)


@contextmanager
def tls_server(
    scene: Scene, pair: Pair, *, version: ssl.TLSVersion, asks: bool, answer: bytes | None = None
) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(*pair)
    if asks:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(scene.ca_file)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(context, listener, answer)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server_pair(tmp_path_factory: pytest.TempPathFactory, scene: Scene) -> tuple[Scene, Pair]:
    folder: Path = tmp_path_factory.mktemp("server")
    authority = Authority(folder)
    pair = authority.issue("server", x509.IPAddress(ip_address("127.0.0.1")))
    # These servers are of another authority than the clients' certificates.
    own = replace(scene, foreign_ca=authority.ca_file)
    return own, pair


def failed_at(server: Server, scene: Scene, signer: Signer, pair: Pair | None) -> D1SignerError:
    fetcher = TokenFetcher(
        signer,
        issuer_id=ISSUER,
        environment=f"https://127.0.0.1:{server.port}/authz/v1",
        client_certificate=ClientCertificate(*pair) if pair else None,
        ca_file=scene.foreign_ca,
    )
    with fetcher, pytest.raises(D1SignerError) as failure:
        fetcher.token()
    assert f"127.0.0.1:{server.port}" in failure.value.message
    return failure.value


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("none", "No client certificate was given"),
        ("expired", "expired on"),
        ("not_yet", "is not valid before"),
        ("foreign", "for the client certificate"),
    ],
)
def test_an_alert_about_the_client_certificate(
    server_pair: tuple[Scene, Pair], signer: Signer, version: ssl.TLSVersion, which: str, words: str
) -> None:
    scene, pair = server_pair
    with tls_server(scene, pair, version=version, asks=True) as server:
        error = failed_at(server, scene, signer, getattr(scene, which, None))
        assert server.served == 1
    assert isinstance(error, TlsError)
    assert not error.retryable
    assert words in str(error)
    assert f"https://127.0.0.1:{server.port}/authz/v1" in error.hint


@pytest.mark.parametrize("reset", [False, True])
def test_an_alert_is_read_although_the_server_is_gone(
    server_pair: tuple[Scene, Pair], signer: Signer, monkeypatch: pytest.MonkeyPatch, *, reset: bool
) -> None:
    scene, pair = server_pair
    sends = connections._Connection._send

    def late(connection: Any, data: Any) -> None:
        # When the server has refused and left, as in some of the flights to a server far away.
        poll = select.poll()
        poll.register(connection.sock, select.POLLRDHUP)
        assert poll.poll(10_000)
        if reset:
            # What the kernel says of the first bytes that are sent to one who is gone.
            sends(connection, data)
            poll.register(connection.sock, 0)
            assert poll.poll(10_000)
        sends(connection, data)

    monkeypatch.setattr(connections._Connection, "_send", late)
    with tls_server(scene, pair, version=ssl.TLSVersion.TLSv1_3, asks=True) as server:
        codes = {failed_at(server, scene, signer, None).code for _ in range(20)}
        assert server.served == 20
    assert codes == {"tls"}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_only_closes_points_to_the_certificate(
    server_pair: tuple[Scene, Pair], signer: Signer, version: ssl.TLSVersion
) -> None:
    scene, pair = server_pair
    with tls_server(scene, pair, version=version, asks=False) as server:
        error = failed_at(server, scene, signer, scene.client)
        assert isinstance(error, TokenUnavailable)
        assert error.details["failed"] == "answer"
        assert "the likely cause is: the client certificate" in error.hint
        assert f"https://127.0.0.1:{server.port}/authz/v1" in error.hint
        assert "no client certificate was given" in failed_at(server, scene, signer, None).hint
        error = failed_at(server, scene, signer, scene.expired)
        assert isinstance(error, TlsError)
        assert "expired on" in error.message


PAGES = [
    (b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html", b"<p>No required SSL certificate"),
    (
        b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json",
        b'{"message":"TLS certificate',
    ),
    (b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html", b"<h2>403.7 Client certificate needed"),
    (b"HTTP/1.1 496 Unknown", b""),
]


@pytest.mark.parametrize(("head", "body"), PAGES)
def test_gateways_that_name_the_certificate(
    server_pair: tuple[Scene, Pair], signer: Signer, head: bytes, body: bytes
) -> None:
    error = refused_with(server_pair, signer, head, body)
    assert isinstance(error, TlsError)
    assert "which is not D1's answer" in error.message
    assert "test authority" in error.hint


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "invalid_client", "error_description": "client certificate not known"}',
        b'{"error": "invalid_grant"}',
        b"",
    ],
)
def test_what_may_be_d1s_own_refusal_stays_d1s(
    server_pair: tuple[Scene, Pair], signer: Signer, body: bytes
) -> None:
    error = refused_with(server_pair, signer, b"HTTP/1.1 400 Bad Request", body)
    assert isinstance(error, TokenRefusedError)
    assert error.message.startswith("D1 refused the assertion (HTTP 400)")


def refused_with(
    server_pair: tuple[Scene, Pair], signer: Signer, head: bytes, body: bytes
) -> D1SignerError:
    scene, pair = server_pair
    answer = head + b"\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with tls_server(
        scene, pair, version=ssl.TLSVersion.TLSv1_3, asks=False, answer=answer
    ) as server:
        fetcher = TokenFetcher(
            signer,
            issuer_id=ISSUER,
            environment=f"https://127.0.0.1:{server.port}/authz/v1",
            client_certificate=ClientCertificate(*scene.client),
            ca_file=scene.foreign_ca,
        )
        with fetcher, pytest.raises(D1SignerError) as failure:
            fetcher.token()
    return failure.value


# -- the stage at which there is no answer --------------------------------------------------------


@contextmanager
def plain_server(says: bytes | None, *, resets: bool = False) -> Iterator[int]:
    """A server that reads once, then says something or resets; with None it holds still."""
    ended = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                with sock, contextlib.suppress(OSError):
                    sock.recv(1 << 16)
                    if resets:
                        linger = struct.pack("ii", 1, 0)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    elif says is None:
                        ended.wait(20)
                    else:
                        sock.sendall(says)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def stage_of(signer: Signer, environment: str, proxy: str | None = None) -> tuple[str, str]:
    limits = Limits(total=1.0, connect=0.5, read=0.5)
    fetcher = TokenFetcher(
        signer, issuer_id=ISSUER, environment=environment, proxy=proxy, limits=limits
    )
    with fetcher, pytest.raises(TokenUnavailable) as failure:
        fetcher.token()
    assert SECRET not in f"{failure.value} {failure.value.details}"
    return str(failure.value.details["failed"]), failure.value.message


@pytest.mark.parametrize(
    ("says", "resets", "words"),
    [
        (None, False, "TLS failed: the handshake did not end in time"),
        (b"", False, "TLS failed: the connection was closed amid the handshake"),
        (b"", True, "TLS failed: the connection was closed amid the handshake"),
    ],
)
def test_a_handshake_that_ends_early(
    signer: Signer, says: bytes | None, words: str, *, resets: bool
) -> None:
    with plain_server(says, resets=resets) as port:
        stage, message = stage_of(signer, f"https://127.0.0.1:{port}")
    assert stage == "tls"
    assert words in message


@pytest.mark.parametrize(
    ("says", "resets", "words"),
    [
        (None, False, "the answer failed: no answer within 0."),
        (b"", False, "the answer failed: the connection was closed before"),
        (b"", True, "the answer failed: connection reset by peer"),
    ],
)
def test_an_answer_that_does_not_come(
    signer: Signer, says: bytes | None, words: str, *, resets: bool
) -> None:
    with plain_server(says, resets=resets) as port:
        stage, message = stage_of(signer, f"http://127.0.0.1:{port}")
    assert stage == "answer"
    assert words in message


@pytest.mark.parametrize(
    ("says", "resets", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", False, "it answers HTTP 407"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False, "it answers HTTP 503"),
        (b"", True, "connection reset by peer"),
    ],
)
def test_a_proxy_that_does_not_connect(
    signer: Signer, says: bytes, words: str, *, resets: bool
) -> None:
    with plain_server(says, resets=resets) as port:
        proxy = f"http://user:{SECRET}@127.0.0.1:{port}"
        stage, message = stage_of(signer, "https://d1.invalid:8443/authz/v1", proxy)
    assert stage == "proxy"
    assert f"the proxy 127.0.0.1:{port} failed: {words}" in message
    assert "d1.invalid:8443" in message


def test_a_proxy_whose_name_is_not_known(signer: Signer) -> None:
    proxy = f"http://user:{SECRET}@proxy.invalid:3128"
    stage, message = stage_of(signer, "https://127.0.0.1:8443/authz/v1", proxy)
    assert stage == "proxy"
    assert "the proxy proxy.invalid:3128 failed: the host name is not known here" in message
