# SPDX-License-Identifier: Apache-2.0
"""What gives credentials, on loopback: as STS, SSO, a container's and an instance's endpoint do for
boto3, and a token endpoint, STS and the metadata server for google-auth.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from tests.leaks.known import known

AWS_SECRET = known("secret-access-key-of-the-source")
_STS = "https://sts.amazonaws.com/doc/2011-06-15/"
_OAUTH = "urn:ietf:params:oauth"
_OF_GOOGLE = "/computeMetadata/v1"
_ACCOUNT = f"{_OF_GOOGLE}/instance/service-accounts/default"
_TOKEN_OF_IMDS = "metadata-session"


@dataclass
class Source:
    """Gives out credentials, one after the other.

    Attributes:
        lifetime: Seconds that those given out from now on are good.
        down: ``""``, ``"fails"`` (status 503) or ``"hangs"``.
        refusal: Status, code and text with which STS refuses, or None.
        given: When each ends, on ``time.time()``.
        asked: What was asked, a word for each.
    """

    lifetime: float = 3600.0
    down: str = ""
    refusal: tuple[int, str, str] | None = None
    port: int = 0
    given: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next(self, prefix: str) -> tuple[str, float]:
        with self._lock:
            name = f"{prefix}{len(self.given):06}"
            self.given[name] = time.time() + self.lifetime
            return name, self.given[name]

    def is_good(self, name: str) -> bool:
        return self.given.get(name, 0.0) > time.time()

    def keys(self) -> dict[str, Any]:
        """An access key with its session token, as the metadata services tell it."""
        name, ends = self.next("AKSOURCE")
        return {
            "Code": "Success",
            "AccessKeyId": name,
            "SecretAccessKey": AWS_SECRET,
            "Token": f"session-token-of-{name}",
            "Expiration": _iso(ends),
        }

    def token(self) -> dict[str, Any]:
        """An access token, as OAuth tells it."""
        name, _ = self.next("ya29-token-")
        return {"access_token": name, "expires_in": int(self.lifetime), "token_type": "Bearer"}

    def answer(self, path: str, body: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        asked = parse_qs(body)
        action = asked.get("Action", [path])[0]
        self.asked.append(action)
        if self.down == "hangs":
            self.released.wait(60)
        if self.down:
            return 503, "text/plain", "restarting"
        if "Action" in asked:
            return self._sts(action)
        told = self._of_aws(path) or self._of_google(path)
        is_text = isinstance(told, str)
        return 200, "text/plain" if is_text else "application/json", _text(told)

    def _of_aws(self, path: str) -> str | dict[str, Any] | None:
        if path.startswith("/federation/credentials"):
            return self._of_sso()
        if path.startswith("/latest/api/token"):
            return _TOKEN_OF_IMDS
        if path.endswith("/security-credentials/"):
            return "role"
        return self.keys() if path.startswith(("/latest/meta-data", "/container")) else None

    def _of_google(self, path: str) -> str | dict[str, Any]:
        if path.startswith(_ACCOUNT) and not path.startswith(f"{_ACCOUNT}/token"):
            return {"email": "d1@bank.example", "scopes": [], "aliases": []}
        if path.startswith(f"{_OF_GOOGLE}/universe"):
            return "googleapis.com"
        if path.startswith(f"{_OF_GOOGLE}/project") or path == "/":
            return "bank"
        if path.endswith(":generateAccessToken"):
            name, ends = self.next("ya29-token-")
            return {"accessToken": name, "expireTime": f"{_iso(ends)[:19]}Z"}
        return {**self.token(), "issued_token_type": f"{_OAUTH}:token-type:access_token"}

    def _of_sso(self) -> dict[str, Any]:
        told = self.keys()
        given = {
            "accessKeyId": told["AccessKeyId"],
            "secretAccessKey": told["SecretAccessKey"],
            "sessionToken": told["Token"],
            "expiration": int(self.given[told["AccessKeyId"]] * 1000),
        }
        return {"roleCredentials": given}

    def _sts(self, action: str) -> tuple[int, str, str]:
        if self.refusal:
            status, code, text = self.refusal
            refusal = (
                f'<ErrorResponse xmlns="{_STS}"><Error><Type>Sender</Type><Code>{code}</Code>'
                f"<Message>{text}</Message></Error><RequestId>sts-17</RequestId></ErrorResponse>"
            )
            return status, "text/xml", refusal
        told = self.keys()
        assumed = (
            f'<{action}Response xmlns="{_STS}"><{action}Result>'
            "<AssumedRoleUser><AssumedRoleId>AROA:d1</AssumedRoleId>"
            "<Arn>arn:aws:sts::000000000000:assumed-role/d1/d1</Arn></AssumedRoleUser>"
            f"<Credentials><AccessKeyId>{told['AccessKeyId']}</AccessKeyId>"
            f"<SecretAccessKey>{told['SecretAccessKey']}</SecretAccessKey>"
            f"<SessionToken>{told['Token']}</SessionToken>"
            f"<Expiration>{told['Expiration']}</Expiration></Credentials>"
            f"</{action}Result><ResponseMetadata><RequestId>sts-1</RequestId></ResponseMetadata>"
            f"</{action}Response>"
        )
        return 200, "text/xml", assumed


def _text(told: str | dict[str, Any]) -> str:
    return told if isinstance(told, str) else json.dumps(told)


def _iso(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    source: Source

    def handle_error(self, *_: object) -> None:
        pass  # a client that left


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def answer(self) -> None:
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        status, kind, told = self.server.source.answer(self.path, body)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told.encode())

    do_GET = do_POST = do_PUT = answer  # noqa: N815 (http.server finds them by name)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def credential_source() -> Iterator[Source]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.source = Source(port=server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.source
    finally:
        server.source.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
