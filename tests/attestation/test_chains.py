# SPDX-License-Identifier: Apache-2.0
"""What certificates must be, in the chains of every format alike."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from asn1crypto import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.attestation import PUBLISHED, AttestationError, keys
from tests.attestation.changing import (
    adding,
    by_an_impostor,
    changed,
    refusal,
    to,
    with_key,
    with_root,
)
from tests.attestation.makers import KEY, MAKERS, ROOT, luna, package, trusted, yubihsm
from tests.attestation.pki import (
    END,
    NOW,
    START,
    Holder,
    Settings,
    certificate,
    ec_key,
    pem,
    rsa_key,
    spki,
    spki_sha256,
    without_sign_octets,
)

# Every certificate of every format below the root.
ROLES = [
    ("marvell", "card"),
    ("marvell", "partition"),
    ("marvell", "owned"),
    ("luna-pkc", "integrity"),
    ("luna-pkc", "origin"),
    ("luna-pkc", "device"),
    ("luna-pkc", "key"),
    ("yubihsm", "sub-ca"),
    ("yubihsm", "device"),
    ("yubihsm", "key"),
    ("yubikey-piv", "device"),
    ("yubikey-piv", "key"),
    ("securosys", "device"),
    ("securosys", "signer"),
    ("tpm2", "ca"),
    ("tpm2", "ak"),
]
# Those that stand above another, and how many authorities stand between it and the lowest.
AUTHORITIES = [
    ("luna-pkc", "integrity", 2),
    ("luna-pkc", "origin", 1),
    ("luna-pkc", "device", 0),
    ("yubihsm", "sub-ca", 1),
    ("yubihsm", "device", 0),
    ("yubikey-piv", "device", 0),
    ("securosys", "device", 0),
    ("tpm2", "ca", 0),
]
EachFormat = pytest.mark.parametrize("name", MAKERS)
EachRole = pytest.mark.parametrize(("name", "role"), ROLES)
EachAuthority = pytest.mark.parametrize(("name", "role", "below"), AUTHORITIES)


@EachFormat
def test_its_own_statement_is_verified(name: str) -> None:
    verified = MAKERS[name]().verify(public_key=spki(KEY))
    assert verified.spki == spki(KEY)
    assert verified.anchor == spki_sha256(ROOT.key)
    answers = (verified.exportable, verified.never_exportable, verified.generated_in_place)
    assert answers == (False, True, True)
    assert verified.hardware is True
    assert verified.limits


@EachRole
def test_time_is_judged_by_the_given_moment_alone(name: str, role: str) -> None:
    for moment in (START, END):
        made = changed(name, role, to(start=moment, end=moment))
        assert "not valid at the given time" in refusal(made)
        assert made.verify(at=moment.timestamp()).spki == spki(KEY)
        assert made.verify(at=None).spki == spki(KEY)
    made = changed(name, role, to(start=END - timedelta(days=1)))
    assert made.verify(at=END.timestamp()).spki == spki(KEY)
    assert "not valid" in refusal(made, at=END.timestamp() + 1)
    assert "not valid" in refusal(made, at=NOW)


@EachFormat
def test_an_anchor_is_a_key_and_does_not_expire(name: str) -> None:
    """As Marvell's: the certificate that comes along is of the past, and weakly signed."""
    made = with_root(MAKERS[name](), digest="sha1", start=START, end=START)
    hashes = [replace(made.anchors[0], spki=None), *made.anchors[1:]]
    assert made.verify().spki == spki(KEY)
    assert made.verify(anchors=hashes).anchor == spki_sha256(ROOT.key)
    assert "no trusted key" in refusal(MAKERS[name](), anchors=hashes), "a hash alone is no key"


@EachFormat
def test_only_the_given_anchors_are_trusted(name: str) -> None:
    made = MAKERS[name]()
    assert "no trusted key" in refusal(made, anchors=PUBLISHED)
    assert "no trusted key" in refusal(made, anchors=())
    for_others = [replace(each, formats=frozenset({"another"})) for each in made.anchors]
    assert "no trusted key" in refusal(made, anchors=for_others)
    for_it = [replace(each, formats=frozenset({name})) for each in made.anchors]
    assert made.verify(anchors=for_it).spki == spki(KEY)


@EachFormat
def test_a_root_that_comes_along_is_not_trusted_for_that(name: str) -> None:
    made = with_root(MAKERS[name](), ca=True, usages={"key_cert_sign"})
    other = trusted(Holder("another", ec_key("another")), owner=made.anchors[0].owner)
    assert refusal(made, anchors=(other, *made.anchors[1:]))


@EachFormat
def test_an_anchor_that_is_a_hash_alone_vouches_for_no_hardware(name: str) -> None:
    made = with_root(MAKERS[name]())
    anchors = [spki_sha256(ROOT.key).upper(), *made.anchors[1:]]
    assert made.verify(anchors=anchors).hardware is None


@EachRole
def test_a_certificate_by_another_key_is_refused(name: str, role: str) -> None:
    assert "no trusted key stands above" in refusal(changed(name, role, by_an_impostor))


@EachRole
def test_sha_1_is_refused(name: str, role: str) -> None:
    assert "weak" in refusal(changed(name, role, to(digest="sha1")))


def test_md5_is_refused() -> None:
    made = yubihsm({"sub-ca": with_key(rsa_key("sub-ca")), "device": to(digest="md5")})
    assert "weak" in refusal(made)


@EachAuthority
def test_short_rsa_keys_are_refused(name: str, role: str, below: int) -> None:
    assert below >= 0
    assert "below 2048" in refusal(changed(name, role, with_key(rsa_key("weak", 1024))))
    assert changed(name, role, with_key(rsa_key("strong"))).verify().spki == spki(KEY)


@EachRole
def test_critical_extensions_that_are_not_known_are_refused(name: str, role: str) -> None:
    made = changed(name, role, adding(("1.2.3.4", True, b"\x05\x00")))
    assert "critical extension 1.2.3.4" in refusal(made)
    made = changed(name, role, adding(("1.2.3.4", False, b"\x05\x00")))
    assert made.verify().spki == spki(KEY)


@EachRole
def test_an_extension_stands_once(name: str, role: str) -> None:
    twice = ("1.2.3.4", False, b"\x05\x00")
    assert "twice" in refusal(changed(name, role, adding(twice, twice)))


@EachAuthority
def test_who_is_no_authority_signs_nothing(name: str, role: str, below: int) -> None:
    assert "not an authority's" in refusal(changed(name, role, to(ca=False, longest=None)))
    if (name, role) != ("yubikey-piv", "device"):  # see test_yubico
        assert "not an authority's" in refusal(changed(name, role, to(ca=None)))
    made = changed(name, role, to(usages={"digital_signature", "crl_sign"}))
    assert "may not sign certificates" in refusal(made)
    if below:
        assert "does not admit" in refusal(changed(name, role, to(longest=below - 1)))
    assert changed(name, role, to(longest=below)).verify().spki == spki(KEY)


@pytest.mark.parametrize(
    ("name", "role"),
    [("marvell", "partition"), ("marvell", "owned"), ("luna-pkc", "key"), ("securosys", "signer"),
     ("tpm2", "ak")],
)  # fmt: skip
def test_a_signing_keys_usage_is_to_sign(name: str, role: str) -> None:
    made = changed(name, role, to(usages={"key_encipherment"}))
    assert "may not sign" in refusal(made)


@EachRole
def test_a_missing_certificate_leaves_no_chain(name: str, role: str) -> None:
    made = MAKERS[name]()
    if name == "luna-pkc":
        left = [each for key, each in made.certificates.items() if key != role]
        statement = replace(made.statement, content=package(left))
    elif name == "securosys":
        document = json.loads(made.statement.content)
        document["attestationCertChain"].remove(pem(made.certificates[role]).decode())
        statement = replace(made.statement, content=json.dumps(document).encode())
    else:
        joined = b"".join(made.statement.certificates)
        gone = pem(made.certificates[role])
        statement = replace(made.statement, certificates=(joined.replace(gone, b""),))
        if gone not in joined:
            statement = replace(made.statement, content=b"")
    with pytest.raises(AttestationError):
        replace(made, statement=statement).verify()


@EachFormat
def test_the_order_of_certificates_and_their_form_say_nothing(name: str) -> None:
    made = MAKERS[name]()
    every = [*made.certificates.values()]
    for certificates in (every[::-1], [b"".join(map(pem, every * 2))]):
        statement = made.statement
        if name not in {"luna-pkc", "securosys"}:
            statement = replace(statement, certificates=tuple(certificates))
        assert replace(made, statement=statement).verify().spki == spki(KEY)


def test_certificates_that_lead_in_circles_end() -> None:
    one, other = Holder("one", ec_key("one")), Holder("other", ec_key("other"))
    circle = [
        certificate(Settings(one, other, ca=True, usages={"key_cert_sign"})),
        certificate(Settings(other, one, ca=True, usages={"key_cert_sign"})),
    ]
    made = yubihsm({"sub-ca": to(issuer=one)})
    statement = replace(made.statement, certificates=(*made.statement.certificates, *circle))
    assert "no trusted key" in refusal(replace(made, statement=statement))


def test_many_certificates_of_one_name_take_bounded_time() -> None:
    """Each is signed rightly, so that every path through them could be gone."""
    many = [Holder("same", ec_key(f"same {number}")) for number in range(6)]
    web = [
        certificate(Settings(one, other, ca=True, usages={"key_cert_sign"}))
        for one in many
        for other in many
    ]
    made = yubihsm({"sub-ca": to(issuer=many[0])})
    statement = replace(made.statement, certificates=(*made.statement.certificates, *web))
    assert "too many signatures" in refusal(replace(made, statement=statement))


def test_a_certificate_that_came_along_in_vain_harms_nobody() -> None:
    """Of the issuer's name, before the issuer, and with a key that nobody would use."""
    made = yubihsm()
    holder = Holder("sub-ca", ec.generate_private_key(ec.SECP256K1()))
    stray = pem(certificate(Settings(holder, ROOT, ca=True, usages={"key_cert_sign"})))
    certificates = (stray, *made.statement.certificates)
    statement = replace(made.statement, certificates=certificates)
    assert replace(made, statement=statement).verify().spki == spki(KEY)


def test_an_exponent_that_costs_too_much_is_refused() -> None:
    exponent = (1 << 64) + 13
    modulus = rsa_key("sub-ca").public_key().public_numbers().n
    key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    with pytest.raises(AttestationError, match="exponent has more than 64 bits"):
        keys.verify_plain(key, bytes(256), b"x", SHA256())
    key = rsa.RSAPublicNumbers((1 << 64) - 59, modulus).public_key()
    assert keys.verify_plain(key, bytes(256), b"x", SHA256()) is False


def test_two_names_for_the_signature_algorithm_are_refused() -> None:
    made = yubihsm()
    der = made.certificates["device"]
    at = der.rindex(bytes.fromhex("2a8648ce3d040302"))
    twisted = der[:at] + bytes.fromhex("2a8648ce3d040303") + der[at + 8 :]
    certificates = (pem(made.certificates["sub-ca"]), pem(twisted))
    statement = replace(made.statement, certificates=certificates)
    assert "two signature algorithms" in refusal(replace(made, statement=statement))


@pytest.mark.parametrize("settings", [{"null_parameters": True}, {"mangle": without_sign_octets}])
@pytest.mark.parametrize(
    ("name", "role"), [("yubihsm", "device"), ("securosys", "signer"), ("tpm2", "ak")]
)
def test_lunas_forms_are_read_for_luna_alone(
    name: str, role: str, settings: dict[str, object]
) -> None:
    """NULL behind ECDSA, and INTEGERs without their sign octet, which only some numbers need."""
    assert luna().verify().spki == spki(KEY)
    tries = (changed(name, role, to(**settings)) for _ in range(64))
    made = next(each for each in tries if needs_a_sign(each.certificates[role]))
    assert "no trusted key" in refusal(made)


def needs_a_sign(encoding: bytes) -> bool:
    signature = x509.Certificate.load(encoding)["signature_value"].native
    return bool(signature[4] & 0x80 or signature[-32] & 0x80)
