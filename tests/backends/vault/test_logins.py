# SPDX-License-Identifier: Apache-2.0
"""Logins by JWT, by Kubernetes service account and by client certificate, on the real server."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from d1_signer import errors
from d1_signer.backends.vault.backend import VaultBackend
from d1_signer.backends.vault.credentials import Credentials
from d1_signer.backends.vault.http import HttpClient
from d1_signer.backends.vault.settings import read_settings
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.backends.vault.conftest import signs
from tests.servers.vault import calls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import vault
    from tests.servers.fault_proxy import FaultProxy

# A token is renewed after a second of an hour.
pytestmark = pytest.mark.usefixtures("soon")

KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 3e-4)


def _token(audience: str = "vault", lifetime: float = 600, subject: str = "d1-signer") -> str:
    now = int(time.time())
    claims = {"sub": subject, "aud": audience, "iat": now - 60, "exp": int(now + lifetime)}
    return jwt.encode(claims, KEY, algorithm="ES256")


@pytest.fixture(scope="module")
def by_jwt(server: vault.Vault) -> str:
    server.api("POST", "sys/auth/jwt", type="jwt")
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    server.api("POST", "auth/jwt/config", jwt_validation_pubkeys=[pem])
    server.api(
        "POST",
        "auth/jwt/role/signer",
        role_type="jwt",
        user_claim="sub",
        bound_audiences=["vault"],
        token_policies=["signer"],
        token_ttl="1h",
    )
    return "signer"


def _survives_a_renewal(signer: Signer) -> None:
    """With a share of the life that is over at once."""
    assert isinstance(signer._backend, VaultBackend)
    tokens = signer._backend._clients.get()._tokens
    first = tokens._held
    assert first is not None
    until = time.monotonic() + 40
    while (tokens._held or first).ends <= first.ends:
        assert time.monotonic() < until, "it is not renewed"
        time.sleep(0.02)
    held = tokens._held
    assert held is not None
    assert held.token is first.token
    signs(signer)


def _file(folder: Path, text: str) -> Path:
    file = folder / "token"
    file.touch(0o600)
    file.write_text(text)
    return file


def test_jwt_of_a_file(proxy: FaultProxy, by_jwt: str, tmp_path: Path) -> None:
    file = _file(tmp_path, _token())
    uri = f"hashivault://d1?role={by_jwt}&jwt-source=file:{file}"
    with open_signer(uri, address=proxy.url) as signer:
        signs(signer)
        _survives_a_renewal(signer)
    assert calls(proxy)[0] == "POST auth/jwt/login"


def test_jwt_that_is_refused_names_itself_and_is_no_longer_sent_until_it_is_renewed(
    proxy: FaultProxy, by_jwt: str, tmp_path: Path
) -> None:
    file = _file(tmp_path, expired := _token(lifetime=-3600))
    settings = read_settings(proxy.url)
    credentials = Credentials(role=by_jwt, jwt_source=f"file:{file}")
    source = credentials.source(settings)
    http = HttpClient(settings)
    for _ in range(5):
        with pytest.raises(errors.LoginError) as refused:
            source.obtain(http, time.monotonic() + 30)
        assert "JWT" in refused.value.hint
        assert expired not in repr(refused.value.to_dict())
    assert len(calls(proxy)) == 1
    file.write_text(_token())
    assert source.obtain(http, time.monotonic() + 30).token is not None


class _Reviews(BaseHTTPRequestHandler):
    """The part of Kubernetes' API that Vault asks whose a token is."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            claims = jwt.decode(
                asked["spec"]["token"], KEY.public_key(), algorithms=["ES256"], audience="vault"
            )
            status: dict[str, Any] = {
                "authenticated": True,
                "audiences": claims["aud"],
                "user": {
                    "username": claims["sub"],
                    "uid": "7d6e",
                    "groups": ["system:serviceaccounts"],
                },
            }
        except jwt.InvalidTokenError:
            status = {"authenticated": False}
        body = json.dumps(
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}
        ).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def by_kubernetes(server: vault.Vault) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Reviews) as reviews:
        thread = threading.Thread(target=reviews.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        server.api("POST", "sys/auth/k8s", type="kubernetes")
        server.api(
            "POST",
            "auth/k8s/config",
            kubernetes_host=f"http://127.0.0.1:{reviews.server_port}",
            token_reviewer_jwt=_token(),
            disable_local_ca_jwt=True,
            kubernetes_ca_cert=server.ca_file.read_text(),
        )
        server.api(
            "POST",
            "auth/k8s/role/issuer",
            bound_service_account_names=["d1-signer"],
            bound_service_account_namespaces=["bank"],
            token_policies=["signer"],
            token_ttl="1h",
        )
        yield "issuer"
        reviews.shutdown()
        thread.join()


def _service_account(name: str = "d1-signer") -> str:
    now = int(time.time())
    claims = {
        "iss": "kubernetes/serviceaccount",
        "sub": f"system:serviceaccount:bank:{name}",
        "aud": ["vault"],
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 600,
        "kubernetes.io": {
            "namespace": "bank",
            "serviceaccount": {"name": name, "uid": "7d6e"},
        },
    }
    return jwt.encode(claims, KEY, algorithm="ES256")


def test_kubernetes_service_account(
    proxy: FaultProxy, by_kubernetes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"hashivault://d1?auth=kubernetes&role={by_kubernetes}&auth-mount=k8s"
    file = _file(tmp_path, _service_account())
    file.chmod(0o644)  # as the kubelet leaves it for a pod that names no user and no group
    monkeypatch.setattr("d1_signer.backends.vault.logins._SERVICE_ACCOUNT", str(file))
    with open_signer(uri, address=proxy.url) as signer:
        signs(signer)
        _survives_a_renewal(signer)
    assert calls(proxy)[0] == "POST auth/k8s/login"
    file.write_text(_service_account("somebody-else"))
    with pytest.raises(errors.LoginError) as refused:
        open_signer(uri)
    assert "service account" in refused.value.hint
    with pytest.raises(errors.SecretSourceError, match="0644"):
        open_signer(f"{uri}&jwt-source=file:{file}")
    file.unlink()
    with pytest.raises(errors.SecretSourceError, match="service account"):
        open_signer(uri)


def test_client_certificate(server: vault.Vault) -> None:
    server.api("POST", "sys/auth/cert", type="cert")
    server.api(
        "POST",
        "auth/cert/certs/issuer",
        certificate=server.authority.ca_file.read_text(),
        allowed_common_names=["d1-signer"],
        token_policies=["signer"],
        token_ttl="1h",
    )
    options: dict[str, Any] = {"address": server.mutual_url, "ca_file": str(server.ca_file)}
    certificate, key = server.authority.issue("d1-signer")
    for uri in ("hashivault://d1?auth=cert", "hashivault://d1?auth=cert&role=issuer"):
        with open_signer(
            uri, client_cert=str(certificate), client_key=str(key), **options
        ) as signer:
            signs(signer)
            _survives_a_renewal(signer)
    with pytest.raises(errors.ConfigurationError, match="certificate"):
        open_signer("hashivault://d1?auth=cert", **options)
    certificate, key = server.authority.issue("somebody-else")
    with pytest.raises(errors.LoginError) as refused:
        open_signer(
            "hashivault://d1?auth=cert",
            client_cert=str(certificate),
            client_key=str(key),
            **options,
        )
    assert "client certificate" in refused.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"auth": "ldap"},
        {"auth": "kubernetes"},
        {"auth": "jwt", "role": "r"},
        {"auth": "approle", "role_id": "r"},
        {"auth": "token", "role_id": "r", "secret_id_source": "env:X"},
        {"role": "r"},
        {"auth_mount": "approle"},
        {"role_id": "r", "secret_id_source": "env:X", "jwt_source": "env:Y"},
        {"jwt_source": "env:Y", "token_source": "env:X"},
        {"auth": "jwt", "jwt_source": "env:Y", "auth_mount": "../sys"},
        {"trusted_owner": "root"},
        {"trusted_owner": True},
    ],
    ids=str,
)
def test_credentials_that_are_not_clear(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_signer("hashivault://d1", **options)
