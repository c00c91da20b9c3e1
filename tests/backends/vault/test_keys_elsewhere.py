# SPDX-License-Identifier: Apache-2.0
"""Keys that Vault does not hold itself: in an HSM or KMS behind OpenBao or Vault Enterprise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.es256 import PublicKey
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.signing.opening import open_signer
from tests.backends.vault.conftest import signs
from tests.servers import vault
from tests.servers.vault import calls

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.fault_proxy import Answer, FaultProxy


@pytest.fixture(scope="module")
def pem(server: vault.Vault) -> str:
    """The public key of ``external``: in another Transit engine, which stands for an HSM."""
    return server.make_external_key("external")


def test_external_key(proxy: FaultProxy, pem: str, tmp_path: Path) -> None:
    file = tmp_path / "public key.pem"
    file.write_text(pem)
    for options in ({"public_key": pem}, {"public_key": PublicKey.from_pem(pem)}):
        with open_signer("hashivault://external", address=proxy.url, **options) as signer:
            assert signer._backend.encoding is SignatureEncoding.DER
            signs(signer)
    quoted = str(file).replace(" ", "%2520")
    with open_signer(f"hashivault://external?version=1&public-key=file:{quoted}") as signer:
        signs(signer)
    assert json.loads(proxy.requests[-1].body)["marshaling_algorithm"] == "asn1"
    assert len(calls(proxy)) == 4


def test_custody_of_an_external_key_says_what_is_known(pem: str) -> None:
    with open_signer("hashivault://external", public_key=pem) as signer:
        evidence = signer.custody().evidence
    assert (evidence.exportable, evidence.generated_in_place, evidence.hardware) == (None,) * 3
    facts = {fact.name: fact.value for fact in evidence.facts}
    assert facts["type"] == "external-key"
    assert facts["external_key_ref"] == "hsm:external"
    for demand in ("non_exportable", "generated_in_place", "hardware"):
        with pytest.raises(errors.CustodyError):
            open_signer(
                "hashivault://external",
                public_key=pem,
                custody_policy=CustodyPolicy(**{demand: True}),
            )


@pytest.mark.usefixtures("pem")
def test_its_public_key_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidKeyError, match="does not tell the public key") as refused:
        open_signer("hashivault://external")
    assert "public_key" in refused.value.hint
    with pytest.raises(errors.InvalidKeyError):
        open_signer("hashivault://external", public_key="no PEM")
    (tmp_path / "no.pem").write_text("no PEM")
    with pytest.raises(errors.InvalidKeyError):
        open_signer(f"hashivault://external?public-key=file:{tmp_path}/no.pem")
    with pytest.raises(errors.ConfigurationError, match="cannot be read"):
        open_signer(f"hashivault://external?public-key=file:{tmp_path}/missing.pem")
    with pytest.raises(errors.ConfigurationError, match="cannot be read"):
        open_signer(f"hashivault://external?public-key=file:{tmp_path}")
    with pytest.raises(errors.KeyUriError):
        open_signer(f"hashivault://external?public-key={tmp_path}/no.pem")


def test_signature_of_another_key_than_the_given_one_is_not_used(server: vault.Vault) -> None:
    other = server.api("GET", "transit/keys/other")["data"]["keys"]["1"]["public_key"]
    server.make_external_key("mistaken")
    with (
        open_signer("hashivault://mistaken", public_key=other) as signer,
        pytest.raises(errors.InvalidSignatureError),
    ):
        signer.sign(b"m")


def test_given_public_key_of_a_key_that_vault_holds_is_compared(server: vault.Vault) -> None:
    own, other = (
        server.api("GET", f"transit/keys/{name}")["data"]["keys"]["1"]["public_key"]
        for name in ("d1", "other")
    )
    with open_signer("hashivault://d1", public_key=own) as signer:
        signs(signer)
    with pytest.raises(errors.KeyMismatchError):
        open_signer("hashivault://d1", public_key=other)


def test_managed_key_of_vault_enterprise(proxy: FaultProxy, pem: str) -> None:
    # Its description, as Vault's source gives it, has no versions at all.
    def managed(request: Any, forward: Any) -> Answer:
        answer: Answer = forward(request)
        if "/keys/" not in request.path:
            return answer
        told = json.loads(answer.body)
        told["data"]["type"] = "managed_key"
        del told["data"]["keys"]
        return replace(answer, body=json.dumps(told).encode())

    proxy.fault = managed
    with open_signer("hashivault://external", address=proxy.url, public_key=pem) as signer:
        signs(signer)
        assert signer.custody().evidence.hardware is None


def test_missing_grant_is_told(server: vault.Vault) -> None:
    pem = server.make_external_key("ungranted")
    with open_signer("hashivault://ungranted", public_key=pem) as signer:
        signs(signer)
        server.api("DELETE", "sys/external-keys/configs/hsm/keys/ungranted/grants/transit")
        with pytest.raises(errors.AccessDeniedError) as refused:
            signer.sign(b"m")
        assert "grant" in refused.value.hint.lower()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-8],
        lambda text: text + "AAAA",
        lambda text: text.replace("vault:v1:", "x"),
    ],
)
def test_der_that_is_altered_is_not_used(proxy: FaultProxy, pem: str, change: Any) -> None:
    with open_signer("hashivault://external", address=proxy.url, public_key=pem) as signer:
        proxy.fault = vault.on_sign(vault.signature(change))
        with pytest.raises((errors.IntegrityError, errors.InvalidSignatureError)):
            signer.sign(b"m")
