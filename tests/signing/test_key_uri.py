# SPDX-License-Identifier: Apache-2.0
"""Key URIs, against urllib's own reading where the two must agree."""

from __future__ import annotations

import contextlib
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
from hypothesis import given, strategies as st

from d1_signer.errors import D1SignerError, KeyUriError
from d1_signer.secret import read_secret
from d1_signer.signing.key_uri import (
    KeyUri,
    percent_decode,
    scheme_of,
    split_fragment,
    without_secrets,
)
from d1_signer.signing.opening import open_signer

NAMES = frozenset({"region", "endpoint", "passphrase-source"})
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(words, words, st.dictionaries(st.sampled_from(sorted(NAMES)), words))
def test_what_is_encoded_is_read_back(authority: str, path: str, query: dict[str, str]) -> None:
    uri = f"Unit+1.x:// {quote(authority, safe='')}/{quote(path)}".replace(" ", "")
    uri += "?" + urlencode(query, quote_via=quote) if query else ""
    read = KeyUri.parse(uri, query_names=NAMES)
    assert read == KeyUri(scheme="unit+1.x", authority=authority, path="/" + path, query=query)
    split = urlsplit(uri)
    assert split.scheme == read.scheme
    assert dict(parse_qsl(split.query, keep_blank_values=True)) == query


@pytest.mark.parametrize(
    ("uri", "authority", "path"),
    [
        ("awskms:///alias/d1", "", "/alias/d1"),
        ("awskms:alias/d1", "", "alias/d1"),
        ("gcpkms://projects/p", "projects", "/p"),
        ("hashivault://key", "key", ""),
        ("file:///a%20b", "", "/a b"),
        ("file:/a", "", "/a"),
        ("FILE:///A", "", "/A"),
        ("x:", "", ""),
        ("x:////a", "", "//a"),
        ("x:a+b", "", "a+b"),
    ],
)
def test_parts(uri: str, authority: str, path: str) -> None:
    read = KeyUri.parse(uri)
    assert (read.authority, read.path, read.query) == (authority, path, {})


@pytest.mark.parametrize(
    "uri",
    [
        *("", "noscheme", "/path", ":x", "1x:y", "é:x", " x:y", "x y:z", "-:a"),
        *("x:%", "x:%4", "x:%zz", "x:%ff", "x://%80/a", "x:?region=%", "x:?region=%ff"),
        *("x:?unknown=1", "x:?=1", "x:?1", "x:?Region=1", "x:?region=1&region=2", "x:a\ud800"),
        "x:?region=1&%72egion=",
    ],
)
def test_broken_uri_is_refused(uri: str) -> None:
    with pytest.raises(KeyUriError):
        KeyUri.parse(uri, query_names=NAMES)


@given(st.text())
def test_any_text_is_read_or_one_error(text: str) -> None:
    for uri in (text, "x:" + text):
        with contextlib.suppress(KeyUriError):
            KeyUri.parse(split_fragment(uri)[0], query_names=NAMES)


@pytest.mark.parametrize("value", [None, b"x:y", 7, ["x:y"]])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(KeyUriError):
        split_fragment(value)  # type: ignore[arg-type]


def test_fragment_is_the_kid() -> None:
    assert split_fragment("x:y#bank-2026") == ("x:y", "bank-2026")
    assert split_fragment("x:y#a%23b%20%C3%A9") == ("x:y", "a#b é")
    assert split_fragment("x:y#a#b?c") == ("x:y", "a#b?c")
    assert split_fragment("x:y#") == ("x:y", "")
    assert split_fragment("x:y") == ("x:y", None)
    with pytest.raises(KeyUriError):
        split_fragment("x:y#%ff")


def test_scheme() -> None:
    assert scheme_of("PKCS11:token=x") == "pkcs11"
    assert scheme_of("a+b-c.1:") == "a+b-c.1"
    for uri in ("", "x", "1a:b", "/a:b", "a/b:c"):
        assert scheme_of(uri) == ""


def test_percent_decoding_is_strict() -> None:
    assert percent_decode("a%2Fb+c%c3%a9é") == "a/b+céé"
    for text in ("%", "a%2", "%GG", "%ff", "%c3", "%\u0661\u0661", "\ud800"):
        with pytest.raises(KeyUriError):
            percent_decode(text)


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=a?pin-value=hunter2",
        "pkcs11:token=a;pin-value=hunter2",
        "pkcs11:token=a;PIN-VALUE=hunter2;id=1",
        "x:?y=hunter2",
        "x:y#hunter2",
        "pin-value=hunter2",
        "pkcs11:pin-value=a&pin-value=hunter2",
    ],
)
def test_secrets_do_not_show(uri: str) -> None:
    assert "hunter2" not in without_secrets(uri)
    try:
        KeyUri.parse(uri, query_names=NAMES)
    except KeyUriError as error:
        shown = str(error)
    else:
        shown = ""
    assert "hunter2" not in shown


PEM = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49\n-----END-----\n"


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        (PEM, "MIGHAgEAMBM"),
        ("file://" + PEM, "MIGHAgEAMBM"),
        ("hunter2", "hunter2"),
        ("pkcs11:token=x;pin-value=hunter2", "hunter2"),
        ("pkcs11:token=x;pin%2Dvalue=hunter2", "hunter2"),
        ("pkcs11:token=x?pin-value=hunter2", "hunter2"),
        ("hashivault://user:hunter2@host/key", "hunter2"),
        ("file:///" + "k" * 600, "k" * 600),
        ("file:///" + "MIGHAgEAMBMGByqGSM49" * 4, "MIGHAgEAMBM"),
    ],
)
def test_a_secret_put_where_a_uri_belongs_is_not_shown(uri: str, secret: str) -> None:
    assert secret not in without_secrets(uri)
    with pytest.raises(D1SignerError) as failure:
        open_signer(uri)
    assert secret not in str(failure.value)


STRANGE = [
    *("x:y z", "x: y", "x:y ", "x:y\n", "\nx:y", "x:\0y", "x:y\x1b[31m", "x:y\x7f", "x:y\u200b"),
    *("x:y\u2028z", "x:y\xa0z", "x:\ud800", "x:" + "y" * 511, "", "y", "/y", ":y", "1x:y"),
]


@pytest.mark.parametrize("uri", STRANGE, ids=ascii)
def test_of_a_strange_text_nothing_is_shown(uri: str) -> None:
    assert without_secrets(uri) == "(not a key URI)"


@pytest.mark.parametrize("uri", ["x:y", "x://a/%20?", "x:é", "file:///k.pem", "x:" + "y" * 510])
def test_a_uri_as_it_should_be_is_shown(uri: str) -> None:
    assert without_secrets(f"{uri}") == uri.removesuffix("?")


def test_a_user_in_a_uri_is_masked() -> None:
    assert without_secrets("x://user:hunter2@host/key") == "x://****@host/key"
    assert without_secrets("x:token=a;pin-value=b;id=c") == "x:token=a;pin-value=****;id=c"


@pytest.mark.parametrize(
    "path", [PEM, "hunter2", "/" + "MIGHAgEAMBMGByqGSM49" * 4, "/" + "x" * 300, "a/b\nc"]
)
def test_what_is_no_path_is_not_shown_as_one(path: str) -> None:
    with pytest.raises(D1SignerError) as failure:
        read_secret(f"file:{path}", what="PIN")
    assert path not in str(failure.value)
    assert "MIGHAgEAMBM" not in str(failure.value)
