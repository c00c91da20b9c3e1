# SPDX-License-Identifier: Apache-2.0
"""Google's credentials: each source that can run here, their renewals, what failures of them say.

Each case is a program of its own: google-auth reads the environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from tests.servers import gcp
from tests.servers.certificates import self_signed
from tests.servers.credential_source import Source, credential_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]

# A user's refresh token goes to Google alone: the one thing that is bent here.
_BENT = """
import os, google.oauth2.credentials
if "TOKEN_ENDPOINT_OF_THE_TESTS" in os.environ:
    endpoint = os.environ["TOKEN_ENDPOINT_OF_THE_TESTS"]
    google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT = endpoint
"""

# Signs until another access token is shown than the first; then the first is refused.
_RENEWS = """
import sys, time
from d1_signer.backends import renewal
from d1_signer.signing.opening import open_signer
renewal._PAUSE = 0.05
with open_signer(sys.argv[1], timeout=30) as signer:
    credentials = signer._backend._clients.made_here().credentials
    first = credentials.held()
    until = time.monotonic() + 30
    while credentials.are_same(credentials.held(), first):
        signer.public_key.verify(signer.sign(b"m"), b"m")
        assert time.monotonic() < until
    signer.public_key.verify(signer.sign(b"m"), b"m")
    print("renewed", repr(credentials.held()))
"""
_OPENS = """
import sys, time
from d1_signer.errors import D1SignerError
from d1_signer.signing.opening import open_signer
started = time.monotonic()
try:
    with open_signer(sys.argv[1], timeout=float(sys.argv[2])) as signer:
        signer.public_key.verify(signer.sign(b"m"), b"m")
    print("signed")
except D1SignerError as error:
    print(error.code, error.retryable, error.details.get("phase"), error)
print(round(time.monotonic() - started, 1))
"""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[gcp.Gcp, str]]:
    """A server over TLS, and the URI of a key in it."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = self_signed(directory)
    with gcp.cloud_kms(certificate, key) as server:
        yield (
            server,
            f"gcpkms://{gcp.VERSION}?endpoint=localhost:{server.tls_port}&ca_file={certificate}",
        )


@pytest.fixture
def source() -> Iterator[Source]:
    with credential_source() as running:
        running.lifetime = 60.0  # in google-auth's eyes it is time to renew at once
        yield running


def _run(program: str, home: Path, *arguments: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", _BENT + program, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _file(home: Path, **content: object) -> dict[str, str]:
    file = home / "adc.json"
    file.write_text(json.dumps(content))
    return {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}


def _user() -> dict[str, Any]:
    return {
        "type": "authorized_user",
        "client_id": "d1",
        "client_secret": "secret-of-the-client",
        "refresh_token": "refresh-token-of-the-user",
    }


def _federated(source: Source, home: Path, credential_source: object) -> dict[str, str]:
    pool = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x"
    return _file(
        home,
        type="external_account",
        audience=pool,
        subject_token_type="urn:ietf:params:oauth:token-type:jwt",
        token_url=f"{source.url}/v1/token",
        credential_source=credential_source,
    )


def _from_metadata(source: Source, _: Path) -> dict[str, str]:
    host = f"127.0.0.1:{source.port}"
    return {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host}


def _from_user(source: Source, home: Path) -> dict[str, str]:
    return {**_file(home, **_user()), "TOKEN_ENDPOINT_OF_THE_TESTS": f"{source.url}/token"}


def _from_federated_file(source: Source, home: Path) -> dict[str, str]:
    token = home / "jwt"
    token.write_text("made.up.token")
    return _federated(source, home, {"file": str(token)})


def _from_federated_program(source: Source, home: Path) -> dict[str, str]:
    program = home / "give.py"
    told = {
        "version": 1,
        "success": True,
        "token_type": "urn:ietf:params:oauth:token-type:jwt",
        "id_token": "made.up.token",
    }
    program.write_text(f"import json; print(json.dumps({told!r}))")
    command = {"command": f"{sys.executable} {program}", "timeout_millis": 30000}
    allowed = {"GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES": "1"}
    return {**_federated(source, home, {"executable": command}), **allowed}


def _from_impersonation(source: Source, home: Path) -> dict[str, str]:
    account = "d1@bank.iam.gserviceaccount.com"
    url = f"{source.url}/v1/projects/-/serviceAccounts/{account}:generateAccessToken"
    named = _federated(source, home, {"file": str(home / "jwt")})
    (home / "jwt").write_text("made.up.token")
    content = json.loads((home / "adc.json").read_text())
    _file(home, **content, service_account_impersonation_url=url)
    return named


SOURCES: dict[str, Callable[[Source, Path], dict[str, str]]] = {
    "metadata": _from_metadata,
    "user": _from_user,
    "federated-file": _from_federated_file,
    "federated-program": _from_federated_program,
    "federated-impersonation": _from_impersonation,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_opens_signs_and_survives_a_renewal(
    name: str, tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    told = _run(_RENEWS, tmp_path, tls[1], **SOURCES[name](source, tmp_path))
    assert told == "renewed <Token ****>\n"
    # No other API is asked for the name of a project.
    assert not [path for path in source.asked if "cloudresourcemanager" in path]


_LOGS = """
import logging, sys
class Told(logging.Handler):
    def emit(self, record):
        print("record", record.name, vars(record))  # with what structured loggers show
logging.basicConfig(level=logging.DEBUG, handlers=[Told()])
logging.getLogger("google").setLevel(sys.argv[3])
"""


@pytest.mark.parametrize("name", SOURCES)
def test_secrets_are_logged_by_google_auth_at_debug_alone(
    name: str, tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    environment = SOURCES[name](source, tmp_path)
    told = _run(_LOGS + _OPENS, tmp_path, tls[1], "30", "INFO", **environment)
    assert "record d1_signer" in told
    secrets = ["made.up.token", "refresh-token-of-the-user", "secret-of-the-client", *source.given]
    assert not [secret for secret in secrets if secret in told]
    if name.startswith("federated"):  # why the page says so
        told = _run(_LOGS + _OPENS, tmp_path, tls[1], "30", "DEBUG", **environment)
        shown = [line for line in told.splitlines() if "made.up.token" in line]
        assert {line.split()[1] for line in shown} == {"google.auth.transport.requests"}


def test_service_account_signs_its_own_tokens_for_this_api_alone(
    tls: tuple[gcp.Gcp, str], tmp_path: Path
) -> None:
    server, uri = tls
    account = {"GOOGLE_APPLICATION_CREDENTIALS": str(gcp.service_account(tmp_path))}
    assert _run(_OPENS, tmp_path, uri, "30", **account).startswith("signed")
    claims = jwt.decode(server.tell()["tokens"][-1], options={"verify_signature": False})
    assert claims["scope"] == "https://www.googleapis.com/auth/cloudkms"


_OUTAGE = """
import sys, threading, time
from d1_signer.errors import D1SignerError
from d1_signer.backends import renewal
from d1_signer.signing.opening import open_signer
renewal._PAUSE, renewal._PATIENCE = 0.05, 1.0
failed, signed = [], []
with open_signer(sys.argv[1], timeout=5) as signer:
    print("opened", flush=True)
    sys.stdin.readline()
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set())).start()
    while not ended.is_set():
        at = time.time()
        try:
            signer.public_key.verify(signer.sign(b"m"), b"m")
            signed.append(at)
        except D1SignerError as error:
            failed.append(at)
            time.sleep(0.02)
    print(repr((failed, signed)), flush=True)
"""


@pytest.mark.stress
@pytest.mark.parametrize("down", ["fails", "hangs"])
@pytest.mark.parametrize("name", ["metadata", "user", "federated-file"])
def test_outage_of_the_source_costs_nothing_before_the_token_ends(
    name: str, down: str, tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    source.lifetime = 8.0
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _BENT + _OUTAGE, tls[1]],
        cwd=ROOT,
        env={**environment, **SOURCES[name](source, tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "opened\n"
        source.down = down
        ends = max(source.given.values())
        process.stdin.write("go\n")
        process.stdin.flush()
        while time.time() < ends + 1.0:
            time.sleep(0.05)
        source.lifetime, source.down = 3600.0, ""
        source.released.set()
        signed_before, until = tls[0].calls()["AsymmetricSign"], time.monotonic() + 30
        while tls[0].calls()["AsymmetricSign"] < signed_before + 20:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.stdin.write("stop\n")
        process.stdin.flush()
        failed, signed = json.loads(process.stdout.readline().replace("(", "[").replace(")", "]"))
    # google-auth counts an access token of whole seconds.
    assert [at for at in failed if at < ends - 1.2] == []
    assert max(signed) > max(failed, default=0.0)


def test_refused_token_is_looked_for_anew(
    tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    server, uri = tls
    source.lifetime = 3600.0
    program = _OPENS.replace("open_signer(sys.argv[1]", "open_signer(sys.argv[1] + ''")
    server.tell(refuse=["ya29-token-000000"])
    try:
        told = _run(
            "from d1_signer.backends import renewal; renewal._PAUSE = 0.0\n" + program,
            tmp_path,
            uri,
            "30",
            **_from_user(source, tmp_path),
        )
    finally:
        server.tell(refuse=[])
    assert told.startswith("signed")
    assert server.tell()["tokens"][-1] == "ya29-token-000001"


@pytest.mark.parametrize("name", SOURCES)
def test_source_that_fails_is_told_as_that(
    name: str, tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    source.down = "fails"
    told = _run(_OPENS, tmp_path, tls[1], "30", **SOURCES[name](source, tmp_path))
    assert " True credentials " in told
    assert "Cloud KMS refused" not in told


def test_source_that_hangs_is_told_as_that(
    tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    source.down = "hangs"
    told = _run(_OPENS, tmp_path, tls[1], "3", **_from_user(source, tmp_path))
    assert told.startswith("signer_timeout True credentials The search for Google Cloud")
    assert float(told.splitlines()[-1]) < 20


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"type": "service_account"}', '{"type": "nobody-knows"}']
)
def test_file_that_is_none_is_told_and_is_final(
    content: str, tls: tuple[gcp.Gcp, str], tmp_path: Path
) -> None:
    file = tmp_path / "adc.json"
    file.write_text(content)
    told = _run(_OPENS, tmp_path, tls[1], "20", GOOGLE_APPLICATION_CREDENTIALS=str(file))
    assert told.startswith("login False credentials No Google Cloud credentials")


def test_cloud_of_the_environment_is_not_used(
    tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    environment = {
        **_from_user(source, tmp_path),
        "GOOGLE_CLOUD_UNIVERSE_DOMAIN": "evil.example",
        "GOOGLE_API_USE_MTLS_ENDPOINT": "always",
    }
    assert _run(_OPENS, tmp_path, tls[1], "30", **environment).startswith("signed")
    # Without an endpoint that is named, too; nothing is sent from here, for want of a network.
    program = (
        "from d1_signer.backends.gcp_kms.client import _client\n"
        "from d1_signer.backends.gcp_kms.place import read_uri\n"
        f"print(_client(read_uri('gcpkms://{gcp.VERSION}')).through(None).transport.host)"
    )
    assert _run(program, tmp_path, **environment) == "cloudkms.googleapis.com:443\n"
    other = f"{tls[1]}&universe-domain=bank.example"
    told = _run(_OPENS, tmp_path, other, "30", **_from_user(source, tmp_path))
    assert told.startswith("configuration False credentials")
    assert "GOOGLE_CLOUD_UNIVERSE_DOMAIN is not used" in told


def test_client_certificate_that_would_not_be_shown_is_refused(
    tls: tuple[gcp.Gcp, str], source: Source, tmp_path: Path
) -> None:
    environment = {
        **_from_user(source, tmp_path),
        "GOOGLE_API_USE_CLIENT_CERTIFICATE": "true",
    }
    told = _run(_OPENS, tmp_path, tls[1], "30", **environment)
    assert told.startswith("configuration False None GOOGLE_API_USE_CLIENT_CERTIFICATE")
