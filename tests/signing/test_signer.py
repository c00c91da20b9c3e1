# SPDX-License-Identifier: Apache-2.0
"""`Signer` and `open_signer` over backends that behave and backends that do not."""

from __future__ import annotations

import array
import copy
import hashlib
import importlib.util
import math
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.custody.evidence import Evidence
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import (
    ConfigurationError,
    CustodyError,
    D1SignerError,
    InvalidInputError,
    InvalidSignatureError,
    KeyMismatchError,
    KeyNotFoundError,
    KeyUriError,
    MissingExtraError,
    SignerClosedError,
    SignerError,
    SignerTimeout,
)
from d1_signer.es256 import PublicKey
from d1_signer.events import Event, SignEvent, Use
from d1_signer.signing import registry
from d1_signer.signing.backend import SignatureEncoding
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from tests.facts.secrecy import assert_hidden

from .backends import AnsweringBackend, KeyBackend

SECRET = "hunter2-" + "correct-horse"
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
DIGEST = hashlib.sha256(b"m").digest()
KEY = ec.derive_private_key(11, ec.SECP256R1())
OTHER = ec.derive_private_key(12, ec.SECP256R1())
Encodings = pytest.mark.parametrize("encoding", list(SignatureEncoding))


def raw(r: int, s: int) -> bytes:
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def der_by(key: ec.EllipticCurvePrivateKey, digest: bytes) -> bytes:
    return key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256())))


def verified(signature: bytes, digest: bytes = DIGEST) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    der = utils.encode_dss_signature(r, s)
    KEY.public_key().verify(der, digest, ec.ECDSA(utils.Prehashed(SHA256())))


# -- what goes in, what comes out -------------------------------------------------------------


@Encodings
@pytest.mark.parametrize("verify", [True, False])
def test_both_encodings_give_raw(encoding: SignatureEncoding, verify: bool) -> None:
    backend = KeyBackend(KEY, encoding)
    with Signer(backend, verify=verify) as signer:
        for _ in range(40):
            signature = signer.sign(b"m")
            assert len(signature) == 64
            verified(signature)
        verified(signer.sign_digest(DIGEST))
    assert {digest for digest, _ in backend.asked} == {DIGEST}


def test_encoding_declared_as_plain_text_counts() -> None:
    # A plug-in without our enumeration at hand writes the text.
    backend = AnsweringBackend(KEY, lambda digest: der_by(KEY, digest))
    backend.encoding = "der"  # type: ignore[assignment]
    verified(Signer(backend).sign(b"m"))


@pytest.mark.parametrize("encoding", ["p1363", "", None, 7, "DER"])
def test_unknown_encoding_is_refused(encoding: object) -> None:
    backend = KeyBackend(KEY)
    backend.encoding = encoding  # type: ignore[assignment]
    with pytest.raises(SignerError, match="ValueError"):
        Signer(backend)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        *(b"", bytes(63), bytes(64), bytes(65), raw(0, 1), raw(1, 0), raw(N, 1), raw(1, N)),
        *(der_by(KEY, DIGEST), None, "text", bytearray(raw(1, 1)), memoryview(raw(1, 1)), 7),
    ],
    ids=lambda answer: type(answer).__name__,  # fresh signatures would make new names each time
)
def test_raw_answer_of_wrong_form_is_refused(answer: bytes, verify: bool) -> None:
    signer = Signer(AnsweringBackend(KEY, lambda _: answer), verify=verify)
    with pytest.raises(InvalidSignatureError):
        signer.sign(b"m")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        *(b"", raw(5, 5), der_by(KEY, DIGEST) + b"\0", utils.encode_dss_signature(N, 1)),
        *(utils.encode_dss_signature(0, 1), None, "text", bytearray(der_by(KEY, DIGEST))),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_der_answer_of_wrong_form_is_refused(answer: bytes, verify: bool) -> None:
    backend = AnsweringBackend(KEY, lambda _: answer, SignatureEncoding.DER)
    with pytest.raises(InvalidSignatureError):
        Signer(backend, verify=verify).sign(b"m")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda digest: der_by(OTHER, digest),
        lambda digest: der_by(KEY, digest[::-1]),
        lambda digest: der_by(KEY, hashlib.sha256(digest).digest()),
        lambda _: der_by(KEY, bytes(32)),
    ],
)
def test_wrong_key_or_digest_is_caught(wrong: Callable[[bytes], bytes]) -> None:
    backend = AnsweringBackend(KEY, wrong, SignatureEncoding.DER)
    with pytest.raises(InvalidSignatureError, match="did not make") as caught:
        Signer(backend).sign(b"m")
    assert not caught.value.retryable
    assert Signer(backend, verify=False).sign(b"m")  # switched off, it is the caller's own risk


def test_public_key_is_pinned_at_opening() -> None:
    backend = KeyBackend(KEY)
    signer = Signer(backend)
    backend.key = OTHER
    with pytest.raises(InvalidSignatureError):
        signer.sign(b"m")
    assert signer.public_key == PublicKey(KEY.public_key())


@pytest.mark.parametrize(
    "message", [b"m", bytearray(b"m"), memoryview(b"m"), array.array("B", b"m")]
)
def test_message_is_any_buffer(message: bytes) -> None:
    verified(Signer(KeyBackend(KEY)).sign(message))


@pytest.mark.parametrize("message", ["m", None, 1, [b"m"], object(), memoryview(b"mmmm")[::2]])
def test_message_of_another_type_is_refused(message: object) -> None:
    with pytest.raises(InvalidInputError):
        Signer(KeyBackend(KEY)).sign(message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "digest", [b"", bytes(20), bytes(31), bytes(33), bytes(48), bytes(64), bytearray(32), "0" * 32]
)
def test_digest_is_32_bytes(digest: bytes) -> None:
    backend = KeyBackend(KEY)
    with pytest.raises(InvalidInputError):
        Signer(backend).sign_digest(digest)
    assert not backend.asked


# -- time -------------------------------------------------------------------------------------


def test_timeout_becomes_a_deadline() -> None:
    backend = KeyBackend(KEY)
    signer = Signer(backend)
    before = time.monotonic()
    for call in (signer.sign, signer.sign_digest):
        call(DIGEST, timeout=7)
    after = time.monotonic()
    for _, deadline in backend.asked:
        assert deadline is not None
        assert before + 7 <= deadline <= after + 7
    signer.sign(b"m")
    assert backend.asked[-1][1] is None


@pytest.mark.parametrize("timeout", ["7", math.nan, math.inf, b"7", [7], 1j])
def test_timeout_is_a_number(timeout: float) -> None:
    backend = KeyBackend(KEY)
    with pytest.raises(InvalidInputError, match="timeout"):
        Signer(backend).sign(b"m", timeout=timeout)
    assert not backend.asked


def test_our_errors_pass_through_unchanged() -> None:
    error = SignerTimeout("too late", hint="wait")

    def answer(_: bytes) -> bytes:
        raise error

    with pytest.raises(SignerTimeout) as caught:
        Signer(AnsweringBackend(KEY, answer)).sign(b"m")
    assert caught.value is error


# -- a plug-in that fails ---------------------------------------------------------------------


class Odd(Exception):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.pin = SECRET

    def __str__(self) -> str:
        raise RuntimeError(SECRET)


def fail(kind: type[BaseException]) -> Callable[..., bytes]:
    def raises(*_: object, **__: object) -> bytes:
        raise kind(SECRET) from ValueError(SECRET)

    return raises


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, TypeError, StopIteration, Odd])
@pytest.mark.parametrize("step", ["sign_digest", "custody", "close", "public_key", "policy"])
def test_foreign_errors_are_ours_and_show_nothing(kind: type[Exception], step: str) -> None:
    backend = KeyBackend(KEY)
    setattr(backend, "custody" if step == "policy" else step, fail(kind))
    with pytest.raises(SignerError, match=kind.__name__) as caught:  # noqa: PT012
        if step == "policy":
            Signer(backend, custody_policy=CustodyPolicy(hardware=True))
        signer = Signer(backend)
        calls = {"sign_digest": signer.sign, "custody": lambda _: signer.custody()}
        calls.get(step, lambda _: signer.close())(b"m")  # type: ignore[operator]
    error = caught.value
    assert type(error) is SignerError
    assert not error.retryable
    assert error.__cause__ is None
    assert error.__context__ is None
    assert_hidden(SECRET, error)


@pytest.mark.parametrize("kind", [ValueError, KeyError, Odd])
@pytest.mark.parametrize("step", ["name", "encoding", "openings"])
def test_a_property_that_raises_is_told_with_whose_it_is(kind: type[Exception], step: str) -> None:
    own = {step: property(fail(kind)), "custody_within": fail(ValueError)}
    backend = AnsweringBackend(KEY, bytes)
    backend.__class__ = type("Own", (AnsweringBackend,), own)
    with pytest.raises(SignerError, match=kind.__name__) as caught:
        Signer(backend, custody_policy=CustodyPolicy(hardware=True))
    assert type(caught.value) is SignerError
    assert "maintainers" in str(caught.value.hint)
    assert ("unit" if step == "openings" else f"{__name__}.Own") in str(caught.value)
    assert caught.value.__context__ is None
    assert_hidden(SECRET, caught.value)


@pytest.mark.parametrize("name", [None, 7, b"unit"])
def test_a_name_is_a_text(name: object) -> None:
    backend = KeyBackend(KEY)
    backend.name = name  # type: ignore[assignment]
    with pytest.raises(SignerError, match="KeyBackend backend failed with TypeError"):
        Signer(backend)


def test_name_and_encoding_are_asked_once() -> None:
    asked: list[str] = []

    class Own(KeyBackend):
        @property
        def name(self) -> str:  # type: ignore[override]
            asked.append("name")
            if len(asked) > 2:
                raise ValueError(SECRET)
            return "own"

    signer = Signer(Own(KEY), observers=[lambda _: None])
    verified(signer.sign(b"m"))
    assert signer.custody().backend == "own"
    assert repr(signer).startswith("<Signer own ")
    signer.close()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interruption_passes_through(kind: type[BaseException]) -> None:
    events: list[Event] = []
    signer = Signer(AnsweringBackend(KEY, fail(kind)), observers=[events.append])
    with pytest.raises(kind):
        signer.sign(b"m")
    (event,) = events
    assert isinstance(event, SignEvent)
    assert event.error == "interrupted"


# -- observers --------------------------------------------------------------------------------


def test_observers_are_told_of_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []

    def broken(_: Event) -> None:
        raise RuntimeError(SECRET)

    backend = KeyBackend(KEY)
    signer = Signer(backend, kid="k", observers=[broken, events.append])
    use = Use(purpose="unit", references=(("jti", "1"),))
    started = time.perf_counter()
    verified(signer.sign(b"m", use=use))
    elapsed = time.perf_counter() - started
    backend.key = OTHER
    with pytest.raises(InvalidSignatureError):
        signer.sign(b"m")
    good, bad = events
    assert isinstance(good, SignEvent)
    assert (good.backend, good.kid, good.error, good.use) == ("unit", "k", None, use)
    assert 0 < good.duration <= elapsed
    assert isinstance(bad, SignEvent)
    assert (bad.error, bad.use) == ("invalid_signature", None)
    assert "observer.failed RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_interrupting_observer_is_not_swallowed() -> None:
    def stop(_: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Signer(KeyBackend(KEY), observers=[stop]).sign(b"m")


# -- the end ----------------------------------------------------------------------------------


def test_closed_signer_asks_nobody() -> None:
    backend = KeyBackend(KEY)
    with Signer(backend) as signer:
        pass
    signer.close()
    for call in (signer.sign, signer.sign_digest):
        with pytest.raises(SignerClosedError):
            call(DIGEST)
    assert not backend.asked
    assert backend.closed == 2  # twice is allowed, and the backend's own matter


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_signer_cannot_be_pickled(leave: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="pickled"):
        leave(Signer(KeyBackend(KEY)))


# -- kid, thumbprint, policy ------------------------------------------------------------------


@pytest.mark.parametrize("kid", ["k", "bank 2026", "schlüssel", "k" * 256, "🔑"])
def test_kid_is_printable_text(kid: str) -> None:
    signer = Signer(KeyBackend(KEY), kid=kid)
    assert signer.kid == kid
    assert repr(kid) in repr(signer)


@pytest.mark.parametrize("kid", ["", "k" * 257, "a\nb", "a\0", "\x7f", "\ud800", "\u200b", 7, b"k"])
def test_other_kids_are_refused(kid: str) -> None:
    with pytest.raises(InvalidInputError, match="kid"):
        Signer(KeyBackend(KEY), kid=kid)


def test_expected_thumbprint() -> None:
    right = PublicKey(KEY.public_key()).thumbprint()
    assert Signer(KeyBackend(KEY), expected_thumbprint=right).kid == right
    for wrong in (PublicKey(OTHER.public_key()).thumbprint(), "", right.lower()):
        with pytest.raises(KeyMismatchError, match=right):
            Signer(KeyBackend(KEY), expected_thumbprint=wrong)


def test_custody_policy_is_held_against_the_evidence() -> None:
    evidence = Evidence(
        location="unit:key", exportable=False, generated_in_place=True, hardware=None, facts=()
    )
    backend = KeyBackend(KEY, evidence=evidence)
    met = CustodyPolicy(non_exportable=True, generated_in_place=True)
    report = Signer(backend, custody_policy=met, kid="k").custody()
    assert (report.kid, report.backend, report.evidence) == ("k", "unit", evidence)
    assert report.thumbprint == PublicKey(KEY.public_key()).thumbprint()
    assert abs(report.collected_at - time.time()) < 60
    with pytest.raises(CustodyError, match="hardware"):
        Signer(backend, custody_policy=CustodyPolicy(hardware=True))


# -- open_signer ------------------------------------------------------------------------------

PLUG_IN = """
from tests.signing.backends import KeyBackend
from tests.signing import test_signer as unit

opened = []

def open_backend(uri, *, colour=None, **_more):
    backend = KeyBackend(unit.KEY)
    backend.uri, backend.colour = uri, colour
    opened.append(backend)
    return backend
"""


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: dict[str, str], code: str
) -> str:
    """Put a distribution with entry points on the path, as pip would; returns its module's name."""
    name = f"unit_plug_in_{folder.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{scheme} = {value.format(name=name)}" for scheme, value in points.items()]
    text = "\n".join(["[d1_signer.backends]", *lines])
    (metadata / "entry_points.txt").write_text(text + "\n")
    monkeypatch.syspath_prepend(folder)
    return name


def module(name: str) -> ModuleType:
    return sys.modules[name]


def test_plug_in_is_opened_by_its_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = install(tmp_path, monkeypatch, {"unit": "{name}"}, PLUG_IN)
    with open_signer("UNIT:a?b=c#from-uri", colour="red") as signer:
        assert signer.kid == "from-uri"
        verified(signer.sign(b"m"))
        # The class is the tests' own here; a plug-in's is found by its package.
        assert signer.custody().plug_in == "tests.signing.backends.KeyBackend"
    (backend,) = module(name).opened
    assert (backend.uri, backend.colour, backend.closed) == ("UNIT:a?b=c", "red", 1)
    assert open_signer("unit:a#from-uri", kid="argument").kid == "argument"
    assert open_signer("unit:a#b%20c").kid == "b c"
    assert open_signer("unit:a").kid == PublicKey(KEY.public_key()).thumbprint()


def test_which_distribution_serves_a_scheme_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        PLUG_IN.replace("backend = KeyBackend", "backend = Own")
        + """
class Own(KeyBackend):
    pass
"""
    )
    name = install(tmp_path, monkeypatch, {"unit": "{name}"}, code)
    with caplog.at_level("INFO"), open_signer("unit:a") as signer:
        plug_in = signer.custody().to_dict()["plug_in"]
    assert plug_in == f"{name} 1.0 ({name}.Own)"
    assert f"backend.plug_in scheme=unit {name} 1.0 ({name})" in caplog.messages


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"expected_thumbprint": "x"}, KeyMismatchError),
        ({"custody_policy": CustodyPolicy(hardware=True)}, CustodyError),
    ],
)
def test_refused_backend_is_closed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[D1SignerError],
) -> None:
    name = install(tmp_path, monkeypatch, {"unit": "{name}"}, PLUG_IN)
    with pytest.raises(error):
        open_signer("unit:a", **options)  # type: ignore[arg-type]
    assert [backend.closed for backend in module(name).opened] == [1]


@pytest.mark.parametrize(("uri", "kid"), [("unit:a", ""), ("unit:a#", None), ("unit:a#k", "\n")])
def test_what_is_no_kid_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, kid: str | None
) -> None:
    name = install(tmp_path, monkeypatch, {"unit": "{name}"}, PLUG_IN)
    with pytest.raises(InvalidInputError, match="The kid is empty"):
        open_signer(uri, kid=kid)
    assert module(name).opened == []


def test_error_of_close_does_not_hide_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = PLUG_IN + "\nKeyBackend = type('Bad', (KeyBackend,), {'close': unit.fail(OSError)})\n"
    install(tmp_path, monkeypatch, {"unit": "{name}"}, code)
    with pytest.raises(KeyMismatchError):
        open_signer("unit:a", expected_thumbprint="x")


FAILING = f"""
def open_backend(uri):
    raise RuntimeError("{SECRET}") from ValueError("{SECRET}")
"""
OURS = """
from d1_signer.errors import MissingExtraError
raise MissingExtraError.of("sdk", "unit")
"""


IMPORTS_FAIL = {
    "raises": f"raise RuntimeError('{SECRET}') from ValueError('{SECRET}')",
    "exits its import": f"import os\nos.environ['{SECRET}']",
    "is no Python": f"def '{SECRET}'",
    "has an error of its own": f"""
class Odd(Exception):
    pin = "{SECRET}"
    def __str__(self):
        raise RuntimeError("{SECRET}")
raise Odd("{SECRET}")
""",
}


@pytest.mark.parametrize("code", IMPORTS_FAIL.values(), ids=IMPORTS_FAIL)
@pytest.mark.parametrize("call", [open_signer, generate_key])
def test_what_an_import_that_fails_says_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, call: Callable[[str], object]
) -> None:
    name = install(tmp_path, monkeypatch, {"unit": "{name}"}, code)
    with pytest.raises(ConfigurationError) as caught:
        call("unit:a")
    error = caught.value
    assert f"The plug-in {name} for unit: cannot be loaded (" in str(error)
    assert "importing" in str(error.hint)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert_hidden(SECRET, error)


@pytest.mark.parametrize(
    ("points", "code", "error", "text"),
    [
        ({"unit": "{name}"}, FAILING, SignerError, "RuntimeError"),
        ({"unit": "{name}"}, "import missing_sdk", ConfigurationError, "ModuleNotFoundError"),
        ({"unit": "{name}:nothing"}, "", ConfigurationError, "cannot be loaded"),
        ({"unit": "{name}"}, "", ConfigurationError, "open_backend"),
        ({"unit": "{name}"}, "open_backend = 7", ConfigurationError, "open_backend"),
        ({"unit": "{name}"}, OURS, MissingExtraError, "sdk"),
        ({"unit": "{name}", "Unit": "{name}"}, PLUG_IN, None, ""),
    ],
)
def test_broken_plug_in_is_our_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    points: dict[str, str],
    code: str,
    error: type[D1SignerError] | None,
    text: str,
) -> None:
    install(tmp_path, monkeypatch, points, code)
    if error is None:
        open_signer("unit:a").close()
        return
    with pytest.raises(error, match=text) as caught:
        open_signer("unit:a?pin-value=" + SECRET)
    assert_hidden(SECRET, caught.value)


def test_two_plug_ins_for_one_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        install(tmp_path / folder, monkeypatch, {"unit": "{name}"}, PLUG_IN)
    with pytest.raises(ConfigurationError, match="More than one plug-in"):
        open_signer("unit:a")


def test_plug_in_does_not_replace_a_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install(tmp_path, monkeypatch, {"file": "{name}"}, PLUG_IN)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_signer(f"file://{tmp_path}/missing.pem")
    assert name not in sys.modules


@pytest.mark.parametrize("uri", ["nothing:x", "x", "", "/path/key.pem", "pin-value=" + SECRET])
def test_unknown_scheme_lists_the_known(uri: str) -> None:
    for call in (open_signer, generate_key):
        with pytest.raises(KeyUriError) as caught:
            call(uri + "?pin-value=" + SECRET)
        assert "pkcs11:" in caught.value.hint
        assert_hidden(SECRET, caught.value)


@pytest.mark.parametrize("uri", [None, b"file:///x", 7, Path("/x")])
def test_uri_that_is_no_text(uri: str) -> None:
    for call in (open_signer, generate_key):
        with pytest.raises(KeyUriError):
            call(uri)


def test_unknown_options_are_named_with_the_known_ones(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/key.pem"
    for call in (open_signer, generate_key):
        with pytest.raises(ConfigurationError, match="passphrase, pin_source") as caught:
            call(uri, passphrase=SECRET, pin_source=SECRET)
        assert "passphrase_source" in caught.value.hint
        assert_hidden(SECRET, caught.value)
    assert not (tmp_path / "key.pem").exists()


def test_scheme_that_makes_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"unit": "{name}"}, PLUG_IN)
    with pytest.raises(KeyUriError, match="does not make keys"):
        generate_key("unit:a")


# One URI for each scheme, and the library that its backend needs.
NEEDS = {
    "awskms": ("awskms:///alias/d1?region=eu-west-1", "boto3", "aws"),
    "gcpkms": (
        "gcpkms://projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1",
        "google",
        "gcp",
    ),
    "pkcs11": ("pkcs11:token=t;object=d1?module-path=/nowhere.so", "pkcs11", "pkcs11"),
}
NEEDS_NOTHING = {"file", "hashivault"}  # Vault speaks HTTP, which requests brings
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[2]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from d1_signer import MissingExtraError, open_signer
try:
    open_signer(sys.argv[1])
except MissingExtraError as error:
    print(error.code, error.hint)
"""
PRESENT = [scheme for scheme in NEEDS if importlib.util.find_spec(registry.BUILT_IN[scheme])]


@pytest.mark.parametrize("scheme", PRESENT)
def test_missing_extra_says_what_to_install(scheme: str) -> None:
    uri, library, extra = NEEDS[scheme]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, uri, library],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.stdout.startswith("missing_extra"), done.stderr
    assert f'pip install "d1-signer[{extra}]"' in done.stdout


UNREADABLE = """
import resource, sys
import d1_signer.backends
from d1_signer import D1SignerError, open_signer

if sys.argv[2] == "used up":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
else:
    d1_signer.backends.__path__.insert(0, sys.argv[1])
try:
    open_signer("hashivault:transit/keys/d1")
except D1SignerError as error:
    print(error.code, error.retryable, error, error.__context__)
"""


@pytest.mark.parametrize(
    ("cause", "code", "why", "look"),
    [
        ("used up", "signer_unavailable True", "Too many open files", "LimitNOFILE, ulimit -n"),
        ("broken", "configuration False", "Input/output error", "Check the installation"),
    ],
)
def test_a_module_that_cannot_be_read_is_tried_again_only_where_that_helps(
    tmp_path: Path, cause: str, code: str, why: str, look: str
) -> None:
    # Nothing is mapped where it begins, so that root cannot read it either.
    (tmp_path / "vault.py").symlink_to("/proc/self/mem")
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, str(tmp_path), cause],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    loaded = f"The module of d1_signer for hashivault: keys cannot be loaded: {why}."
    assert done.stdout.startswith(f"{code} {loaded}"), done.stderr
    assert look in done.stdout
    assert done.stdout.endswith(" None\n")


def test_every_built_in_scheme_is_accounted_for() -> None:
    assert set(registry.BUILT_IN) == {*NEEDS, *NEEDS_NOTHING}


def test_a_key_error_of_the_backend_keeps_its_kind() -> None:
    backend = KeyBackend(KEY)
    backend.public_key = fail(KeyNotFoundError)  # type: ignore[assignment]
    with pytest.raises(KeyNotFoundError):
        Signer(backend)


def test_a_backend_cannot_bring_its_own_verifier() -> None:
    class Obliging(PublicKey):  # type: ignore[misc]  # final, which stops only the honest
        __slots__ = ()

        def verify_digest(self, signature: bytes, digest: bytes) -> None:
            del signature, digest

    backend = AnsweringBackend(KEY, lambda _: raw(1, 1))
    backend.encoding = SignatureEncoding.RAW
    backend.public_key = lambda: Obliging(KEY.public_key())  # type: ignore[method-assign]
    signer = Signer(backend)
    assert type(signer.public_key) is PublicKey
    with pytest.raises(InvalidSignatureError):
        signer.sign(b"m")


@pytest.mark.parametrize("key", [None, "key", 7])
def test_a_backend_without_a_public_key_is_a_defect_of_its_own(key: object) -> None:
    backend = KeyBackend(KEY)
    backend.public_key = lambda: key  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(SignerError):
        Signer(backend)


@pytest.mark.parametrize(
    "options",
    [
        {"expected_thumbprint": []},
        {"expected_thumbprint": "x"},
        {"observers": 5},
        {"observers": [5]},
        {"custody_policy": "strict"},
        {"kid": 5},
    ],
    ids=str,
)
def test_an_option_of_a_wrong_kind_is_our_error(options: dict[str, object]) -> None:
    with pytest.raises(D1SignerError):
        Signer(KeyBackend(KEY), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [10**400, float("inf"), float("nan"), "1", 1e300])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(InvalidInputError):
        Signer(KeyBackend(KEY)).sign(b"m", timeout=timeout)


def test_the_use_of_a_pool_is_told_where_there_is_one() -> None:
    class PooledBackend(KeyBackend):
        def pool_use(self) -> tuple[int, int]:
            return 3, 4

    told: list[Event] = []
    for backend in (PooledBackend(KEY), KeyBackend(KEY)):
        Signer(backend, observers=[told.append]).sign(b"m")
    assert [event.pool_use for event in told if isinstance(event, SignEvent)] == [(3, 4), None]


def test_pool_use_that_fails_is_an_error_of_ours() -> None:
    class BrokenPool(KeyBackend):
        def pool_use(self) -> tuple[int, int]:
            raise ValueError("token=s3cret")

    told: list[Event] = []
    with pytest.raises(SignerError, match="ValueError") as raised:
        Signer(BrokenPool(KEY), observers=[told.append]).sign(b"m")
    assert "s3cret" not in str(raised.value)
    assert [event.error for event in told if isinstance(event, SignEvent)] == [raised.value.code]


def test_options_that_do_not_fit_a_plug_in_are_told_with_those_that_do() -> None:
    def open_key(uri: str, pin: str, *rest: str, slot: int = 0, **others: str) -> None:
        raise AssertionError((uri, pin, rest, slot, others))

    module = types.ModuleType("plug_in")
    module.open_key = open_key  # type: ignore[attr-defined]
    assert registry.option_names(open_key) == ["pin", "slot"]
    with pytest.raises(ConfigurationError, match="a required one is missing") as refused:
        registry.call_backend(module, "open_key", "unit:x", {"slot": 1})
    assert refused.value.hint == "Known here: pin, slot."
    with pytest.raises(ConfigurationError, match=r"has no close_key\(\)"):
        registry.call_backend(module, "close_key", "unit:x", {})
