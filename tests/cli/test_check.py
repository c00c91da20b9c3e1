# SPDX-License-Identifier: Apache-2.0
"""`d1-signer check`: each step made to fail, and said to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from d1_signer.sandbox import Fault, Sandbox
from d1_signer.token.renewal import Limits
from tests.cli.conftest import Result, Run
from tests.servers.certificates import Authority
from tests.token.conftest import one_attempt

__all__ = ["one_attempt"]  # a fixture

KEY_STEPS = ["key", "signature", "custody"]
D1_STEPS = ["client-certificate", "endpoint", "access-token"]


def statuses(result: Result) -> list[tuple[str, str]]:
    return [(step["step"], step["status"]) for step in result.document["steps"]]


def test_with_a_key_alone(run: Run, key_uri: str) -> None:
    result = run("check", "--json", "--key", key_uri)
    assert result.status == 0
    assert result.document["ok"] is True
    skipped = [(name, "skipped") for name in D1_STEPS]
    assert statuses(result) == [*((name, "ok") for name in KEY_STEPS), *skipped]
    text = run("check", "--key", key_uri)
    assert text.status == 0
    assert "verified by cryptography" in text.out
    assert "exportable: yes" in text.out
    assert "Passed; not checked: client-certificate, endpoint, access-token." in text.out


def test_with_all_settings(run: Run, sandbox: Sandbox, settings: dict[str, str]) -> None:
    result = run("check", "--json", **settings)
    assert result.status == 0
    assert statuses(result) == [(name, "ok") for name in KEY_STEPS + D1_STEPS]
    details = {step["step"]: step["detail"] for step in result.document["steps"]}
    assert details["client-certificate"].startswith("valid until ")
    assert details["endpoint"] == (
        "refuses what is no assertion, as it should (HTTP 400), D1's clock agrees"
    )
    assert "scope 'd1-api:account:full" in details["access-token"]
    assert sandbox.counters.tokens_issued == 1
    assert run("check").out.endswith("\nAll steps passed.\n")


def test_each_key_is_checked_and_tried_at_d1(
    run: Run, settings: dict[str, str], other_uri: str
) -> None:
    settings["D1_SIGNER_KEY"] += f" {other_uri}"
    result = run("check", "--json", **settings)
    assert result.status == 1
    assert [name for name, _ in statuses(result)] == [*KEY_STEPS * 2, *D1_STEPS, "access-token"]
    assert statuses(result)[-2:] == [
        ("access-token", "ok"),
        ("access-token", "failed"),
    ]  # D1 knows the first
    assert result.document["stopped_at"]["error"]["code"] == "token_refused"


def test_stops_at_the_key(run: Run, settings: dict[str, str], tmp_path: Path) -> None:
    settings["D1_SIGNER_KEY"] = (tmp_path / "none.pem").as_uri()
    result = run("check", "--json", **settings)
    assert result.status == 1
    assert result.document["ok"] is False
    assert result.document["stopped_at"]["step"] == "key"
    assert result.document["stopped_at"]["error"]["code"] == "secret_source"
    assert statuses(result) == [
        ("key", "failed"),
        ("signature", "skipped"),
        ("custody", "skipped"),
        ("client-certificate", "ok"),
        ("endpoint", "ok"),
        ("access-token", "skipped"),
    ]
    text = run("check")
    assert text.status == 1
    assert "Check the path" in text.out
    assert f"Failed: key ({settings['D1_SIGNER_KEY']})." in text.out


def test_stops_at_a_key_that_fits_another_certificate(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    _, settings["D1_CLIENT_KEY"] = map(str, sandbox.issue_client_certificate())
    result = run("check", "--json", **settings)
    assert result.status == 1
    assert result.document["stopped_at"]["step"] == "client-certificate"
    assert "does not belong" in result.document["stopped_at"]["detail"]
    assert statuses(result)[-2:] == [("endpoint", "skipped"), ("access-token", "skipped")]


def put_certificate(settings: dict[str, str], folder: Path, begin: float, end: float) -> str:
    """A client certificate of no authority, valid between two days; returns its end."""
    certificate, key = Authority(folder).issue("client", days=(begin, end))
    settings["D1_CLIENT_CERT"], settings["D1_CLIENT_KEY"] = str(certificate), str(key)
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.isoformat()


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [(-20, -10, "expired on"), (10, 20, "is not valid before")],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_out_of_its_dates_is_tried(
    run: Run, settings: dict[str, str], tmp_path: Path, begin: int, end: int, words: str
) -> None:
    not_after = put_certificate(settings, tmp_path, begin, end)
    result = run("check", "--json", **settings)
    certificate, endpoint, token = result.document["steps"][-3:]
    assert (certificate["status"], certificate["not_after"]) == ("unclear", not_after)
    assert words in certificate["detail"]
    # The server refuses it too, and what is told then are the dates.
    assert (endpoint["status"], endpoint["error"]["code"]) == ("failed", "tls")
    assert words in endpoint["detail"]
    assert token["status"] == "skipped"
    text = run("check")
    assert re.search(f"unclear  client-certificate  127.0.0.1:[0-9]+: it {words}", text.out)


@pytest.mark.parametrize(
    ("days", "asked", "status", "soon"),
    [
        (40.5, None, "ok", False),
        (13.5, None, "ok", True),
        (13.5, 13, "ok", True),
        (13.5, 14, "failed", True),
        (40.5, 41, "failed", False),
        (-0.5, 0, "failed", False),
    ],
)
def test_an_end_that_comes_near(
    run: Run,
    settings: dict[str, str],
    tmp_path: Path,
    days: float,
    asked: int | None,
    status: str,
    *,
    soon: bool,
) -> None:
    not_after = put_certificate(settings, tmp_path, -50, days)
    options = [] if asked is None else ["--warn-days", str(asked)]
    result = run("check", "--json", *options, **settings)
    step = result.document["steps"][-3]
    assert (step["step"], step["status"]) == ("client-certificate", status)
    assert step["not_after"] == not_after
    assert ("have Thales sign a new one" in step["detail"]) is soon
    assert (result.document["stopped_at"]["step"] == step["step"]) is (status == "failed")


def test_warn_days_keeps_nothing_from_being_checked(run: Run, settings: dict[str, str]) -> None:
    result = run("check", "--json", "--warn-days", "1000", **settings)
    assert result.status == 1
    steps = [("client-certificate", "failed"), ("endpoint", "ok"), ("access-token", "ok")]
    assert statuses(result)[-3:] == steps


def test_stops_at_a_server_that_is_not_trusted(run: Run, settings: dict[str, str]) -> None:
    del settings["D1_CA_FILE"]
    result = run("check", "--json", **settings)
    assert result.document["stopped_at"]["step"] == "endpoint"
    assert result.document["stopped_at"]["error"]["code"] == "tls"


def test_stops_at_a_certificate_that_d1_refuses(run: Run, settings: dict[str, str]) -> None:
    with Sandbox("another") as another:
        settings["D1_CLIENT_CERT"] = str(another.client_certificate)
        settings["D1_CLIENT_KEY"] = str(another.client_key)
        result = run("check", "--json", **settings)
    assert result.document["stopped_at"]["step"] == "endpoint"


@pytest.mark.usefixtures("one_attempt")
def test_the_token_decides_where_the_endpoint_is_down(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    sandbox.misbehave(Fault.STATUS_503)
    result = run("check", "--json", **settings)
    assert result.status == 1
    assert statuses(result)[-2:] == [("endpoint", "unclear"), ("access-token", "failed")]
    assert result.document["stopped_at"]["error"]["retryable"] is True


@pytest.mark.parametrize(
    "fault", [Fault.HTML_400, Fault.EMPTY_400, Fault.STATUS_403, Fault.GZIP_BOMB, Fault.REDIRECT]
)
def test_the_token_decides_where_an_answer_is_unclear(
    run: Run, sandbox: Sandbox, settings: dict[str, str], fault: Fault
) -> None:
    sandbox.misbehave(fault, times=1)
    result = run("check", "--json", **settings)
    assert (result.status, result.document["ok"]) == (0, True)
    if fault is not Fault.STATUS_403:  # which has an OAuth error
        assert statuses(result)[-2:] == [("endpoint", "unclear"), ("access-token", "ok")]
        sandbox.misbehave(fault, times=1)
        assert run("check").out.endswith("\nPassed; unclear: endpoint.\n")


def test_stops_at_a_url_that_is_no_token_endpoint(run: Run, settings: dict[str, str]) -> None:
    settings["D1_ENVIRONMENT"] = settings["D1_ENVIRONMENT"].replace("/authz/v1", "/elsewhere")
    result = run("check", "--json", **settings)
    assert statuses(result)[-2:] == [("endpoint", "unclear"), ("access-token", "failed")]
    assert "404" in result.document["stopped_at"]["detail"]


@contextlib.contextmanager
def dripping() -> Iterator[str]:
    """A server that says "in a moment" again and again, each time before the read limit is over.

    It gives up after 20 seconds, so that a client without a limit fails the test and ends.
    """
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            for _ in range(200):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                if ended.wait(0.1):
                    return

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                drip(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)  # or accept() would wait on
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_a_server_that_never_comes_to_the_point_is_left(
    run: Run, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.cli._checking.Limits", lambda: Limits(total=1))
    with dripping() as environment:
        settings["D1_ENVIRONMENT"] = environment
        for name in ("D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE"):
            del settings[name]
        started = time.monotonic()
        result = run("check", "--json", **settings)
        assert time.monotonic() - started < 10
    assert result.status == 1
    assert result.document["stopped_at"]["step"] == "endpoint"
    assert result.document["stopped_at"]["error"]["retryable"] is True
    assert statuses(result)[-1] == ("access-token", "skipped")


def test_the_endpoint_is_given_the_limits_of_the_file(
    run: Run, settings: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "d1.toml"
    file.write_text("[limits]\ntotal = 1\n")
    with dripping() as environment:
        settings["D1_ENVIRONMENT"] = environment
        for name in ("D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE"):
            del settings[name]
        started = time.monotonic()
        result = run("check", "--json", "--config", str(file), **settings)
        assert time.monotonic() - started < 10
    assert result.document["stopped_at"]["step"] == "endpoint"


def test_tells_how_far_the_clocks_differ(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT, times=1, date_offset=120.0)
    result = run("check", **settings)
    assert "D1's clock differs by +1" in result.out


@pytest.mark.parametrize("offset", [3600.0, -700.0])
def test_stops_where_the_clock_is_too_wrong_for_any_token(
    run: Run, sandbox: Sandbox, settings: dict[str, str], offset: float
) -> None:
    sandbox.misbehave(Fault.INVALID_GRANT, times=1, date_offset=offset)
    result = run("check", "--json", **settings)
    assert result.status == 1
    stopped = result.document["stopped_at"]
    assert stopped["step"] == "endpoint"
    assert "clock" in stopped["error"]["hint"]
    side = "behind" if offset > 0 else "ahead of"
    assert f"seconds {side} D1's" in stopped["error"]["message"]
    assert stopped["error"]["details"]["clock_offset"] == pytest.approx(offset, abs=5)
    assert statuses(result)[-1] == ("access-token", "skipped")


@pytest.mark.parametrize("given", ["json", "form", None])
def test_sends_the_form_of_request_that_is_asked_for(
    run: Run, sandbox: Sandbox, settings: dict[str, str], given: str | None
) -> None:
    if given:
        settings["D1_REQUEST_FORMAT"] = given
    assert run("check", **settings).status == 0
    kinds = {dict(exchange.request_headers)["Content-Type"] for exchange in sandbox.exchanges}
    assert len(sandbox.exchanges) == 2
    assert kinds == {"application/json" if given == "json" else "application/x-www-form-urlencoded"}


def test_stops_at_the_token(run: Run, sandbox: Sandbox, settings: dict[str, str]) -> None:
    settings["D1_ISSUER_ID"] = "somebody-else"
    result = run("check", **settings)
    assert result.status == 1
    assert "  failed   access-token" in result.out
    assert "Check the issuer id" in result.out
    assert f"correlation_id: {sandbox.requests[-1].correlation_id}" in result.out
    assert "Failed: access-token (kid bank-2026 at 127.0.0.1:" in result.out


@pytest.mark.parametrize(
    ("missing", "steps"),
    [
        ("D1_ISSUER_ID", ["ok", "ok", "failed"]),
        ("D1_ENVIRONMENT", ["ok", "failed", "skipped"]),
        ("D1_CLIENT_CERT", ["failed", "skipped", "skipped"]),
        ("D1_CLIENT_KEY", ["failed", "skipped", "skipped"]),
    ],
)
def test_where_d1_is_set_up_a_missing_setting_fails(
    run: Run, settings: dict[str, str], missing: str, steps: list[str]
) -> None:
    del settings[missing]
    result = run("check", "--json", **settings)
    assert (result.status, result.document["ok"]) == (1, False)
    assert statuses(result)[-3:] == [*zip(D1_STEPS, steps, strict=True)]
    assert missing in result.document["stopped_at"]["error"]["hint"]


@pytest.mark.parametrize(
    "given", ["D1_ISSUER_ID", "D1_ENVIRONMENT", "D1_CLIENT_CERT", "D1_CLIENT_KEY", "D1_CA_FILE"]
)
def test_one_setting_of_d1_asks_for_the_others(
    run: Run, settings: dict[str, str], given: str
) -> None:
    only = {name: settings[name] for name in ("D1_SIGNER_KEY", given)}
    result = run("check", "--json", **only)
    assert (result.status, result.document["ok"]) == (1, False)


@pytest.mark.parametrize(
    "given",
    [
        ["--audience", "d1"],
        ["--no-audience"],
        ["--request-format", "json"],
        ["--proxy", "http://127.0.0.1:1"],
        ["--proxy-adds-certificate"],
        ["--proxy-credentials-source", "env:NOWHERE"],
        ["--client-key-passphrase-source", "env:NOWHERE"],
        ["--warn-days", "30"],
    ],
    ids=lambda given: given[0],
)
def test_what_is_said_of_d1_asks_for_its_settings(run: Run, key_uri: str, given: list[str]) -> None:
    result = run("check", "--json", "--key", key_uri, *given)
    assert (result.status, result.document["ok"]) == (1, False)
    failed = {name for name, status in statuses(result) if status == "failed"}
    assert {"endpoint", "access-token"} <= failed


def test_days_of_a_certificate_that_is_not_given_fail(run: Run, key_uri: str) -> None:
    with Sandbox("cli-issuer", tls=False) as sandbox:
        settings = {"D1_ENVIRONMENT": sandbox.base_url, "D1_ISSUER_ID": "cli-issuer"}
        result = run("check", "--json", "--warn-days", "0", D1_SIGNER_KEY=key_uri, **settings)
    assert result.status == 1
    assert statuses(result)[-3] == ("client-certificate", "failed")
    assert "--warn-days 0" in result.document["stopped_at"]["detail"]


def test_two_keys_that_fail_are_told_apart(
    run: Run, settings: dict[str, str], key_uri: str, other_uri: str
) -> None:
    settings |= {"D1_SIGNER_KEY": f"{key_uri} {other_uri}", "D1_ISSUER_ID": "somebody-else"}
    tokens = [
        step
        for step in run("check", "--json", **settings).document["steps"]
        if step["step"] == "access-token"
    ]
    assert [(step["kid"], step["status"]) for step in tokens] == [
        ("bank-2026", "failed"),
        ("next-2027", "failed"),
    ]
    text = run("check").out
    failed = [line for line in text.splitlines() if line.startswith("  failed")]
    assert [line.split()[2:4] for line in failed] == [["kid", "bank-2026"], ["kid", "next-2027"]]
    first, others = text.splitlines()[-1].split("; ")
    assert first.startswith("Failed: access-token (kid bank-2026 at 127.0.0.1:")
    assert others.startswith("access-token (kid next-2027 at 127.0.0.1:")


def test_the_last_line_names_the_key_that_works(
    run: Run, settings: dict[str, str], key_uri: str, other_uri: str
) -> None:
    settings["D1_SIGNER_KEY"] = f"{key_uri} {other_uri}"
    last = run("check", **settings).out.splitlines()[-1]
    assert last.startswith("Failed: access-token (kid next-2027 at 127.0.0.1:")
    assert "). A token was given: kid bank-2026 at 127.0.0.1:" in last


def test_failures_of_the_same_part_stand_together(run: Run, settings: dict[str, str]) -> None:
    del settings["D1_CLIENT_CERT"]
    settings["D1_ENVIRONMENT"] = "http://127.0.0.1:9"
    last = run("check", "--require", "endpoint", **settings).out.splitlines()[-1]
    assert last == "Failed: client-certificate, endpoint (127.0.0.1:9)."


def test_custody_is_claimed_and_not_judged_without_a_policy(run: Run, key_uri: str) -> None:
    def custody(**more: str) -> str:
        steps = run("check", "--json", D1_SIGNER_KEY=key_uri, **more).document["steps"]
        return str(next(step["detail"] for step in steps if step["step"] == "custody"))

    assert "hardware: no (claimed)" in custody()
    assert custody().endswith(", not judged: no D1_CUSTODY_POLICY is set")


@pytest.mark.parametrize(
    ("step", "part", "needs"),
    [
        ("audit-seal", "Audit trail", "--audit-trail and --audit-key"),
        ("store", "Store", "--config FILE"),
        ("login", "Keys", "a key URI that begins with pkcs11:, with pin-source"),
        ("access-token", "D1", "--environment, --issuer-id"),
    ],
)
def test_a_required_step_that_is_not_there_says_what_it_needs(
    run: Run, key_uri: str, step: str, part: str, needs: str
) -> None:
    lines = run("check", "--require", step, D1_SIGNER_KEY=key_uri).out.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith(f"  failed   {step}"))
    assert f"It needs {needs}" in lines[at + 1]
    assert f"else leave --require {step} out." in lines[at + 1]
    headings = [line for line in lines[:at] if not line.startswith(" ")]
    assert headings[-1] == part


def test_without_d1_it_says_what_to_give(run: Run, key_uri: str) -> None:
    told = run("check", D1_SIGNER_KEY=key_uri).out
    assert told.count("give --environment and --issuer-id to check D1 as well") == 1


def test_steps_for_machines_name_key_and_host(run: Run, settings: dict[str, str]) -> None:
    host = settings["D1_ENVIRONMENT"].split("/")[2]
    away = settings["D1_SIGNER_KEY"].partition("#")[0] + ".away#next-2027"
    settings |= {"D1_SIGNER_KEY": f"{settings['D1_SIGNER_KEY']} {away}"}
    steps = run("check", "--json", **settings).document["steps"]
    about = {(step["step"], step["about"]) for step in steps}
    assert {("key", "kid next-2027"), ("endpoint", host)} <= about
    assert ("access-token", f"kid bank-2026 at {host}") in about
    assert ("access-token", f"kid next-2027 at {host}") in about


def test_every_line_names_key_or_host(run: Run, settings: dict[str, str]) -> None:
    lines = run("check", **settings).out.splitlines()
    host = settings["D1_ENVIRONMENT"].split("/")[2]
    assert lines[0] == settings["D1_SIGNER_KEY"].partition("#")[0]
    assert all("kid bank-2026" in line for line in lines[1:4])
    assert lines[4] == f"D1 {settings['D1_ENVIRONMENT']}"
    assert all(f"{host}: " in line for line in lines[5:8])


@pytest.mark.parametrize("step", ["client-certificate", "endpoint", "access-token", "login"])
def test_a_required_step_that_is_not_taken_fails(run: Run, key_uri: str, step: str) -> None:
    result = run("check", "--json", "--key", key_uri, "--require", "custody", "--require", step)
    assert (result.status, result.document["ok"]) == (1, False)
    assert result.document["stopped_at"]["step"] == step
    assert "required" in result.document["stopped_at"]["detail"]


def test_a_required_step_that_is_unclear_fails(
    run: Run, sandbox: Sandbox, settings: dict[str, str]
) -> None:
    sandbox.misbehave(Fault.HTML_400, times=1)
    result = run("check", "--json", "--require", "endpoint", **settings)
    assert (result.status, result.document["ok"]) == (1, False)
    assert statuses(result)[-2:] == [("endpoint", "failed"), ("access-token", "ok")]
    assert result.document["stopped_at"]["error"]["hint"].startswith("Check the environment's URL")


def test_a_required_certificate_out_of_its_dates_is_told_as_that(
    run: Run, settings: dict[str, str], tmp_path: Path
) -> None:
    put_certificate(settings, tmp_path, -50, -1)
    result = run("check", "--json", "--require", "client-certificate", **settings)
    step = result.document["stopped_at"]
    assert step["step"] == "client-certificate"
    assert "it expired on" in step["detail"]
    assert step["error"]["hint"].startswith("Look at this machine's clock")


def test_a_required_step_that_waits_for_another_asks_for_no_setting(
    run: Run, settings: dict[str, str], tmp_path: Path
) -> None:
    settings["D1_SIGNER_KEY"] = (tmp_path / "no.pem").as_uri()
    required = ("--require", "signature", "--require", "access-token")
    steps = run("check", "--json", *required, **settings).document["steps"]
    failed = {step["step"]: step["error"]["hint"] for step in steps if step["error"]}
    assert [*failed] == ["key", "signature", "access-token"]
    for name in ("signature", "access-token"):
        assert failed[name] == "It is taken once what failed before it is mended."


def test_required_steps_that_pass(run: Run, settings: dict[str, str]) -> None:
    required = [word for step in KEY_STEPS + D1_STEPS for word in ("--require", step)]
    assert run("check", *required, **settings).out.endswith("\nAll steps passed.\n")
    assert run("check", "--require", "everything", **settings).status == 2


def test_plain_http_needs_no_certificate(run: Run, key_uri: str) -> None:
    with Sandbox("cli-issuer", tls=False) as sandbox:
        jwk = run("public-key", "--key", key_uri, "--format", "jwk", "--json").document
        sandbox.register_key("bank-2026", jwk["public_key"])
        settings = {"D1_ENVIRONMENT": sandbox.base_url, "D1_ISSUER_ID": "cli-issuer"}
        result = run("check", "--json", D1_SIGNER_KEY=key_uri, **settings)
    assert result.status == 0
    assert statuses(result)[-3:] == [
        ("client-certificate", "skipped"),
        ("endpoint", "ok"),
        ("access-token", "ok"),
    ]


def test_an_environment_that_cannot_be_read_is_a_usage_error(run: Run, key_uri: str) -> None:
    result = run("check", "--json", "--key", key_uri, "--environment", "http://d1.example")
    assert result.status == 2
    assert result.document["code"] == "configuration"
    # Told before the key is opened, which may cost a PIN.
    assert run("check", "--key", key_uri, "--environment", "d1").out == ""
