# SPDX-License-Identifier: Apache-2.0
"""nginx that asks for a client certificate, as a gateway does, and tells what it was shown.

Debian's `nginx-light`, unprivileged, with everything that it writes in one folder.
"""

from __future__ import annotations

import datetime as dt
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer.es256 import PublicKey
from tests.servers.certificates import self_signed
from tests.servers.process import accepts, free_port, running

_CONFIGURATION = """
daemon off;
master_process off;
error_log {folder}/error.log warn;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    log_format seen escape=json
        '$msec|$connection|$ssl_client_verify|$ssl_client_s_dn|$ssl_client_serial|'
        '$ssl_session_reused|$ssl_protocol|$uri';
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols {protocols};
        ssl_session_cache shared:sessions:1m;
        ssl_session_tickets on;
        ssl_client_certificate {authority};
        ssl_verify_client on;
        keepalive_requests {requests};
        access_log {folder}/access.log seen;
        location / {{ return 200 "served"; }}
    }}
}}
"""


class Authority:
    """Signs client certificates with any subject, which nginx tells."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("clients")
        self._folder = folder
        self.file = folder / "authority.pem"
        made = self._sign(self._name, self._key.public_key(), ca=True)
        self.file.write_bytes(made.public_bytes(Encoding.PEM))

    def certify(self, key: PublicKey, subject: str) -> x509.Certificate:
        return self._sign(_name(subject), key.cryptography_key(), ca=False)

    def write(self, key: PublicKey, subject: str, path: Path) -> int:
        """Put a new certificate where an older one may be, and return its serial number."""
        made = self.certify(key, subject)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(made.public_bytes(Encoding.PEM))
        fresh.replace(path)
        return made.serial_number

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=60))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self._key, SHA256())
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


@dataclass(frozen=True)
class Seen:
    """What nginx told of one request."""

    at: float
    connection: int
    verified: str
    subject: str
    serial: int
    resumed: bool
    protocol: str
    path: str


@dataclass(frozen=True)
class Nginx:
    """A running server."""

    port: int
    ca_file: Path
    log: Path
    authority: Authority

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def seen(self, number: int = 0) -> list[Seen]:
        """All requests so far; waits until there are so many, since it logs after it answers."""
        until = time.monotonic() + 10
        while True:
            lines = self.log.read_text().splitlines()
            if len(lines) >= number or time.monotonic() > until:
                return [_parsed(line) for line in lines]
            time.sleep(0.01)

    def connections(self) -> int:
        return len({each.connection for each in self.seen()})


def _parsed(line: str) -> Seen:
    at, connection, verified, subject, serial, reused, protocol, path = line.split("|")
    return Seen(
        at=float(at),
        connection=int(connection),
        verified=verified,
        subject=subject,
        serial=int(serial or "0", 16),
        resumed=reused == "r",
        protocol=protocol,
        path=path,
    )


@contextmanager
def nginx(
    folder: Path, *, protocols: str = "TLSv1.2 TLSv1.3", requests: int = 1000
) -> Iterator[Nginx]:
    """Start one.

    Args:
        folder: For what it reads and writes; empty.
        protocols: What it speaks, as ``ssl_protocols`` has it.
        requests: On one connection, before it ends that.
    """
    certificate, key = self_signed(folder)
    authority = Authority(folder)
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder,
            port=port,
            certificate=certificate,
            key=key,
            authority=authority.file,
            protocols=protocols,
            requests=requests,
        )
    )
    log = folder / "access.log"
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert program, "apt-get install nginx-light"
    command = [program, "-p", str(folder), "-c", str(configuration), "-e", f"{folder}/error.log"]

    with running(command, env={}, log=folder / "output.log", ready=lambda: accepts(port)):
        log.touch()
        yield Nginx(port, certificate, log, authority)
