# SPDX-License-Identifier: Apache-2.0
"""Environments, origins, claims: what hostile or mistyped settings must not become."""

from __future__ import annotations

import json
from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest
import urllib3.util
from hypothesis import example, given, strategies as st

from d1_signer.errors import ConfigurationError, InvalidInputError
from d1_signer.token.d1 import (
    AssertionProfile,
    Environment,
    checked_correlation_id,
    origin,
)

THALES = {
    "production": "https://api.d1.thalescloud.io/authz/v1",
    "staging": "https://api.d1-stg.thalescloud.io/authz/v1",
    "develop": "https://develop-api.d1-dev.thalescloud.io/authz/v1",
}
HOSTS = [urlsplit(url).netloc for url in THALES.values()]

pieces = st.sampled_from(
    [
        *"htps:/@?#[]\\.%;&=+- \t\n\r\0é\u2028\uff0e\uff41",
        *("https://", "http://", "HTTPS://", "//", ":443", ":0", ":80x", "user:pw@", "/authz/v1"),
        *("localhost", "127.0.0.1", "[::1]", "evil.example", *HOSTS, "xn--", "%2e", "..", "0"),
        *("::ffff:127.0.0.1", "2130706433", "127.1"),
    ]
)
hostile = st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize("name", THALES)
def test_named_environments(name: str) -> None:
    environment = Environment.of(name.upper())
    assert environment is getattr(Environment, name.upper())
    assert environment is Environment.of(environment)
    assert environment.base_url == THALES[name]
    assert environment.token_endpoint == THALES[name] + "/oauth2/token"
    assert environment.banking_url == f"https://{urlsplit(THALES[name]).netloc}/banking"
    assert environment.is_thales


@given(hostile)
@example("https://api.d1.thalescloud.io\\@evil.example")
@example("http://127.0.0.1\\@evil.example")
@example("http://127.0.0.1#@evil.example")
def test_what_is_accepted_is_what_is_connected_to(text: str) -> None:
    try:
        environment = Environment(text)
    except ConfigurationError:
        return
    # urllib3 is what the requests go through: it must see the host that was checked here.
    theirs = urllib3.util.parse_url(environment.token_endpoint)
    ours = urlsplit(environment.base_url)
    assert theirs.host is not None
    assert ours.hostname is not None
    assert theirs.host.strip("[]") == ours.hostname.strip("[]")
    assert theirs.port == ours.port
    assert theirs.auth is None
    assert theirs.query is None
    assert theirs.fragment is None
    assert theirs.scheme in {"https", "http"}
    if theirs.scheme == "http":
        host = ours.hostname
        assert host == "localhost" or ip_address(host).is_loopback
    assert text.isascii()
    assert environment.serves(environment.banking_url)
    assert environment.serves(environment.token_endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "http://127.9.9.9:8080/authz/v1",
        "http://[::1]:8080",
        "http://localhost:1",
        "http://LOCALHOST",
        "https://d1.bank.example/authz/v1",
        "https://10.0.0.1",
        "HTTPS://D1.Bank.Example",
        "https://d1_proxy.internal",
    ],
)
def test_good_urls(url: str) -> None:
    environment = Environment(url + "/")
    assert environment.base_url == url
    assert environment == Environment(url)
    assert not environment.is_thales


@pytest.mark.parametrize(
    "url",
    [
        *("", "https://", "https:///path", "//host", "host", "api.d1.thalescloud.io", "ftp://h"),
        *("http://api.d1.thalescloud.io", "http://10.0.0.1", "http://0.0.0.0", "http://128.0.0.1"),
        *("http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://127.1"),
        *(
            "http://2130706433",
            "http://0x7f000001",
            "http://[::]",
            "http://[::2]",
            "http://[fe80::1]",
        ),
        *("https://user@host", "https://user:pw@host", "https://:pw@host", "https://@host"),
        *("https://host?a=b", "https://host#a", "https://host?", "https://host#", "https://h/a?b"),
        *(
            "https://host:0",
            "https://host:65536",
            "https://host:x",
            "https://host:-1",
            "https://a:1:2",
        ),
        *("https://ho st", "https://host\n", "https://host\t/", " https://host", "https://host\0"),
        *(
            "https://h\u00f6st",
            "https://host\u3002example",
            "https://a%2eb",
            "https://[::1",
            "https://::1",
        ),
        *(
            "https://[v1.a]",
            "https://[127.0.0.1]",
            "https://a\\b",
            "https://a,b",
            "https://[fe80::1%25e]",
        ),
        *("javascript:alert(1)", "https:host", "https:/host", "productions", "prod", "none"),
    ],
)
def test_bad_urls(url: str) -> None:
    for make in (Environment, Environment.of):
        with pytest.raises(ConfigurationError) as caught:
            make(url)
        assert "pw" not in str(caught.value)


@pytest.mark.parametrize("value", [None, b"https://host", 7, ["https://host"], object(), True])
def test_what_is_no_text_is_refused(value: object) -> None:
    for make in (Environment, Environment.of):
        with pytest.raises(ConfigurationError):
            make(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", HOSTS)
def test_thales_is_known_by_its_host_however_it_is_written(host: str) -> None:
    for form in (host, host.upper(), host + ".", host + ":8443", host.title() + ".:443"):
        assert Environment(f"https://{form}").is_thales
        assert Environment(f"https://{form}/another/path").is_thales
    for form in (
        "x" + host,
        host + ".evil.example",
        "x." + host,
        host[:-1],
        f"evil.example/{host}",
    ):
        assert not Environment(f"https://{form}").is_thales


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://api.d1.thalescloud.io/banking/x?y=z", True),
        ("https://api.d1.thalescloud.io", True),
        ("https://API.D1.thalescloud.io:443/banking", True),
        ("https://api.d1.thalescloud.io./banking", True),
        ("HTTPS://api.d1.thalescloud.io/banking", True),
        ("https://api.d1.thalescloud.io/käse", True),
        ("https://api.d1.thalescloud.io:8443/banking", False),
        ("https://api.d1.thalescloud.io:0/banking", False),
        ("http://api.d1.thalescloud.io/banking", False),
        ("http://api.d1.thalescloud.io:443/banking", False),
        ("https://api.d1-stg.thalescloud.io/banking", False),
        ("https://evil.example/api.d1.thalescloud.io", False),
        ("https://api.d1.thalescloud.io@evil.example/", False),
        ("https://evil.example\\@api.d1.thalescloud.io/", False),
        ("https://evil.example#@api.d1.thalescloud.io/", False),
        ("https://evil.example?@api.d1.thalescloud.io/", False),
        ("https://api.d1.thalescloud.io.evil.example", False),
        ("https://ａpi.d1.thalescloud.io", False),  # noqa: RUF001
        ("https://api.d1.thalescloud.io\t.evil.example", False),
        ("https:///banking", False),
        ("https://[::1", False),
        ("https://api.d1.thalescloud.io:x/", False),
        ("", False),
    ],
)
def test_origin_decides_who_gets_the_token(url: str, same: bool) -> None:
    assert Environment.PRODUCTION.serves(url) is same


@pytest.mark.parametrize("url", [None, b"https://api.d1.thalescloud.io", 7])
def test_what_is_no_url_is_served_by_nobody(url: str) -> None:
    assert not Environment.PRODUCTION.serves(url)


@given(st.tuples(st.sampled_from(["https://", "HTTPS://"]), hostile, hostile))
@example(("https://", "evil.example\\@", ""))
def test_served_urls_lead_to_the_environment_for_urllib3_too(around: tuple[str, str, str]) -> None:
    scheme, before, after = around
    text = scheme + before + HOSTS[0] + after
    if not Environment.PRODUCTION.serves(text):
        return
    theirs = urllib3.util.parse_url(text)
    assert (theirs.host or "").rstrip(".") == HOSTS[0]
    assert theirs.port in {None, 443}
    assert theirs.scheme == "https"


def test_origin_fills_in_defaults() -> None:
    assert origin("https://a") == ("https", "a", 443)
    assert origin("http://a") == ("http", "a", 80)
    assert origin("https://a:0") == ("https", "a", 0)
    with pytest.raises(ValueError, match="host"):
        origin("https://")


# -- claims -----------------------------------------------------------------------------------


@given(st.floats(0, 2**40), st.integers(1, 900))
def test_exp_is_an_integer_at_most_15_minutes_ahead(now: float, lifetime: int) -> None:
    profile = AssertionProfile(issuer_id="i", audience="a", lifetime=lifetime)
    claims = profile.claims(now=now, jti="j")
    assert list(claims) == ["iss", "sub", "aud", "iat", "exp", "jti"]
    exp, iat = claims["exp"], claims["iat"]
    assert type(exp) is int
    assert type(iat) is int
    assert now - 1 < exp <= now + 900
    assert iat <= now < exp + 1
    assert json.loads(json.dumps(claims)) == claims


def test_optional_claims_can_be_left_out() -> None:
    profile = AssertionProfile(issuer_id="i", audience=None, issued_at=False, jwt_id=False)
    assert profile.claims(now=10.9, jti="j") == {"iss": "i", "sub": "i", "exp": 310}


@pytest.mark.parametrize("lifetime", [0, -1, 901, 10**9, 300.0, "300", None, True])
def test_lifetime_is_1_to_900(lifetime: int) -> None:
    with pytest.raises(InvalidInputError, match="lifetime"):
        AssertionProfile(issuer_id="i", audience=None, lifetime=lifetime)


@pytest.mark.parametrize("text", ["", "a\nb", "a\0", "\ud800", "\u2028", 7, b"i", ["i"]])
def test_issuer_and_audience_are_printable(text: str) -> None:
    with pytest.raises(InvalidInputError, match="issuer"):
        AssertionProfile(issuer_id=text, audience=None)
    with pytest.raises(InvalidInputError, match="audience"):
        AssertionProfile(issuer_id="i", audience=text)
    with pytest.raises(InvalidInputError, match="issuer"):
        AssertionProfile(issuer_id=None, audience=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a", "A-z_09", "x" * 64])
def test_correlation_id(value: str) -> None:
    assert checked_correlation_id(value) == value


@pytest.mark.parametrize("value", ["", "x" * 65, "a b", "a\n", "é", "a.b", "\u0661", None, b"a", 7])
def test_other_correlation_ids_are_refused(value: str) -> None:
    with pytest.raises(InvalidInputError):
        checked_correlation_id(value)


@pytest.mark.parametrize("text", [" i", "i ", "\ti", "i\n", "i\u00a0", "\u3000i", " "])
def test_blanks_at_an_end_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"issuer id.+blanks"):
        AssertionProfile(issuer_id=text, audience=None)
    with pytest.raises(InvalidInputError, match=r"audience.+blanks"):
        AssertionProfile(issuer_id="i", audience=text)
    assert AssertionProfile(issuer_id="a bank", audience=None).issuer_id == "a bank"


@pytest.mark.parametrize(
    "end", ["/oauth2/token", "/oauth2/token/", "/OAuth2/Token", "//oauth2/token//"]
)
def test_an_environment_that_is_the_endpoint_itself_is_refused(end: str) -> None:
    with pytest.raises(ConfigurationError, match="ends in /oauth2/token") as caught:
        Environment.of(f"https://api.d1.thalescloud.io/authz/v1{end}")
    assert "before /oauth2/token" in caught.value.hint
    assert Environment("https://d1.example/oauth2/tokens").token_endpoint


def test_the_longest_lifetime_leaves_room_for_d1s_clock() -> None:
    for lifetime, least in ((894, 894), (895, 895), (896, 895), (900, 895)):
        profile = AssertionProfile(issuer_id="i", audience=None, lifetime=lifetime)
        assert profile.claims(now=1000.5, jti="j")["exp"] == 1000 + least
