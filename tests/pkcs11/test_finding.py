# SPDX-License-Identifier: Apache-2.0
"""Good keys that a token tells of in another way than most, and errors that show the right way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, KeyType, MechanismFlag

from d1_signer.backends.pkcs11.keys import P256
from d1_signer.backends.pkcs11.public_keys import read_point
from d1_signer.errors import (
    AmbiguousKeyError,
    InvalidKeyError,
    KeyMismatchError,
    KeyNotFoundError,
    LoginError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.opening import open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import ABORT, Call, Shim

_PUBLIC_KEY_INFO, _EC_POINT = "129/3", "181/2"


def change(token: SoftHsmToken, how: Callable[[Any], object]) -> None:
    """Do something to the token as another application would."""
    module = pkcs11.lib(token.module_path)
    try:
        slot = module.get_token(token_label=token.label)
        with slot.open(rw=True, user_pin=token.pin) as session:
            how(session)
    finally:
        module.finalize()


def pair(session: Any, label: str, key_id: bytes, **private: Any) -> Any:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
    )
    return parameters.generate_keypair(
        label=label,
        id=key_id,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        private_template={getattr(Attribute, name): value for name, value in private.items()},
    )


def signs(uri: str, **options: Any) -> PublicKey:
    with open_signer(uri, **options) as signer:
        signer.public_key.verify(signer.sign(b"message"), b"message")
        return signer.public_key


def uri_of(token: SoftHsmToken, path: str) -> str:
    return f"pkcs11:{path}?{token.uri.partition('?')[2]}"


# -- the public key ---------------------------------------------------------------------------


def tlv(tag: int, content: bytes) -> bytes:
    return bytes((tag, len(content))) + content


def forms(point: bytes, key: PublicKey) -> dict[str, bytes]:
    hybrid = bytes((6 + (point[-1] & 1),)) + point[1:]
    compressed = bytes((2 + (point[-1] & 1),)) + point[1:33]
    return {
        "octet string": tlv(0x04, point),
        "bare": point,
        "x||y": point[1:],
        "x||y in an octet string": tlv(0x04, point[1:]),
        "bit string": tlv(0x03, b"\0" + point),
        "a bit string in an octet string": tlv(0x04, tlv(0x03, b"\0" + point)),
        "twice": tlv(0x04, tlv(0x04, point)),
        "long length": b"\x04\x81\x41" + point,
        "longer length": b"\x04\x82\x00\x41" + point,
        "compressed": tlv(0x04, compressed),
        "compressed, bare": compressed,
        "hybrid": tlv(0x04, hybrid),
        "SubjectPublicKeyInfo": key.der(),
    }


def _key_and_point() -> tuple[PublicKey, bytes]:
    key = PublicKey(ec.generate_private_key(ec.SECP256R1()).public_key())
    return key, key.der()[-65:]


def test_point_in_every_form_that_can_be_read_in_one_way() -> None:
    for _ in range(20):
        key, point = _key_and_point()
        for name, value in forms(point, key).items():
            assert read_point(value) == key, name
            assert read_point(value[:-1]) is None, name
            assert read_point(value + b"\0") is None, name


@pytest.mark.parametrize(
    "value", [b"\0", b"\x04", b"\x04\x80", b"\x04\x84\xff\xff\xff\xff", b"\x03\x00", bytes(64)]
)
def test_what_is_no_point_is_not_read(value: bytes) -> None:
    assert read_point(value) is None


def test_key_whose_point_comes_in_another_form(token: SoftHsmToken, shim: Shim) -> None:
    key = signs(token.uri)
    for name, value in forms(key.der()[-65:], key).items():
        shim.script(f"attr:{_EC_POINT}={value.hex()}")
        assert signs(token.uri, module_path=shim.path) == key, name


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_given_public_key_decides_where_the_tokens_cannot_be_read(
    token: SoftHsmToken, shim: Shim, isolation: str
) -> None:
    key = signs(token.uri)
    shim.script(f"attr:{_EC_POINT}=0441deadbeef")
    options: dict[str, Any] = {"module_path": shim.path, "isolation": isolation}
    with pytest.raises(InvalidKeyError, match="6 bytes, beginning 04 41 de ad") as raised:
        open_signer(token.uri, **options)
    assert "public_key" in raised.value.hint
    assert signs(token.uri, public_key=key.pem(), **options) == key
    other, _ = _key_and_point()
    with pytest.raises(KeyMismatchError) as mismatch:
        open_signer(token.uri, public_key=other, **options)
    assert mismatch.value.details["step"] == "signature"


def test_public_key_with_another_id_is_found_by_the_label(token: SoftHsmToken) -> None:
    def make(session: Any) -> None:
        pair(session, "no-id", b"", ID=b"\x51")
        pair(session, "other-id", b"\x61", ID=b"\x62")

    change(token, make)
    for label in ("no-id", "other-id"):
        signs(token.key_uri(label))


def test_of_public_keys_of_one_label_the_first_signature_takes_the_right_one(
    token: SoftHsmToken,
) -> None:
    def make(session: Any) -> None:
        pair(session, "twin", b"\x61", ID=b"\x71")
        pair(session, "twin", b"\x62", ID=b"\x72")

    change(token, make)
    found = {signs(uri_of(token, f"token={token.label};id={id_}")) for id_ in ("%71", "%72")}
    assert len(found) == 2


def test_public_key_info_of_the_private_key(token: SoftHsmToken, shim: Shim) -> None:
    key = signs(token.uri)
    shim.script(f"attr:{_EC_POINT}=rv:12 attr:{_PUBLIC_KEY_INFO}={key.der().hex()}")
    assert signs(token.uri, module_path=shim.path) == key
    other, _ = _key_and_point()
    shim.script(f"attr:{_EC_POINT}=rv:12 attr:{_PUBLIC_KEY_INFO}={other.der().hex()}")
    with pytest.raises(KeyMismatchError):
        open_signer(token.uri, module_path=shim.path)


# -- the private key --------------------------------------------------------------------------


def test_keys_that_cannot_sign_es256_are_no_candidates(token: SoftHsmToken) -> None:
    def make(session: Any) -> None:
        pair(session, "both", b"\xa1")
        session.generate_keypair(
            KeyType.RSA,
            2048,
            store=True,
            label="both",
            id=b"\xa1",
            capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        )
        pair(session, "both", b"\xa1", SIGN=False)

    change(token, make)
    signs(uri_of(token, f"token={token.label};object=both;id=%A1"))
    change(token, lambda session: pair(session, "both", b"\xa1"))
    with pytest.raises(AmbiguousKeyError, match=r"'both' \(id=%A1, EC\)") as raised:
        open_signer(uri_of(token, f"token={token.label};object=both;id=%A1"))
    assert "another id" in raised.value.hint


def test_list_of_keys_shows_ids_as_in_a_uri_and_types(token: SoftHsmToken) -> None:
    change(token, lambda session: pair(session, "hex", b"\x01"))
    with pytest.raises(KeyNotFoundError, match=r"'hex' \(id=%01, EC\)") as raised:
        open_signer(uri_of(token, f"token={token.label};id=01"))
    assert "id=%30%31 was asked for; write id=%01" in raised.value.hint
    signs(uri_of(token, f"token={token.label};id=%01"))


def test_key_label_that_is_not_utf8(token: SoftHsmToken, shim: Shim) -> None:
    shim.script("attr:3/3=636166e9")
    with pytest.raises(KeyNotFoundError, match=r"caf\\\\xe9"):
        open_signer(token.key_uri("none"), module_path=shim.path)


# -- the token --------------------------------------------------------------------------------


def test_slot_whose_token_is_not_initialised_is_no_candidate(
    token: SoftHsmToken, shim: Shim
) -> None:
    shim.script("slot.empty")
    signs(uri_of(token, "object=d1"), module_path=shim.path)
    with pytest.raises(KeyNotFoundError, match=r", no label \(slot \d+, not initialised\)"):
        open_signer(uri_of(token, "token=none;object=d1"), module_path=shim.path)
    # A module that never sets the flag, and a token that is named.
    shim.script("token.clear=400")
    signs(token.uri, module_path=shim.path)


@pytest.mark.parametrize(
    ("label", "written"), [(b"caf\xe9", "caf%E9"), (b"x" * 31 + b"\xc3", "x" * 31 + "%C3")]
)
@pytest.mark.parametrize("padding", [b"\0", b" "])
def test_token_label_that_is_not_utf8(
    token: SoftHsmToken, shim: Shim, label: bytes, written: str, padding: bytes
) -> None:
    shim.script(f"token.label={label.ljust(32, padding).hex()}")
    slots: list[int] = []
    change(token, lambda session: slots.append(session.token.slot.slot_id))
    uri = uri_of(token, f"token={written};slot-id={slots[0]};object=d1")
    with open_signer(uri, module_path=shim.path) as signer:
        report = signer.custody()
    facts = {fact.name: fact.value for fact in report.evidence.facts}
    str(facts["token label"]).encode()  # a document can hold it
    assert written in report.evidence.location


# -- the login --------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_token_that_calls_the_user_logged_in_and_shows_nothing(
    token: SoftHsmToken, shim: Shim, isolation: str
) -> None:
    shim.fail(Call.LOGIN, 0x100)
    with pytest.raises(LoginError, match="its sessions are not") as raised:
        open_signer(token.uri, module_path=shim.path, isolation=isolation)
    assert raised.value.details["step"] == "login"
    assert not raised.value.retryable
    assert shim.calls(Call.LOGIN) == 2  # the module was initialised anew, once
    shim.heal()
    shim.fail(Call.LOGIN, 0x100, times=1)
    signs(token.uri, module_path=shim.path, isolation=isolation)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_user_type_that_the_token_does_not_know(
    token: SoftHsmToken, shim: Shim, isolation: str
) -> None:
    with pytest.raises(LoginError, match="user type") as raised:
        open_signer(token.uri, module_path=shim.path, user_type=0x80000001, isolation=isolation)
    assert raised.value.details["pkcs11"] == "CKR_USER_TYPE_INVALID"
    signs(token.uri, module_path=shim.path, isolation=isolation)  # the PIN was not looked at


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_pin_that_worked_is_believed_against_one_refusal(
    token: SoftHsmToken, shim: Shim, isolation: str
) -> None:
    options: dict[str, Any] = {"module_path": shim.path, "isolation": isolation, "max_sessions": 1}
    with open_signer(token.uri, **options) as signer:
        for _ in range(2):  # each login that is taken allows one more doubt
            before = shim.calls(Call.LOGIN)
            shim.fail(Call.LOGIN, 0xA0, times=1)
            shim.fail(Call.SIGN, 0x30, times=1)
            signer.public_key.verify(signer.sign(b"message"), b"message")
            assert shim.calls(Call.LOGIN) == before + 2
        shim.fail(Call.LOGIN, 0xA0)
        shim.fail(Call.SIGN, 0x30, times=1)
        before = shim.calls(Call.LOGIN)
        for _ in range(3):
            with pytest.raises(LoginError):
                signer.sign(b"message")
        assert shim.calls(Call.LOGIN) == before + 2


def test_pin_that_worked_is_believed_in_the_next_process_too(
    token: SoftHsmToken, shim: Shim
) -> None:
    with open_signer(token.uri, module_path=shim.path, isolation="process") as signer:
        shim.fail(Call.SIGN, ABORT, times=1)
        shim.fail(Call.LOGIN, 0xA0, times=1)
        with pytest.raises(SignerUnavailable):
            signer.sign(b"message")
        signer.public_key.verify(signer.sign(b"message"), b"message")
        assert shim.calls(Call.LOGIN) == 3


@pytest.mark.parametrize(("flag", "sent"), [(0x10000, 1), (0x20000, 0), (0x40000, 0)])
def test_refusal_that_the_token_counts_is_final(
    token: SoftHsmToken, shim: Shim, flag: int, sent: int
) -> None:
    with open_signer(token.uri, module_path=shim.path, max_sessions=1) as signer:
        before = shim.calls(Call.LOGIN)
        shim.fail(Call.LOGIN, 0xA0)
        shim.fail(Call.SIGN, 0x30, times=1)
        shim.add_token_flags(flag)
        for _ in range(3):
            with pytest.raises(LoginError):
                signer.sign(b"message")
        assert shim.calls(Call.LOGIN) == before + sent
