# SPDX-License-Identifier: Apache-2.0
"""PKCS#11 URIs by RFC 7512, strictly."""

from __future__ import annotations

import pytest

from d1_signer.backends.pkcs11.uri import PinInUriWarning, Pkcs11Uri
from d1_signer.errors import KeyUriError


def test_example_of_the_rfc_is_read() -> None:
    # RFC 7512 section 3, joined from its examples.
    uri = Pkcs11Uri.parse(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
        "model=1.0;serial=4a6b;object=my-certificate;type=private;id=%69%95%3E%5C%F4%BD%EC%91;"
        "slot-id=327;slot-description=Sun%20Metaslot;library-version=3.1;x-vend=anything"
        "?pin-source=file:/etc/token_pin&module-path=/usr/lib/libp11.so&x-q=1"
    )
    assert uri.texts == {
        "token": "The Software PKCS#11 Softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "model": "1.0",
        "serial": "4a6b",
        "object": "my-certificate",
        "slot-description": "Sun Metaslot",
    }
    assert uri.id == bytes.fromhex("69953e5cf4bdec91")
    assert (uri.slot_id, uri.library_version) == (327, (3, 1))
    assert (uri.pin_source, uri.module_path) == ("file:/etc/token_pin", "/usr/lib/libp11.so")


def test_id_is_bytes() -> None:
    uri = Pkcs11Uri.parse("pkcs11:id=%FF%01a%00")
    assert uri.id == b"\xff\x01a\x00"
    assert uri.location() == "pkcs11:id=%FF%01%61%00"
    assert Pkcs11Uri.parse(uri.location()).id == uri.id


def test_location_is_read_back() -> None:
    uri = Pkcs11Uri.parse("pkcs11:token=a%3Bb%2Fc%25;object=%C3%BC%20x?pin-source=env:PIN")
    again = Pkcs11Uri.parse(uri.location())
    assert again.texts == uri.texts == {"token": "a;b/c%", "object": "ü x"}
    assert again.pin_source is None


def test_empty_uri_matches_everything() -> None:
    assert Pkcs11Uri.parse("pkcs11:") == Pkcs11Uri()


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs12:token=a",
        "pkcs11:tokn=a",  # misspelt: would select by nothing
        "pkcs11:token",
        "pkcs11:token=a;",
        "pkcs11:;token=a",
        "pkcs11:token=a;;object=b",
        "pkcs11:token=a;token=b",
        "pkcs11:token=a b",
        "pkcs11:token=a/b",
        "pkcs11:token=a%2",
        "pkcs11:token=a%GG",
        "pkcs11:object=a?module-path=%FF",
        "pkcs11:object=a?module-path=/x;pin-source=env:P",
        "pkcs11:object=a?module-path=/x&module-path=/y",
        "pkcs11:object=a?modul-path=/x",
        "pkcs11:object=a?pin-source=env:P&pin-value=secret-pin",
        "pkcs11:type=public",
        "pkcs11:type=cert",
        "pkcs11:slot-id=0x1",
        "pkcs11:slot-id=-1",
        "pkcs11:slot-id=",
        "pkcs11:library-version=a",
        "pkcs11:token=\u00fc",
    ],
)
def test_malformed_is_refused(uri: str) -> None:
    with pytest.raises(KeyUriError) as raised:
        Pkcs11Uri.parse(uri)
    assert "secret-pin" not in str(raised.value)


def test_pin_value_warns_and_is_masked() -> None:
    with pytest.warns(PinInUriWarning) as warned:
        uri = Pkcs11Uri.parse("pkcs11:object=a?pin-value=98765432%21")
    assert uri.pin_value is not None
    assert uri.pin_value.reveal() == "98765432!"
    assert "98765432" not in repr(uri) + str(warned[0].message) + uri.generated(b"1")
