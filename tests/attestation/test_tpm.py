# SPDX-License-Identifier: Apache-2.0
"""TPM: what its attestation key must be, and what the two commands prove."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d1_signer.attestation import AttestationError, Verified
from tests.attestation.changing import refusal, to
from tests.attestation.makers import CREATION, KEY, NONCE, Made, tpm2, tpm2b
from tests.attestation.pki import ec_key, rsa_key, sign, spki, spki_sha256

_FIXED_TPM, _FIXED_PARENT, _ORIGIN = 1 << 1, 1 << 4, 1 << 5
_RESTRICTED, _DECRYPT, _SIGN = 1 << 16, 1 << 17, 1 << 18
_KEY, _AK = 0x00040072, 0x00050072


def answers(verified: Verified) -> tuple[bool | None, ...]:
    return verified.exportable, verified.never_exportable, verified.generated_in_place


def with_parts(made: Made, **parts: bytes) -> Made:
    merged = {**(made.statement.parts or {}), **parts}
    return replace(made, statement=replace(made.statement, parts=merged))


@pytest.mark.parametrize("creation", [True, False])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("ak", [ec_key("ak"), "rsa"])
def test_both_commands_and_both_forms_of_signatures(
    creation: bool, plain: bool, ak: object
) -> None:
    key = rsa_key("ak") if ak == "rsa" else ec_key("ak")
    verified = tpm2(creation=creation, plain=plain, ak=key).verify()
    assert answers(verified) == (False, True, True)
    assert verified.facts["statement"] == ("TPM2_CertifyCreation" if creation else "TPM2_Certify")
    assert any("how it was made" in limit for limit in verified.limits) is not creation


def test_keys_of_rsa() -> None:
    assert tpm2(key=rsa_key("statement")).verify().spki == spki(rsa_key("statement"))


@pytest.mark.parametrize(
    "attributes",
    [
        _AK & ~_RESTRICTED,
        _AK & ~_SIGN,
        _AK | _DECRYPT,
        _AK & ~_FIXED_TPM,
        _AK & ~_ORIGIN,
    ],
)
def test_the_attestation_key_signs_nothing_but_what_the_tpm_made(attributes: int) -> None:
    assert "could sign any bytes" in refusal(tpm2(ak_attributes=attributes))


def test_the_magic_is_that_of_what_a_tpm_made() -> None:
    for magic in (0xFF544346, 0, 0x47435454):
        assert "a TPM made itself" in refusal(tpm2(magic=magic))


def test_an_imported_key_is_exportable() -> None:
    """It is attested as loaded, which says nothing of where else it is."""
    given = tpm2(creation=False, attributes=_KEY & ~(_FIXED_TPM | _FIXED_PARENT | _ORIGIN))
    assert answers(given.verify()) == (True, False, False)
    fixed = tpm2(creation=False, attributes=_KEY & ~_ORIGIN)
    assert answers(fixed.verify()) == (False, False, False)


def test_a_key_that_can_move_was_made_in_some_tpm() -> None:
    moves = _KEY & ~(_FIXED_TPM | _FIXED_PARENT)
    assert answers(tpm2(creation=False, attributes=moves).verify()) == (True, False, None)
    assert answers(tpm2(creation=True, attributes=moves).verify()) == (True, False, True)


def test_the_creation_hash_is_that_of_the_data() -> None:
    assert "creation data" in refusal(tpm2(hashed=CREATION + b"x"))
    assert "creation_data is missing" in refusal(tpm2(parts={"creation_data": b""}))
    assert tpm2(parts={"creation_data": CREATION}).verify().spki == spki(KEY)
    assert tpm2(creation=False, parts={"creation_data": CREATION}).verify().spki == spki(KEY)


def test_the_nonce_is_signed() -> None:
    made = tpm2()
    for nonce in (NONCE[:-1], NONCE + b"x", b"x"):
        assert "nonce" in refusal(made, nonce=nonce)
    assert "nonce" in refusal(replace(made, statement=replace(made.statement, nonce=b"x")))
    verified = made.verify(nonce=None)
    assert any("an old one looks the same" in limit for limit in verified.limits)
    assert not any("an old one" in limit for limit in made.verify().limits)


def test_the_public_area_is_the_one_that_is_named() -> None:
    other = tpm2(key=ec_key("another")).statement.parts or {}
    assert "another key" in refusal(with_parts(tpm2(), public=other["public"]))
    # The same key with better attributes is another object.
    better = tpm2(attributes=_KEY).statement.parts or {}
    worse = tpm2(attributes=_KEY & ~_FIXED_TPM)
    assert "another key" in refusal(with_parts(worse, public=better["public"]))


def test_the_attestation_key_is_trusted_or_certified() -> None:
    direct = tpm2(certified=False)
    assert direct.verify().anchor == spki_sha256(ec_key("ak"))
    assert direct.verify(anchors=[spki_sha256(ec_key("ak"))]).hardware is None
    assert "neither trusted nor certified" in refusal(direct, anchors=[])
    # That of an endorsement key, or of any other, says nothing of this one.
    certificates = tpm2(ak=ec_key("another")).statement.certificates
    made = tpm2()
    statement = replace(made.statement, certificates=certificates)
    assert "neither trusted nor certified" in refusal(replace(made, statement=statement))
    for purposes in (["2.23.133.8.1"], ["1.3.6.1.5.5.7.3.2"], None):
        assert "of an attestation key" in refusal(tpm2({"ak": to(purposes=purposes)}))


def test_a_certificate_of_an_attestation_key_may_be_nameless() -> None:
    """Then its critical alternative name has the TPM's model."""
    name = ("2.5.29.17", True, b"\x30\x00")
    assert tpm2({"ak": to(extensions=[name])}).verify().spki == spki(KEY)


def test_another_key_or_another_scheme_did_not_sign_it() -> None:
    other = tpm2(ak=ec_key("another")).statement.parts or {}
    assert "not by the attestation key" in refusal(with_parts(tpm2(), signature=other["signature"]))
    signature = (tpm2().statement.parts or {})["signature"]
    sha384 = signature[:2] + b"\x00\x0c" + signature[4:]
    assert "not by the scheme" in refusal(with_parts(tpm2(), signature=sha384))
    # ECDAA, and ECDSA with SHA-1: by the signature's own form they could pass for ECDSA.
    for scheme in (b"\x00\x1a\x00\x0b", b"\x00\x18\x00\x04"):
        made = tpm2(plain=True)
        ak = (made.statement.parts or {})["ak_public"].replace(b"\x00\x18\x00\x0b", scheme, 1)
        assert "another scheme" in refusal(with_parts(made, ak_public=ak))
    without = (tpm2().statement.parts or {})["ak_public"][2:].replace(
        b"\x00\x18\x00\x0b", b"\x00\x10", 1
    )
    assert "another scheme" in refusal(with_parts(tpm2(), ak_public=tpm2b(without)))


def test_a_clock_that_is_none_is_refused() -> None:
    assert tpm2(safe=0).verify().spki == spki(KEY)
    assert "not one of a TPM" in refusal(tpm2(safe=2))


@pytest.mark.parametrize("name", ["attest", "signature", "public", "ak_public", "creation_data"])
def test_parts_are_there_and_whole(name: str) -> None:
    made = tpm2()
    part = (made.statement.parts or {})[name]
    for other in (b"", part[:-1], part + b"\0", part[1:]):
        with pytest.raises(AttestationError):
            with_parts(made, **{name: other}).verify()
    without = {key: value for key, value in (made.statement.parts or {}).items() if key != name}
    statement = replace(made.statement, parts=without)
    assert f"{name} is missing" in refusal(replace(made, statement=statement))


def test_quotes_and_other_statements_are_refused() -> None:
    attest = bytearray((tpm2(creation=False).statement.parts or {})["attest"])
    for kind in (0x8018, 0x8019, 0x801C):
        attest[4:6] = kind.to_bytes(2, "big")
        made = with_parts(
            tpm2(creation=False, plain=True),
            attest=bytes(attest),
            signature=sign(ec_key("ak"), bytes(attest)),
        )
        assert "neither a TPM2_Certify" in refusal(made)


def test_content_is_empty_or_what_is_signed() -> None:
    made = tpm2()
    attest = (made.statement.parts or {})["attest"]
    doubled = replace(made, statement=replace(made.statement, content=attest))
    assert doubled.verify() == made.verify()
    other = replace(made, statement=replace(made.statement, content=b"x"))
    assert "beside its parts" in refusal(other)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"\x00\x23\x00\x0b", b"\x00\x08\x00\x0b", "RSA or ECC key that is named by SHA-2"),
        (b"\x00\x23\x00\x0b", b"\x00\x23\x00\x04", "RSA or ECC key that is named by SHA-2"),
        (b"\x00\x10\x00\x10\x00\x03", b"\x00\x10\x00\x10\x00\x10", "not on P-256"),
        (b"\x00\x03\x00\x10", b"\x00\x03\x00\x20", "key derivation"),
    ],
)
def test_public_areas_of_other_keys_are_refused(old: bytes, new: bytes, told: str) -> None:
    made = tpm2()
    public = (made.statement.parts or {})["public"]
    assert old in public
    assert told in refusal(with_parts(made, public=public.replace(old, new, 1)))


def test_public_areas_that_are_cut_or_contradict_themselves_are_refused() -> None:
    made = tpm2(key=rsa_key("statement"))
    public = (made.statement.parts or {})["public"][2:]
    assert "is cut" in refusal(with_parts(made, public=public[:-1]))
    assert "stands behind" in refusal(with_parts(made, public=public + b"\0"))
    longer = public.replace(b"\x08\x00\x00\x00\x00\x00", b"\x10\x00\x00\x00\x00\x00", 1)
    assert longer != public
    assert "not as long as it says" in refusal(with_parts(made, public=longer))
