# SPDX-License-Identifier: Apache-2.0
"""What a crash reporter gets with an exception that a user's code sees: no argument of a call."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from d1_signer import (
    AuditTrail,
    ClientCertificate,
    D1SignerError,
    Environment,
    LazySigner,
    Signer,
    SignerSet,
    TokenFetcher,
    frames,
    generate_key,
    open_signer,
    read_secret,
)
from d1_signer.frames import of_signal_handler, without_locals
from d1_signer.signing.backend import guarded
from tests.conftest import told_by
from tests.signing.backends import KeyBackend

SECRET = "s3cret-" + "that-nobody-may-see"
_GIVEN = [
    ("PIN in the URI", open_signer, f"pkcs11:token=b;object=d?pin-value={SECRET}%ff", {}),
    ("PIN in the URI", generate_key, f"pkcs11:token=b?module-path=/m&pin-value={SECRET}", {}),
    ("PIN", open_signer, "pkcs11:token=b;object=d?module-path=/no.so", {"pin_source": SECRET}),
    ("URL", Environment.of, f"https://svc:{SECRET}", {}),
    ("URL", Environment, f"https://svc:{SECRET}/x@h", {}),
    ("Vault's address", open_signer, "hashivault://d1", {"address": f"https://svc:{SECRET}"}),
    ("Vault's CA", open_signer, "hashivault://d1", {"ca_file": f"-----BEGIN/{SECRET}"}),
    ("endpoint", open_signer, f"awskms:///k?endpoint=https://svc:{SECRET}", {}),
    ("module", open_signer, "pkcs11:token=b;object=d", {"module_path": f"-----BEGIN/{SECRET}"}),
    ("module's name", open_signer, f"pkcs11:token=b;object=d?module-name={SECRET}", {}),
    ("passphrase", open_signer, "file:/no/key.pem", {"passphrase_source": SECRET}),
    ("token", open_signer, "hashivault:d1", {"token_source": SECRET, "address": "https://v"}),
    ("address", open_signer, "hashivault:d1", {"address": f"https://u:{SECRET}@v/?"}),
    ("proxy", open_signer, "awskms:///alias/d1", {"region": "x", "proxy": f"http://u:{SECRET}@p"}),
    ("option", open_signer, "file:/no/key.pem", {"password": SECRET}),
    ("environment", Environment.of, f"https://u:{SECRET}@d1.example", {}),
    ("environment", Environment, f"https://u:{SECRET}@d1.example", {}),
    ("source", functools.partial(read_secret, what="PIN"), SECRET, {}),
]


@pytest.mark.parametrize(("what", "call", "first", "options"), _GIVEN)
def test_what_was_given_is_in_no_frame(
    what: str, call: Callable[..., object], first: str, options: dict[str, str]
) -> None:
    with pytest.raises(D1SignerError) as raised:
        call(first, **options)
    assert not [text for text in told_by(raised.value) if SECRET in text], what
    assert raised.value.__traceback__ is not None
    assert _last(raised.value.__traceback__).endswith(".py"), "where it was raised is still told"


@pytest.mark.parametrize("setting", ["environment", "proxy", "store_key"])
def test_settings_of_a_fetcher(setting: str) -> None:
    settings: dict[str, object] = {"issuer_id": "issuer", "environment": "https://d1.example"}
    secrets = {
        "environment": f"https://u:{SECRET}@d1.example",
        "proxy": f"http://u:{SECRET}@proxy.example:1/path",
        "store_key": SECRET.encode(),
    }
    with pytest.raises(D1SignerError) as raised:
        TokenFetcher(None, **{**settings, setting: secrets[setting]})  # type: ignore[arg-type]
    assert not [text for text in told_by(raised.value) if SECRET in text]


def _a_signer() -> Signer:
    return Signer(KeyBackend(ec.derive_private_key(11, ec.SECP256R1())))


# Where a signer belongs, and a URI with a PIN is given.
_NO_SIGNERS: dict[str, Callable[[Any], object]] = {
    "Signer": Signer,
    "SignerSet": lambda uri: SignerSet([uri]),
    "SignerSet of one": SignerSet,
    "SignerSet, the second": lambda uri: SignerSet([_a_signer(), uri]),
    "SignerSet.add": lambda uri: SignerSet([_a_signer()]).add(uri),
    "SignerSet.promote": lambda uri: SignerSet([_a_signer()]).promote(uri),
    "SignerSet.remove": lambda uri: SignerSet([_a_signer()]).remove(uri),
    "LazySigner": lambda uri: LazySigner(uri, kid="k", public_key=_a_signer().public_key),
    "LazySigner's key": lambda uri: LazySigner(_a_signer, kid="k", public_key=uri),
    "TokenFetcher": lambda uri: TokenFetcher(
        uri, issuer_id="issuer", environment="https://d1.example"
    ),
    "TokenFetcher, several": lambda uri: TokenFetcher(
        [uri],  # type: ignore[arg-type]
        issuer_id="issuer",
        environment="https://d1.example",
    ),
    "ClientCertificate": lambda uri: ClientCertificate("client.pem", uri),
    "ClientCertificate, several": lambda uri: ClientCertificate("client.pem", [uri]),
    "AuditTrail": lambda uri: AuditTrail("/none", origin="unit", checkpoint_signer=uri),
    "trail": lambda uri: Signer(_a_signer()._backend, trail=uri),
}


@pytest.mark.parametrize("given", _NO_SIGNERS)
def test_a_uri_in_place_of_a_signer(given: str) -> None:
    with pytest.raises(D1SignerError) as raised:
        _NO_SIGNERS[given](f"pkcs11:token=bank;object=d1?pin-value={SECRET}")
    assert not [text for text in told_by(raised.value) if SECRET in text]
    assert raised.value.hint


_REPLACING = """
import copy, dataclasses, sys
from d1_signer import ClientCertificate, D1SignerError, Environment
from tests.leaks.watch import told_by

pem = sys.stdin.read()
certificate = ClientCertificate("client.pem", "client.key")
environment = Environment.of("https://d1.example")
for replace in (dataclasses.replace, getattr(copy, "replace", dataclasses.replace)):
    for given, changes in (
        (certificate, {"key": pem}),
        (certificate, {"key": pem.splitlines()}),
        (certificate, {"certificate": pem, "timeout": 3.0}),
        (environment, {"base_url": f"https://user:{pem.strip()}@d1.example"}),
    ):
        before = repr(given)
        try:
            replace(given, **changes)
        except D1SignerError as error:
            told = told_by(error.with_traceback(error.__traceback__.tb_next))  # below this frame
            assert "dataclasses.py" in "".join(told)
            shown = [text for text in told if pem[100:130] in text]
            print("leaks" if shown else "kept", repr(given) == before)
    print(replace(certificate, key="other.key").key)
"""


def test_replace_with_what_is_refused_shows_nothing_of_it() -> None:
    # In a process of its own: here the watch stands between `replace` and what it calls.
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    ran = subprocess.run(
        [sys.executable, "-c", _REPLACING], input=pem, capture_output=True, timeout=60, check=False
    )
    told = ran.stdout.decode().splitlines()
    assert told == [*["kept True"] * 4, "other.key"] * 2, ran.stderr.decode()


def test_a_uri_alone_makes_no_lazy_signer() -> None:
    with pytest.raises(TypeError) as raised:
        LazySigner(f"pkcs11:token=bank;object=d1?pin-value={SECRET}")  # type: ignore[call-arg,arg-type]
    assert not [text for text in told_by(raised.value) if SECRET in text]


def _last(trace: TracebackType) -> str:
    return traceback.extract_tb(trace)[-1].filename


def test_chain_and_groups_are_emptied_too() -> None:
    @without_locals
    def fails(given: str) -> None:
        def deeper(held: str) -> None:
            raise ValueError(len(held))

        try:
            deeper(given)
        except ValueError as first:
            raise ExceptionGroup("two", [first, KeyError("x")]) from first

    with pytest.raises(ExceptionGroup) as raised:
        fails(SECRET)
    assert not [text for text in told_by(raised.value) if SECRET in text]
    with pytest.raises(TypeError):
        fails()  # type: ignore[call-arg]


class _SoftLimit(Exception):
    """As Celery's, which is no BaseException."""


class _Handler:
    def raises(self, *_: object) -> None:
        raise _SoftLimit

    def __call__(self, *_: object) -> None:
        raise _SoftLimit


def _function(*_: object) -> None:
    raise _SoftLimit


@pytest.fixture
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "handler",
    [
        _function,
        _Handler().raises,
        _Handler(),
        functools.partial(_function, 1),
        lambda *_: _function(),
    ],
)
def test_exception_of_a_signal_handler_passes_through(
    handler: Callable[..., object],
) -> None:
    signal.signal(signal.SIGUSR1, handler)

    def backend() -> None:
        signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(_SoftLimit) as raised:
        guarded("some", backend)
    assert of_signal_handler(raised.value)


@pytest.mark.usefixtures("restored")
def test_exception_of_a_backend_does_not() -> None:
    signal.signal(signal.SIGUSR1, _function)

    def backend() -> None:
        raise _SoftLimit(SECRET)

    with pytest.raises(D1SignerError, match="failed with _SoftLimit") as raised:
        guarded("some", backend)
    assert not [text for text in told_by(raised.value) if SECRET in text]


@pytest.mark.usefixtures("restored")
def test_soft_limit_amid_an_opening(tmp_path: Path) -> None:
    """It comes out as it is, and shows nothing of what it interrupted."""
    signal.signal(signal.SIGUSR1, _function)
    main = threading.main_thread().ident
    assert main is not None

    def reads() -> str:
        held = SECRET
        signal.pthread_kill(main, signal.SIGUSR1)
        while held:  # the handler runs between two of its steps
            pass
        return held

    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"another")
    )
    file = tmp_path / "key.pem"
    file.touch(0o600)
    file.write_bytes(key)
    with pytest.raises(_SoftLimit) as raised:
        open_signer(f"file:{file}", passphrase_source=reads)
    assert not [text for text in told_by(raised.value) if SECRET in text]


@pytest.mark.usefixtures("restored")
def test_frames_of_a_request_are_dropped_but_not_where_a_handler_raised() -> None:
    signal.signal(signal.SIGUSR1, _function)

    def sends(held: str) -> None:
        assert held
        signal.raise_signal(signal.SIGUSR1)

    def asks(held: str) -> None:
        try:
            sends(held)
        except _SoftLimit as error:
            frames.clear(error, outer=None)
            raise

    with pytest.raises(_SoftLimit) as raised:
        asks(SECRET)
    assert of_signal_handler(raised.value)
    assert "_function" in _functions(raised.value)
    assert not _holders(raised.value)


def _functions(error: BaseException) -> list[str]:
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]


def _holders(error: BaseException) -> list[str]:
    """The functions whose variables still hold the secret, in the error and all that it holds."""
    return [
        frame.f_code.co_name
        for one in frames.causes(error)
        for frame, _ in traceback.walk_tb(one.__traceback__)
        if SECRET in map(str, frame.f_locals.values())
    ]


def _raised_in_a_frame_with_the_secret(error: BaseException) -> BaseException:
    def fails(held: str) -> None:
        assert held
        raise error

    with pytest.raises(type(error)) as raised:
        fails(SECRET)
    assert _holders(raised.value) == ["fails"]
    return raised.value


@pytest.mark.parametrize("held_by", ["argument", "reason", "group", "kwargs", "cause", "context"])
def test_what_an_error_holds_is_emptied_too(held_by: str) -> None:
    held = _raised_in_a_frame_with_the_secret(ValueError("x"))
    error: BaseException = KeyError("y")
    match held_by:
        case "argument":
            error.args = ("y", held)
        case "group":
            error = BaseExceptionGroup("y", [held])
        case "cause":
            error.__cause__ = held
        case "context":
            error.__context__ = held
        case "reason":
            setattr(error, held_by, held)
        case "kwargs":
            setattr(error, held_by, {"error": held})
    assert _holders(error) == ["fails"]
    frames.clear(error, outer=None)
    assert not _holders(error)
    assert "fails" in _functions(held), "where it was raised is still told"


def test_what_was_handled_before_the_call_is_left_to_the_caller() -> None:
    outer = _raised_in_a_frame_with_the_secret(ValueError("the caller's"))

    @without_locals
    def fails(_: str) -> None:
        raise KeyError

    def calls() -> None:
        try:
            raise outer
        except ValueError:
            fails(SECRET)

    with pytest.raises(KeyError) as raised:
        calls()
    assert raised.value.__context__ is outer
    assert _holders(raised.value) == ["fails"]
    assert "fails" in _functions(outer)


def test_a_frame_that_runs_in_another_thread_is_left_out() -> None:
    caught: list[BaseException] = []
    ready, over = threading.Event(), threading.Event()

    def runs(held: str) -> None:
        try:
            _raise(held)
        except ValueError as error:
            caught.append(error)
            ready.set()
            over.wait(20)

    def _raise(held: str) -> None:
        raise ValueError(len(held))

    thread = threading.Thread(target=runs, args=(SECRET,))
    thread.start()
    assert ready.wait(20)
    frames.clear(caught[0], outer=None)
    assert _functions(caught[0]) == ["_raise"]
    over.set()
    thread.join()
    assert not _holders(caught[0])


def _resets_itself(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise _SoftLimit


def _puts_another_in_its_place(*given: object) -> None:
    signal.signal(signal.SIGUSR1, _function)
    raise _SoftLimit(len(given))


class _Restoring:
    def once(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise _SoftLimit


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "handler",
    [
        _resets_itself,
        _puts_another_in_its_place,
        _Restoring().once,
        functools.partial(_Restoring.once, _Restoring()),
        lambda *given: _resets_itself(*given),  # noqa: PLW0108 (its arguments are one tuple)
    ],
)
@pytest.mark.parametrize("emptied", [0, 1, 2], ids=["kept", "emptied", "emptied twice"])
def test_handler_that_is_no_longer_set_is_known_by_what_it_was_given(
    handler: Callable[..., object], emptied: int
) -> None:
    signal.signal(signal.SIGUSR1, handler)

    def backend() -> None:
        held = SECRET
        try:
            signal.raise_signal(signal.SIGUSR1)
        except _SoftLimit as error:
            for _ in range(emptied):
                frames.clear(error, outer=None)
            raise
        assert held

    with pytest.raises(_SoftLimit) as raised:
        guarded("some", backend)
    assert of_signal_handler(raised.value)
    assert not emptied or not _holders(raised.value)


@pytest.mark.usefixtures("restored")
def test_backend_that_merely_sets_a_handler_is_told_as_its_own_defect() -> None:
    def backend(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _SoftLimit(frame)

    # As the interpreter calls a handler, but for the frame, which is not the one that was left.
    for frame in (None, sys._getframe(1)):
        with pytest.raises(D1SignerError, match="failed with _SoftLimit"):
            guarded("some", backend, signal.SIGUSR1, frame)


def test_what_an_exceptions_attributes_do_breaks_no_caller() -> None:
    class Odd(Exception):
        kwargs = ("no", "mapping")

        @property
        def reason(self) -> str:
            raise KeyError(SECRET)

    @without_locals
    def fails(secret: str) -> None:
        del secret
        raise Odd

    with pytest.raises(Odd) as failure:
        fails(SECRET)
    assert SECRET not in "".join(told_by(failure.value))


def test_a_generator_that_waits_goes_on_whatever_error_its_frame_stands_in() -> None:
    stored: list[Exception] = []

    def steps() -> Iterator[int]:
        try:
            int(SECRET)
        except ValueError as error:
            stored.append(error)
            yield 1
        yield 2

    @without_locals
    def fails() -> None:
        raise RuntimeError from stored[0]

    waiting = steps()
    assert next(waiting) == 1
    with pytest.raises(RuntimeError):
        fails()
    assert list(waiting) == [2]
