# SPDX-License-Identifier: Apache-2.0
"""AWS credentials: each source that can run here, their renewals, and what failures of them say."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore import credentials as botocore_credentials

from d1_signer import errors
from d1_signer.backends import renewal
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.servers import aws
from tests.servers.credential_source import AWS_SECRET, Source, credential_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import LeakWatch
    from tests.servers.fault_proxy import Answer, FaultProxy, Forward, Request

_ROLE = "arn:aws:iam::000000000000:role/d1"
_USED = re.compile(r"Credential=(\w+)/")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws.Aws]:
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def key(endpoint: aws.Aws) -> str:
    return endpoint.make_key()


@pytest.fixture
def source() -> Iterator[Source]:
    with credential_source() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak_watch: LeakWatch) -> Path:
    """An environment without any credentials, in which renewals need no patience."""
    leak_watch.note(AWS_SECRET)
    leak_watch.note("session-token-of-AKSOURCE")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / ".aws"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", aws.REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(renewal, "_PAUSE", 0.05)
    return folder


@pytest.fixture
def gate(endpoint: aws.Aws, source: Source) -> Iterator[FaultProxy]:
    """The endpoint, which takes the keys that the source gave and that have not ended."""

    def admit(request: Request, forward: Forward) -> Answer:
        used = _USED.search(request.headers["Authorization"])
        if used and used[1].startswith("AKSOURCE") and not source.is_good(used[1]):
            return aws.refusal(400, "ExpiredTokenException")(request, forward)
        return forward(request)

    with endpoint.proxy() as proxy:
        proxy.fault = admit
        yield proxy


def _keys_used(proxy: FaultProxy) -> list[str]:
    found = [_USED.search(request.headers["Authorization"]) for request in proxy.requests]
    return [match[1] for match in found if match]


def _sign(signer: Signer) -> None:
    signer.public_key.verify(signer.sign(b"m"), b"m")


# -- every source ---------------------------------------------------------------------------------


def _config(home: Path, *lines: str) -> None:
    (home / "config").write_text("\n".join(["[default]", *lines]) + "\n")


def _from_container(source: Source, _home: Path) -> dict[str, str]:
    return {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{source.url}/container"}


def _from_pod_identity(source: Source, home: Path) -> dict[str, str]:
    token = home / "pod-token"
    token.write_text("token-of-the-pod")
    named = {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token)}
    return {**_from_container(source, home), **named}


def _from_instance(source: Source, _home: Path) -> dict[str, str]:
    return {
        "AWS_EC2_METADATA_DISABLED": "false",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": source.url,
    }


def _from_web_identity(source: Source, home: Path) -> dict[str, str]:
    token = home / "jwt"
    token.write_text("made.up.token")
    return {
        "AWS_ROLE_ARN": _ROLE,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": source.url,
    }


def _from_assumed_role(source: Source, home: Path) -> dict[str, str]:
    _config(home, f"role_arn = {_ROLE}", "source_profile = base")
    (home / "credentials").write_text(
        "[base]\naws_access_key_id = AKBASE\naws_secret_access_key = secret-of-the-base\n"
    )
    return {"AWS_ENDPOINT_URL_STS": source.url}


def _from_process(source: Source, home: Path) -> dict[str, str]:
    program = home / "give.py"
    program.write_text(
        "import json, urllib.request as r\n"
        f"told = json.load(r.urlopen('{source.url}/container'))\n"
        "told['SessionToken'] = told.pop('Token')\n"
        "print(json.dumps({'Version': 1, **told}))\n"
    )
    _config(home, f"credential_process = {sys.executable} {program}")
    return {}


def _from_sso(source: Source, home: Path) -> dict[str, str]:
    _config(
        home,
        "sso_session = bank",
        "sso_account_id = 000000000000",
        "sso_role_name = d1",
        "[sso-session bank]",
        "sso_region = eu-central-1",
        "sso_start_url = https://bank.example",
        "sso_registration_scopes = sso:account:access",
    )
    cache = home / "sso" / "cache"
    cache.mkdir(parents=True)
    token = {
        "accessToken": "access-token-of-sso",
        "expiresAt": "2999-01-01T00:00:00Z",
        "startUrl": "https://bank.example",
        "region": "eu-central-1",
    }
    (cache / f"{hashlib.sha1(b'bank').hexdigest()}.json").write_text(json.dumps(token))  # noqa: S324
    return {"AWS_ENDPOINT_URL_SSO": source.url}


SOURCES: dict[str, Callable[[Source, Path], dict[str, str]]] = {
    "container": _from_container,
    "pod-identity": _from_pod_identity,
    "instance": _from_instance,
    "web-identity": _from_web_identity,
    "assumed-role": _from_assumed_role,
    "process": _from_process,
    "sso": _from_sso,
}


@pytest.fixture(params=SOURCES)
def any_source(
    request: pytest.FixtureRequest, source: Source, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Source:
    for name, value in SOURCES[request.param](source, home).items():
        monkeypatch.setenv(name, value)
    # botocore fixed these folders when it was imported.
    folder = str(home / "sso" / "cache")
    monkeypatch.setattr(botocore_credentials.SSOProvider, "_SSO_TOKEN_CACHE_DIR", folder)
    tokens = sys.modules["botocore.tokens"]
    monkeypatch.setattr(tokens.SSOTokenProvider, "_SSO_TOKEN_CACHE_DIR", folder)
    return source


def test_monitoring_that_the_environment_asks_for_is_off(
    any_source: Source, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as monitor:
        monitor.bind(("127.0.0.1", 0))
        monitor.setblocking(False)  # noqa: FBT003 (positional only)
        monkeypatch.setenv("AWS_CSM_ENABLED", "true")
        monkeypatch.setenv("AWS_CSM_PORT", str(monitor.getsockname()[1]))
        with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
            _sign(signer)
        assert any_source.given
        with pytest.raises(BlockingIOError):
            monitor.recv(1)


def test_every_source_opens_signs_and_survives_a_renewal(
    any_source: Source, gate: FaultProxy, key: str
) -> None:
    any_source.lifetime = 60.0  # in boto3's eyes it is time to renew at once
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        _sign(signer)
        first = _keys_used(gate)[-1]
        until = time.monotonic() + 30
        while _keys_used(gate)[-1] == first:
            assert time.monotonic() < until
            _sign(signer)
        for name in list(any_source.given)[:-1]:
            any_source.given[name] = 0.0  # those before are not taken any more
        _sign(signer)


@pytest.mark.stress
@pytest.mark.parametrize(
    ("name", "down"),
    [
        ("container", "fails"),
        ("web-identity", "hangs"),
        ("instance", "hangs"),
        *(
            pytest.param(name, down, marks=pytest.mark.soak)
            for name, down in (
                ("container", "hangs"),
                ("web-identity", "fails"),
                ("instance", "fails"),
            )
        ),
    ],
)
def test_outage_of_the_source_costs_nothing_before_the_credentials_end(
    name: str,
    down: str,
    source: Source,
    home: Path,
    gate: FaultProxy,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An hour in nine seconds: the source is away from minute 43 to 63, which is after the end.
    source.lifetime, minute = 9.0, 0.15
    for variable, value in SOURCES[name](source, home).items():
        monkeypatch.setenv(variable, value)
    refreshable = botocore_credentials.RefreshableCredentials
    monkeypatch.setattr(refreshable, "_advisory_refresh_timeout", 15 * minute)
    monkeypatch.setattr(refreshable, "_mandatory_refresh_timeout", 10 * minute)
    # An instance's keys are said to live on while its metadata is away: that is boto3's own.
    monkeypatch.setattr(renewal, "_PATIENCE", 1.0)
    with open_signer(f"awskms:///{key}?endpoint={gate.url}", timeout=6.0) as signer:
        (ends,) = source.given.values()
        failed: list[float] = []
        signed: list[float] = []

        def work(until: float) -> None:
            while time.time() < until:
                try:
                    _sign(signer)
                    signed.append(time.time())
                except (errors.LoginError, errors.SignerUnavailable):
                    failed.append(time.time())
                    time.sleep(0.02)

        with ThreadPoolExecutor(4) as pool:
            begin = ends - source.lifetime
            list(pool.map(work, [begin + 43 * minute] * 4))
            source.down = down
            list(pool.map(work, [begin + 63 * minute] * 4))
            source.down = ""
            source.released.set()
            back = time.time()
            source.lifetime = 3600.0
            while not signed or signed[-1] < back:
                assert time.time() < back + 30
                work(time.time() + 0.2)
            count = len(failed)
            list(pool.map(work, [time.time() + 0.5] * 4))
    assert [at for at in failed if at < ends - 0.05] == []
    assert len(failed) == count


def test_renewal_is_never_in_a_callers_way(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_container(source, home).items():
        monkeypatch.setenv(name, value)
    source.lifetime = 300.0
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        asked = len(source.asked)
        source.down = "hangs"
        started = time.monotonic()
        for _ in range(20):
            _sign(signer)
        # The source hangs for a minute, and is asked for meanwhile.
        assert time.monotonic() - started < 20
        assert len(source.asked) > asked


def test_searches_are_few_where_the_source_refuses(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_web_identity(source, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(renewal, "_PAUSE", 60.0)
    source.refusal = (403, "AccessDenied", "no")
    with pytest.raises(errors.LoginError):
        open_signer(f"awskms:///{key}?endpoint={gate.url}")
    source.refusal, source.lifetime = None, 3600.0
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        for name in source.given:
            source.given[name] = 0.0  # they are revoked
        source.refusal = (403, "AccessDenied", "no")
        asked = len(source.asked)

        def refused(_: int) -> None:
            with pytest.raises(errors.LoginError):
                signer.sign(b"m")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(refused, range(40)))
        assert len(source.asked) - asked <= 1


# -- what is replaced, and what is missing for a moment -------------------------------------------


def _write_keys(home: Path, key: str) -> None:
    file = home / "new"
    file.write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {AWS_SECRET}\n"
        f"aws_session_token = session-token-of-{key}\n"
    )
    file.replace(home / "credentials")


def test_replaced_keys_in_the_shared_file_are_read_again(
    source: Source, home: Path, gate: FaultProxy, key: str
) -> None:
    source.lifetime = 3600.0
    first, _ = source.next("AKSOURCE")
    _write_keys(home, first)
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        _sign(signer)
        source.given[first] = 0.0
        with pytest.raises(errors.LoginError) as refused:
            signer.sign(b"m")
        assert refused.value.details["aws_code"] == "ExpiredTokenException"
        second, _ = source.next("AKSOURCE")
        _write_keys(home, second)
        until = time.monotonic() + 20
        while True:
            try:
                _sign(signer)
                break
            except errors.LoginError:
                assert time.monotonic() < until
        assert _keys_used(gate)[-1] == second


def test_file_that_is_away_for_a_moment_costs_nothing(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the keys are away, the container would give others: of another identity.
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{source.url}/container")
    source.lifetime = 3600.0
    first, _ = source.next("AKSOURCE")
    _write_keys(home, first)
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        (home / "credentials").unlink()
        _sign(signer)
        source.given[first] = 0.0
        until, retryable = time.monotonic() + 20, False
        while not retryable:  # the first may come too soon after the opening
            assert time.monotonic() < until
            with pytest.raises(errors.LoginError) as refused:
                signer.sign(b"m")
            retryable = "not taken instead" in str(refused.value) and refused.value.retryable
        assert set(_keys_used(gate)) == {first}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_goes_on_with_what_its_parent_held(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_instance(source, home).items():
        monkeypatch.setenv(name, value)
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        source.down = "fails"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, signer.sign(b"m"))
            except BaseException as error:  # noqa: BLE001 (told to the parent)
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        signer.public_key.verify(os.read(reader, 4096), b"m")
        os.close(reader)
        os.close(writer)


def test_source_that_is_away_at_opening_may_come_back(
    any_source: Source, gate: FaultProxy, key: str
) -> None:
    any_source.down = "fails"
    with pytest.raises((errors.LoginError, errors.SignerUnavailable)) as refused:
        open_signer(f"awskms:///{key}?endpoint={gate.url}", timeout=20)
    assert refused.value.retryable
    assert refused.value.details["phase"] == "credentials"
    assert "AWS KMS refused" not in str(refused.value)
    any_source.down = ""
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        _sign(signer)


# -- what failures say ----------------------------------------------------------------------------


def test_search_that_hangs_is_told_as_that(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_container(source, home).items():
        monkeypatch.setenv(name, value)
    source.down = "hangs"
    started = time.monotonic()
    with pytest.raises(errors.SignerTimeout, match="search for AWS credentials") as refused:
        open_signer(f"awskms:///{key}?endpoint={gate.url}", timeout=4.0)
    assert time.monotonic() - started < 20
    assert refused.value.details["phase"] == "credentials"


def test_missing_token_file_is_named_with_its_variable(
    source: Source, home: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_web_identity(source, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(home / "nothing"))
    with pytest.raises(errors.LoginError, match="AWS_WEB_IDENTITY_TOKEN_FILE") as refused:
        open_signer(f"awskms:///{key}")
    assert str(home / "nothing") in str(refused.value)
    assert not refused.value.retryable


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "told",
    [
        b'{"message": "x"}',
        b"<html>",
        b'{"AccessKeyId": "AK", "SecretAccessKey": "x", "Token": "y", "Expiration": "soon"}',
        b'{"AccessKeyId": "AK", "SecretAccessKey": "x", "Token": "y", "Expiration": "2020-01-01"}',
        b"[1]",
    ],
)
def test_container_that_answers_without_keys_is_told_and_may_recover(
    told: bytes, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with credential_source() as source:
        monkeypatch.setattr(source, "answer", lambda *_: (200, "application/json", told.decode()))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{source.url}/container")
        with pytest.raises((errors.SignerUnavailable, errors.LoginError)) as refused:
            open_signer(f"awskms:///{key}", timeout=20)
    assert refused.value.retryable
    assert refused.value.details["phase"] == "credentials"
    assert "Report it" not in str(refused.value)


def test_mfa_without_a_terminal_is_a_clear_error(
    source: Source, home: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_assumed_role(source, home).items():
        monkeypatch.setenv(name, value)
    with (home / "config").open("a") as config:
        config.write("mfa_serial = arn:aws:iam::000000000000:mfa/operator\n")
    with pytest.raises(errors.SecretSourceError, match=r"MFA code for .*operator") as refused:
        open_signer(f"awskms:///{key}")
    assert "terminal" in refused.value.hint
    assert source.asked == []


_ON_A_TERMINAL = """
import sys, termios, time
from d1_signer.errors import D1SignerError
from d1_signer.backends import renewal
from d1_signer.signing.opening import open_signer
renewal._PAUSE = 0.0
try:
    with open_signer(sys.argv[1], timeout=4) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")
        print("SIGNED", flush=True)
        try:
            while True:
                signer.sign(b"m")
                time.sleep(0.05)
        except D1SignerError as error:
            print("ENDED", error.code, error, flush=True)
except KeyboardInterrupt:
    print("INTERRUPTED", flush=True)
print("ECHO", bool(termios.tcgetattr(0)[3] & termios.ECHO), flush=True)
"""


def _on_a_terminal(uri: str, typed: bytes, pause: float) -> str:
    """What a program prints on a terminal on which somebody answers the first question."""
    pid, terminal = pty.fork()
    if pid == 0:
        program = [sys.executable, "-W", "ignore", "-c", _ON_A_TERMINAL, uri]
        os.execv(sys.executable, program)  # noqa: S606
    shown, asked, until = b"", None, time.monotonic() + 50
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the program has ended
                break
        if asked is None and b"MFA code" in shown:
            asked = time.monotonic()
        if asked and typed and time.monotonic() > asked + pause:
            os.write(terminal, typed)
            typed = b""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return shown.decode()


@pytest.fixture
def mfa(source: Source, home: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    for name, value in _from_assumed_role(source, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    with (home / "config").open("a") as config:
        config.write("mfa_serial = arn:aws:iam::000000000000:mfa/operator\n")
    return source


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_time_in_which_an_mfa_code_is_typed_does_not_count(
    mfa: Source, gate: FaultProxy, key: str
) -> None:
    mfa.lifetime = 10.0
    told = _on_a_terminal(f"awskms:///{key}?endpoint={gate.url}", b"123456\n", pause=6.0)
    assert "SIGNED" in told, told
    # Nobody is asked again in the midst of a signature.
    assert "ENDED login" in told, told
    assert "MFA code" in told.partition("ENDED")[2]
    assert "ECHO True" in told
    assert "123456" not in told


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_interrupted_question_leaves_the_terminal_as_it_was(
    mfa: Source, gate: FaultProxy, key: str
) -> None:
    told = _on_a_terminal(f"awskms:///{key}?endpoint={gate.url}", b"12\x03", pause=0.5)
    assert "INTERRUPTED" in told, told
    assert "ECHO True" in told
    assert mfa.asked == []


def test_no_thread_is_left_where_nothing_hangs(
    source: Source, home: Path, gate: FaultProxy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _from_container(source, home).items():
        monkeypatch.setenv(name, value)
    with open_signer(f"awskms:///{key}?endpoint={gate.url}") as signer:
        _sign(signer)
    for thread in threading.enumerate():
        if thread.name == "d1-signer-credentials":
            thread.join(20)
            assert not thread.is_alive()
