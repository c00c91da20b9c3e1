# SPDX-License-Identifier: Apache-2.0
"""Which token, which key, which public key."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pkcs11
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

from d1_signer.backends.pkcs11.generate import _USES
from d1_signer.errors import (
    AmbiguousKeyError,
    ConfigurationError,
    InvalidKeyError,
    KeyExistsError,
    KeyMismatchError,
    KeyNotFoundError,
    KeyUriError,
    SignerError,
)
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim

Change = Callable[[Any], object]


def change(token: SoftHsmToken, how: Change) -> None:
    """Do something to the token as another application would."""
    module = pkcs11.lib(token.module_path)
    try:
        slot = module.get_token(token_label=token.label)
        with slot.open(rw=True, user_pin=token.pin) as session:
            how(session)
    finally:
        module.finalize()


def make_pair(
    session: Any, label: str, key_id: bytes, curve: str = "secp256r1", **more: Any
) -> Any:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}, local=True
    )
    capabilities = MechanismFlag.SIGN | MechanismFlag.VERIFY
    options = {"capabilities": capabilities, "label": label, "id": key_id, "store": True, **more}
    return parameters.generate_keypair(**options)


def works(signer: Signer) -> None:
    with signer:
        signer.public_key.verify(signer.sign(b"message"), b"message")


def test_generated_key_is_as_promised(token: SoftHsmToken) -> None:
    made = generate_key(token.key_uri("new"))
    with open_signer(made.uri) as signer:
        assert signer.public_key == made.public_key
        evidence = signer.custody().evidence
    assert evidence.exportable is False
    assert evidence.generated_in_place is True
    assert evidence.hardware is False
    facts = {fact.name: fact.value for fact in evidence.facts}
    expected = {"LOCAL": True, "SENSITIVE": True, "EXTRACTABLE": False, "SIGN": True}
    expected |= {"DECRYPT": False, "DERIVE": False, "UNWRAP": False, "NEVER_EXTRACTABLE": True}
    assert {name: facts[f"CKA_{name}"] for name in expected} == expected
    assert facts["CKA_KEY_GEN_MECHANISM"] == "EC_KEY_PAIR_GEN"
    assert facts["token label"] == token.label


def test_generated_key_is_not_overwritten(token: SoftHsmToken) -> None:
    with pytest.raises(KeyExistsError):
        generate_key(token.uri)
    first = generate_key(f"pkcs11:token={token.label};object=a;id=%01?{_query(token)}")
    with pytest.raises(KeyExistsError) as raised:
        generate_key(f"pkcs11:token={token.label};object=b;id=%01?{_query(token)}")
    # It names the key that is there, and what of it collided; not what was asked for.
    assert raised.value.message == "A key with this id exists: 'a' (id=%01, EC)."
    assert "another id" in raised.value.hint
    with pytest.raises(KeyExistsError) as raised:
        generate_key(f"pkcs11:token={token.label};object=a?{_query(token)}")
    assert raised.value.message == "A key with this label (object) exists: 'a' (id=%01, EC)."
    assert "another label" in raised.value.hint
    assert ";id=%01?" in first.uri
    with pytest.raises(KeyUriError):
        generate_key(f"pkcs11:token={token.label}?{_query(token)}")


def test_key_made_otherwise_than_asked_is_removed(token: SoftHsmToken, shim: Shim) -> None:
    shim.fail(Call.GET_ATTRIBUTE_VALUE, 0x12)  # CKR_ATTRIBUTE_TYPE_INVALID: cannot be checked
    with pytest.raises(SignerError):
        generate_key(token.key_uri("new"), module_path=shim.path)
    shim.heal()
    with pytest.raises(KeyNotFoundError):
        open_signer(token.key_uri("new"), module_path=shim.path)
    assert shim.sessions == 0


def test_module_that_refuses_the_long_template_makes_no_key_that_derives(
    token: SoftHsmToken, shim: Shim
) -> None:
    shim.fail(Call.GENERATE_KEY_PAIR, 0xD1, times=1)  # CKR_TEMPLATE_INCONSISTENT
    made = generate_key(token.key_uri("new"), module_path=shim.path)
    with open_signer(made.uri, module_path=shim.path) as signer:
        facts = {fact.name: fact.value for fact in signer.custody().evidence.facts}
    forbidden = ("CKA_DERIVE", "CKA_DECRYPT", "CKA_UNWRAP")
    assert {facts[name] for name in forbidden} == {False}
    assert facts["CKA_SIGN"] is True
    assert shim.calls(Call.GENERATE_KEY_PAIR) == 2


@pytest.mark.parametrize("name", [Attribute.DERIVE, Attribute.DECRYPT, Attribute.UNWRAP])
def test_key_that_can_more_than_sign_is_refused(
    token: SoftHsmToken, shim: Shim, monkeypatch: pytest.MonkeyPatch, name: Attribute
) -> None:
    monkeypatch.setitem(_USES, name, value=True)  # as a token that adds it by itself
    with pytest.raises(SignerError, match=f"CKA_{name.name}") as raised:
        generate_key(token.key_uri("new"), module_path=shim.path)
    assert "was removed" in raised.value.hint
    with pytest.raises(KeyNotFoundError):
        open_signer(token.key_uri("new"), module_path=shim.path)
    shim.fail(Call.DESTROY_OBJECT, 0x06)
    with pytest.raises(SignerError) as raised:
        generate_key(token.key_uri("new"), module_path=shim.path)
    assert "was removed" not in raised.value.hint
    assert "object=new" in raised.value.hint


def test_locking_of_generate_key(token: SoftHsmToken, shim: Shim) -> None:
    generate_key(token.key_uri("new"), module_path=shim.path, locking="lock")
    assert shim.initialized_with_os_locking == 0
    with pytest.raises(ConfigurationError):
        generate_key(token.key_uri("other"), module_path=shim.path, locking="none")


def test_no_key_fits(token: SoftHsmToken) -> None:
    with pytest.raises(KeyNotFoundError, match=r"'d1' \(id=(%[0-9A-F]{2}){8}, EC\)") as raised:
        open_signer(token.key_uri("none"))
    assert raised.value.details["step"] == "key"


def test_no_token_fits(token: SoftHsmToken) -> None:
    with pytest.raises(KeyNotFoundError, match=token.label) as raised:
        open_signer(f"pkcs11:token=none;object=d1?{_query(token)}")
    assert raised.value.details["step"] == "token"


def test_keys_of_one_label_are_told_apart_by_id(token: SoftHsmToken) -> None:
    change(token, lambda session: (make_pair(session, "x", b"1"), make_pair(session, "x", b"\xff")))
    with pytest.raises(AmbiguousKeyError, match="id=%FF"):
        open_signer(token.key_uri("x"))
    works(open_signer(f"pkcs11:token={token.label};object=x;id=%FF?{_query(token)}"))
    works(open_signer(f"pkcs11:token={token.label};id=1?{_query(token)}"))


@pytest.mark.parametrize(
    "part",
    [
        "serial={serial}",
        "manufacturer=SoftHSM%20project;token={label}",
        "model=SoftHSM%20v2;serial={serial}",
        "slot-id={slot}",
        "library-version=2;token={label}",
        "library-version=2.6;library-manufacturer=SoftHSM;serial={serial}",
        "slot-manufacturer=SoftHSM%20project;serial={serial}",
    ],
)
def test_token_by_each_attribute(token: SoftHsmToken, part: str) -> None:
    seen: dict[str, Any] = {"label": token.label}

    def look(session: Any) -> None:
        seen["serial"] = session.token.serial.decode()
        seen["slot"] = session.token.slot.slot_id

    change(token, look)
    works(open_signer(f"pkcs11:{part.format(**seen)};object=d1?{_query(token)}"))


@pytest.mark.parametrize(
    "part", ["serial=0", "model=x", "slot-id=1", "library-version=9", "library-manufacturer=x"]
)
def test_token_by_a_wrong_attribute(token: SoftHsmToken, part: str) -> None:
    with pytest.raises(KeyNotFoundError):
        open_signer(f"pkcs11:token={token.label};{part};object=d1?{_query(token)}")


def test_public_key_from_a_certificate_or_the_caller(token: SoftHsmToken) -> None:
    made = generate_key(token.key_uri("c"))
    change(token, lambda session: _destroy(session, ObjectClass.PUBLIC_KEY, "c"))
    with pytest.raises(KeyNotFoundError, match="no public key and no certificate"):
        open_signer(made.uri)
    works(open_signer(made.uri, public_key=made.public_key))
    works(open_signer(made.uri, public_key=made.public_key.pem()))
    other = ec.generate_private_key(ec.SECP256R1())
    key = made.public_key.cryptography_key()
    with open_signer(made.uri, public_key=made.public_key) as signer:
        key_id = bytes.fromhex(signer.custody().evidence.location.split("id=")[1].replace("%", ""))
    change(token, lambda session: _store(session, _certificate(key, other), key_id))
    works(open_signer(made.uri))


def test_private_key_that_does_not_fit_is_refused(token: SoftHsmToken) -> None:
    def swap(session: Any) -> None:
        make_pair(session, "one", b"1")
        make_pair(session, "two", b"2")
        _destroy(session, ObjectClass.PUBLIC_KEY, "one")
        public = next(
            iter(
                list(
                    session.get_objects(
                        {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.LABEL: "two"}
                    )
                )
            )
        )
        public.copy({Attribute.ID: b"1", Attribute.LABEL: "one"})

    change(token, swap)
    with pytest.raises(KeyMismatchError) as raised:
        open_signer(token.key_uri("one"))
    assert raised.value.details["step"] == "signature"
    works(open_signer(token.key_uri("two")))


def test_given_public_key_must_be_the_tokens(token: SoftHsmToken) -> None:
    other = generate_key(token.key_uri("other"))
    with pytest.raises(KeyMismatchError):
        open_signer(token.uri, public_key=other.public_key)


def test_other_curves_and_key_types_are_refused(token: SoftHsmToken) -> None:
    def make(session: Any) -> None:
        make_pair(session, "p384", b"1", curve="secp384r1")
        session.generate_keypair(KeyType.RSA, 2048, store=True, label="rsa", id=b"2")
        make_pair(session, "derive", b"3", capabilities=MechanismFlag.DERIVE)

    change(token, make)
    for label in ("p384", "rsa", "derive"):
        with pytest.raises(InvalidKeyError) as raised:
            open_signer(token.key_uri(label))
        assert raised.value.details["step"] == "key"


def test_thumbprint_pins_the_key(token: SoftHsmToken, shim: Shim) -> None:
    with open_signer(token.uri, module_path=shim.path) as signer:
        thumbprint = signer.public_key.thumbprint()
    works(open_signer(token.uri, module_path=shim.path, expected_thumbprint=thumbprint))
    with pytest.raises(KeyMismatchError):
        open_signer(token.uri, module_path=shim.path, expected_thumbprint="x" * 43)
    assert shim.sessions == 0


def test_module_is_named(token: SoftHsmToken) -> None:
    with pytest.raises(KeyUriError, match="softhsm") as missing:
        open_signer(f"pkcs11:token={token.label}")
    assert missing.value.details["step"] == "module"
    works(
        open_signer(token.uri.replace(f"module-path={token.module_path}", "module-name=softhsm2"))
    )
    for path in ("/nonexistent.so", "/etc/hostname"):
        with pytest.raises(ConfigurationError) as raised:
            open_signer(token.uri, module_path=path)
        assert raised.value.details["step"] == "module"
        assert path in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_sessions": 0},
        {"max_sessions": True},
        {"timeout": 0},
        {"timeout": "1"},
        {"session_timeout": -1},
        {"locking": "none"},
        {"isolation": "thread"},
        {"processes": 0},
        {"user_type": -1},
    ],
    ids=str,
)
def test_option_out_of_range(token: SoftHsmToken, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        open_signer(token.uri, **options)


def _query(token: SoftHsmToken) -> str:
    return token.uri.partition("?")[2]


def _destroy(session: Any, kind: ObjectClass, label: str) -> None:
    for item in list(session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: label})):
        item.destroy()


def _certificate(key: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key, 1, begin, begin.replace(year=2036))
    return builder.sign(issuer, SHA256()).public_bytes(Encoding.DER)


def _store(session: Any, certificate: bytes, key_id: bytes) -> None:
    name = x509.load_der_x509_certificate(certificate).subject.public_bytes()
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.CERTIFICATE,
            Attribute.CERTIFICATE_TYPE: pkcs11.CertificateType.X_509,
            Attribute.TOKEN: True,
            Attribute.SUBJECT: name,
            Attribute.VALUE: certificate,
            Attribute.ID: key_id,
            Attribute.LABEL: "certificate",
        }
    )
