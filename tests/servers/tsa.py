# SPDX-License-Identifier: Apache-2.0
"""A time-stamp authority on loopback: `openssl ts` behind a small HTTP server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CONFIG = """
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[tsa]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
[ts]
serial = {folder}/serial
default_policy = 1.2.3.4.1
digests = sha256
signer_digest = sha256
accuracy = secs:1
ess_cert_id_alg = sha256
"""


@dataclass
class Tsa:
    """A running authority.

    Attributes:
        folder: Its files.
        answer: Alters what is answered.
        status: HTTP status of answers.
    """

    folder: Path
    url: str = ""
    status: int = 200
    answer: Callable[[bytes], bytes] = field(default=lambda response: response)

    @property
    def ca_file(self) -> Path:
        return self.folder / "root.pem"

    def openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=self.folder, check=True, capture_output=True, timeout=60
        )

    def reply(self, query: bytes) -> bytes:
        (self.folder / "query").write_bytes(query)
        self.openssl(
            *("ts", "-reply", "-config", "config", "-section", "ts", "-queryfile", "query"),
            *("-signer", "tsa.pem", "-inkey", "tsa.key", "-chain", "middle.pem", "-out", "reply"),
        )
        return (self.folder / "reply").read_bytes()


def _issue(tsa: Tsa, name: str, issuer: str | None, section: str, key: str) -> None:
    made = {"ec": ("ec", "ec_paramgen_curve:P-256"), "rsa": ("rsa", "rsa_keygen_bits:2048")}[key]
    tsa.openssl(
        *("genpkey", "-algorithm", made[0].upper(), "-pkeyopt", made[1], "-out", f"{name}.key")
    )
    tsa.openssl("req", "-new", "-key", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr")
    signing = ["-signkey", f"{name}.key"]
    if issuer is not None:
        signing = ["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key", "-CAcreateserial"]
    tsa.openssl(
        *("x509", "-req", "-in", f"{name}.csr", *signing, "-days", "30"),
        *("-extfile", "config", "-extensions", section, "-out", f"{name}.pem"),
    )


@contextmanager
def tsa(folder: Path, *, key: str = "ec", usage: str = "critical, timeStamping") -> Iterator[Tsa]:
    """Run one whose certificate has this key and extended key usage."""
    folder.mkdir()
    authority = Tsa(folder)
    (folder / "serial").write_text("01\n")
    (folder / "config").write_text(_CONFIG.format(folder=folder, usage=usage))
    _issue(authority, "root", None, "root", key)
    _issue(authority, "middle", "root", "root", key)
    _issue(authority, "tsa", "middle", "tsa", key)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/timestamp-query"
            body = authority.answer(authority.reply(query))
            self.send_response(authority.status)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    authority.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield authority
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
