# SPDX-License-Identifier: Apache-2.0
"""What others choose neither ends a line of the log nor adds a name to it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from d1_signer import Limits, SignerSet, TokenFetcher
from d1_signer.errors import ConfigurationError, TokenError
from d1_signer.logfmt import told
from d1_signer.sandbox import Sandbox
from d1_signer.testing import make_in_memory_signer
from tests.token.following import SettingsFile

HOSTILE = 'no\n2026-01-01 ERROR d1_signer forged\r\x1b[2J\x9b31m\u2028 code=ok "kid=evil'
KID = 'bank 2026 kid="evil" code=ok'
ISSUER = "issuer id='evil' status=200"


def pairs_of(line: str) -> dict[str, str]:
    """A line of NAME=VALUE pairs, as a parser of such lines reads it; no name comes twice."""
    found = re.findall(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^\s"]+)(?:\s|$)', line)
    names = [name for name, _ in found]
    assert len(names) == len({*names}), line
    rest = re.sub(r'[a-z0-9_]+=("(?:[^"\\]|\\.)*"|[^\s"]+)', "", line)
    assert re.fullmatch(r"([a-z0-9_]+\.[a-z0-9_]+)?\s*", rest), line
    return {name: json.loads(text) if text[0] == '"' else text for name, text in found}


class _Hostile(BaseHTTPRequestHandler):
    status = 400

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(
            {"error": HOSTILE, "error_description": HOSTILE, "message": HOSTILE}
        ).encode()
        head = (
            f"HTTP/1.1 {self.status} \x1b[2J code=ok\r\nContent-Type: application/json\r\n"
            f"x-correlation-id: \x1b[2J kid=evil\r\nX-Request-Id: a b=c\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        with contextlib.suppress(OSError):  # nobody waits any more
            self.wfile.write(head + body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[400, 503], ids=["refusal", "outage"])
def hostile(request: pytest.FixtureRequest) -> Iterator[str]:
    kind = type("Kind", (_Hostile,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hostile_server_and_strange_names(hostile: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, logger="d1_signer"),
        make_in_memory_signer(KID) as first,
        make_in_memory_signer("next kid") as second,
        TokenFetcher(
            SignerSet([first, second]),
            issuer_id=ISSUER,
            environment=hostile,
            limits=Limits(total=8.0),
        ) as fetcher,
    ):
        with pytest.raises(TokenError) as raised:
            fetcher.token()
        status = json.dumps(fetcher.status().to_dict())
    assert all(line.isprintable() for line in caplog.messages)
    assert "\\u001b" not in status
    told_of = [line for line in caplog.messages if line.startswith("token.")]
    assert any(line.startswith("token.failed ") for line in told_of)
    assert any(line.startswith(("token.retry ", "token.kid_refused ")) for line in told_of)
    for line in told_of:
        pairs = pairs_of(line)
        assert pairs["kid"] in {KID, "next kid"}
        assert pairs.get("issuer", ISSUER) == ISSUER
        assert pairs.get("code") in {None, raised.value.code}
    failed = pairs_of(next(line for line in told_of if line.startswith("token.failed ")))
    assert failed["message"] == str(raised.value)
    assert failed["status"] in {"400", "503"}


def test_every_line_about_a_file_and_a_clock(
    sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = SettingsFile(tmp_path, sandbox)
    file.keys("one")
    file.write()
    sandbox.misbehave("invalid-grant", times=1, date_offset=120.0)
    with (
        caplog.at_level(logging.DEBUG, logger="d1_signer"),
        TokenFetcher.from_settings(file.path) as fetcher,
    ):
        with pytest.raises(TokenError):  # the sandbox's Date lied
            fetcher.token()
        file.write("no = = settings")
        with pytest.raises(ConfigurationError):
            fetcher.reload()
    told_of = {
        line.split()[0]: pairs_of(line)
        for name, _, line in caplog.record_tuples
        if name in {"d1_signer.token", "d1_signer.settings", "d1_signer.steps"}
    }
    assert {"token.failed", "token.clock_skew", "settings.taken", "step.ended"} <= told_of.keys()
    assert float(told_of["token.clock_skew"]["offset"]) == pytest.approx(120, abs=5)
    assert "good settings are used on" in told_of["settings.unusable"]["message"]


def test_a_set_tells_of_a_member_by_a_name_that_can_be_read_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    away, there = make_in_memory_signer(KID), make_in_memory_signer("next kid")
    away.close()
    with caplog.at_level(logging.INFO, logger="d1_signer"), SignerSet([away, there]) as signers:
        signers.attempt(lambda signer: signer.sign(b"x"))
    (line,) = [line for line in caplog.messages if line.startswith("signer_set.failed ")]
    why = "The signer is closed. Open it anew with open_signer()."
    assert pairs_of(line) == {"kid": KID, "error": "signer_closed", "message": why}


@pytest.mark.parametrize(
    "value", ["", "plain", "a b", HOSTILE, "a=b", "'", '"', "\\", "é\u2028", 7]
)
def test_every_value_is_read_back(value: object) -> None:
    line = told({"one": value, "two": 2})
    assert line.isascii()
    assert line.isprintable()
    assert pairs_of(line) == {"one": str(value), "two": "2"}


def test_a_kid_that_would_end_a_line_is_no_kid() -> None:
    for kid in ("a\nb", "\x1b[2J", "a\u2028b"):
        with pytest.raises(ValueError, match="not printable"):
            make_in_memory_signer(kid)
