# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102, PLR2004, S101 (tests: their names say what they show, values are literals)
"""The conformance suite: what every `Signer` must do, whatever holds its key.

Each signature is checked with the ``cryptography`` package, never with this package alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import pickle
import select
import signal
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

from d1_signer.custody.evidence import Assurance
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import (
    CustodyError,
    D1SignerError,
    InvalidInputError,
    SignerClosedError,
    SignerTimeout,
)
from d1_signer.signing.recording import recorded
from d1_signer.signing.signer import Signer

_MESSAGE = b"d1_signer conformance"
_DIGEST = hashlib.sha256(_MESSAGE).digest()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # SP 800-186, 3.2.1.3
_PATIENCE = 60.0  # seconds until something counts as hung
_LATEST = 0.5  # seconds behind its deadline at which a call must have ended
_THREADS = 16
_EACH = 8  # signatures a thread

# CPython warns that a fork beside threads may deadlock: that it does not is what is tested.
_forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class SignerConformance:
    """Derive a test class from it and give it a fixture ``signer``; pytest runs the rest.

    ::

        class TestMyBackend(SignerConformance):
            @pytest.fixture
            def signer(self):
                return open_signer("mykms:///alias/d1")

    The signer must be a new one for each test (the suite closes it) under its default options; the
    key may be the same. The key gets some hundred signatures.
    """

    @pytest.fixture
    def signer(self) -> Signer:
        """An open signer; every derived class replaces this."""
        pytest.fail("Give your class a fixture named signer that returns an open Signer.")

    @pytest.fixture
    def secrets(self) -> tuple[str, ...]:
        """Secrets that the signer was opened with (a PIN, a token): nothing may show them."""
        return ()

    @pytest.fixture(autouse=True)
    def _close_after_test(self, signer: Signer) -> Iterator[None]:
        yield
        signer.close()

    # -- the signature ------------------------------------------------------------------------

    @pytest.mark.parametrize("length", [0, 1, 32, 4097, 1_000_000])
    def test_message_of_any_length_is_signed(self, signer: Signer, length: int) -> None:
        message = b"\xa5" * length
        _verify(signer, signer.sign(message), hashlib.sha256(message).digest())

    def test_digest_is_signed_as_it_is(self, signer: Signer) -> None:
        _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)

    def test_signature_fits_no_other_message(self, signer: Signer) -> None:
        with pytest.raises(InvalidSignature):
            _verify(signer, signer.sign(b"another message"), _DIGEST)

    def test_every_signature_is_64_bytes_in_range(self, signer: Signer) -> None:
        # One in 128 has an r or s with a leading zero byte, which must stay there.
        for count in range(64):
            digest = hashlib.sha256(count.to_bytes(2, "big")).digest()
            _verify(signer, signer.sign_digest(digest), digest)

    @pytest.mark.parametrize("length", [0, 20, 31, 33, 48, 64, 100])
    def test_digest_of_wrong_length_is_refused(self, signer: Signer, length: int) -> None:
        with pytest.raises(InvalidInputError):
            signer.sign_digest(b"\x01" * length)

    @pytest.mark.parametrize("value", ["text", None, 32, bytearray(32), memoryview(bytes(32))])
    def test_digest_of_wrong_type_is_refused(self, signer: Signer, value: object) -> None:
        with pytest.raises(InvalidInputError):
            signer.sign_digest(value)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", ["text", None, 32, ["list"]])
    def test_message_of_wrong_type_is_refused(self, signer: Signer, value: object) -> None:
        with pytest.raises(InvalidInputError):
            signer.sign(value)  # type: ignore[arg-type]

    def test_backend_answers_the_encoding_it_declares(self, signer: Signer) -> None:
        backend = signer._backend  # noqa: SLF001 (no public face shows what a backend answers)
        for _ in range(8):
            about = {**signer._about, "digest": _DIGEST.hex()}  # noqa: SLF001
            with recorded(signer.trail, "sign", about):
                answer = backend.sign_digest(_DIGEST, None)
            assert isinstance(answer, bytes)
            if backend.encoding == "der":
                r, s = utils.decode_dss_signature(answer)
                assert utils.encode_dss_signature(r, s) == answer
            else:
                assert backend.encoding == "raw"
                assert len(answer) == 64

    # -- the key ------------------------------------------------------------------------------

    def test_public_key_is_one_p256_key_in_every_form(self, signer: Signer) -> None:
        public = signer.public_key
        from_pem = load_pem_public_key(public.pem().encode())
        assert isinstance(from_pem, ec.EllipticCurvePublicKey)
        assert isinstance(from_pem.curve, ec.SECP256R1)
        assert load_der_public_key(public.der()) == from_pem
        numbers = from_pem.public_numbers()
        jwk = public.jwk()
        assert (jwk["kty"], jwk["crv"]) == ("EC", "P-256")
        for coordinate, value in ((jwk["x"], numbers.x), (jwk["y"], numbers.y)):
            decoded = urlsafe_b64decode(coordinate + "=")
            assert decoded == value.to_bytes(32, "big")

    def test_public_key_is_pinned(self, signer: Signer) -> None:
        backend = signer._backend  # noqa: SLF001
        assert backend.public_key() == signer.public_key == backend.public_key()

    def test_kid_defaults_to_the_rfc7638_thumbprint(self, signer: Signer) -> None:
        canonical = json.dumps(signer.public_key.jwk(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).digest()
        thumbprint = urlsafe_b64encode(digest).rstrip(b"=").decode()
        assert signer.public_key.thumbprint() == thumbprint
        with Signer(signer._backend, trail=signer.trail) as unnamed:  # noqa: SLF001
            assert unnamed.kid == thumbprint

    def test_algorithm_is_es256(self, signer: Signer) -> None:
        assert signer.algorithm == "ES256"

    # -- custody ------------------------------------------------------------------------------

    def test_custody_rests_on_facts(self, signer: Signer, secrets: tuple[str, ...]) -> None:
        report = signer.custody()
        assert report.thumbprint == signer.public_key.thumbprint()
        assert report.kid == signer.kid
        evidence = report.evidence
        assert evidence.location
        assert "?" not in evidence.location
        assert evidence.facts, "answers without facts are adjectives"
        for fact in evidence.facts:
            assert fact.name
            assert fact.source
            assert fact.assurance in set(Assurance)
        for answer in (evidence.exportable, evidence.generated_in_place, evidence.hardware):
            assert answer in {True, False, None}
        _assert_shows_none(secrets, json.dumps(report.to_dict()))

    def test_policy_is_held(self, signer: Signer) -> None:
        evidence = signer.custody().evidence
        words = ("non-exportable", "never-exportable", "generated-in-place", "hardware", "fips")
        policies = [CustodyPolicy.parse(",".join(kinds)) for kinds in (words, *zip(words))]
        policies += [CustodyPolicy.parse(f"{word},attested") for word in words]
        refused = [policy for policy in policies if policy.unmet(evidence)]
        assert refused, "nobody can show all of it"
        for policy in policies:
            if policy not in refused:
                Signer(signer._backend, custody_policy=policy)  # noqa: SLF001
                continue
            with pytest.raises(CustodyError):
                Signer(signer._backend, custody_policy=policy)  # noqa: SLF001

    # -- threads and forks --------------------------------------------------------------------

    def test_threads_share_one_signer(self, signer: Signer) -> None:
        barrier = threading.Barrier(_THREADS, timeout=_PATIENCE)

        def work(number: int) -> list[tuple[bytes, bytes]]:
            barrier.wait()
            digests = [hashlib.sha256(bytes((number, turn))).digest() for turn in range(_EACH)]
            return [(digest, signer.sign_digest(digest)) for digest in digests]

        with ThreadPoolExecutor(_THREADS) as pool:
            answers = [pair for pairs in pool.map(work, range(_THREADS)) for pair in pairs]
        assert len(answers) == _THREADS * _EACH
        for digest, signature in answers:
            _verify(signer, signature, digest)

    @_forks
    def test_forked_child_and_parent_both_sign(self, signer: Signer) -> None:
        _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)
        with _child(lambda: signer.sign_digest(_DIGEST)) as answer:
            _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)
            _verify(signer, answer(), _DIGEST)
        _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)

    @_forks
    def test_fork_while_threads_sign(self, signer: Signer) -> None:
        stop = threading.Event()
        started = threading.Semaphore(0)

        def work() -> None:
            while not stop.is_set():
                try:
                    _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)
                finally:
                    started.release()

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            try:
                for _ in workers:
                    assert started.acquire(timeout=_PATIENCE)
                    with _child(lambda: signer.sign_digest(_DIGEST)) as answer:
                        _verify(signer, answer(), _DIGEST)
            finally:
                stop.set()
            for worker in workers:
                worker.result(timeout=_PATIENCE)

    # -- the end ------------------------------------------------------------------------------

    def test_generous_timeout_changes_nothing(self, signer: Signer) -> None:
        _verify(signer, signer.sign_digest(_DIGEST, timeout=_PATIENCE), _DIGEST)

    def test_spent_timeout_gives_a_signature_or_a_timeout(self, signer: Signer) -> None:
        started = time.monotonic()
        try:
            signature = signer.sign_digest(_DIGEST, timeout=0.0)
        except SignerTimeout as error:
            assert error.retryable  # noqa: PT017 (either end is right)
        else:
            _verify(signer, signature, _DIGEST)
        assert time.monotonic() - started < _PATIENCE
        _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)

    @pytest.mark.parametrize("timeout", [0.0, 0.1])
    def test_deadline_is_kept(self, signer: Signer, timeout: float) -> None:
        # The quickest of several: a loaded machine may hold up one of them.
        quickest = _PATIENCE
        for _ in range(5):
            started = time.monotonic()
            with contextlib.suppress(SignerTimeout):
                signer.sign_digest(_DIGEST, timeout=timeout)
            quickest = min(quickest, time.monotonic() - started)
        assert quickest < timeout + _LATEST, "the backend goes on beyond the deadline it is given"

    def test_closed_signer_refuses(self, signer: Signer) -> None:
        backend = signer._backend  # noqa: SLF001
        with signer as entered:
            assert entered is signer
            signer.sign(_MESSAGE)
        signer.close()
        with pytest.raises(SignerClosedError):
            signer.sign(_MESSAGE)
        with pytest.raises(SignerClosedError):
            signer.sign_digest(_DIGEST)
        with pytest.raises(SignerClosedError):
            backend.sign_digest(_DIGEST, None)

    def test_close_beside_signing_threads_raises_only_our_errors(self, signer: Signer) -> None:
        signed = threading.Semaphore(0)

        def work() -> BaseException | None:
            until = time.monotonic() + _PATIENCE
            while time.monotonic() < until:
                try:
                    _verify(signer, signer.sign_digest(_DIGEST), _DIGEST)
                except D1SignerError as error:
                    return error
                finally:
                    signed.release()
            return None

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            for _ in workers:
                assert signed.acquire(timeout=_PATIENCE)
            signer.close()
            ends = [worker.result(timeout=_PATIENCE) for worker in workers]
        assert all(isinstance(end, D1SignerError) for end in ends)

    # -- nothing gets out ---------------------------------------------------------------------

    @pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_signer_cannot_be_copied_out(
        self, signer: Signer, leave: Callable[[object], object]
    ) -> None:
        with pytest.raises(TypeError):
            leave(signer)

    def test_repr_and_log_show_no_secret(
        self, signer: Signer, secrets: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = signer._backend  # noqa: SLF001
        with caplog.at_level(logging.DEBUG, logger="d1_signer"):
            signer.sign(_MESSAGE)
            signer.custody()
            signer.close()
            refusal = _refusal_of_closed(signer)
        assert signer.kid in repr(signer)
        own = [record.getMessage() for record in caplog.records if "d1_signer" in record.name]
        state = [repr(value) for value in getattr(backend, "__dict__", {}).values()]
        shown = [repr(signer), str(signer), repr(backend), str(refusal), *own, *state]
        _assert_shows_none((*secrets, "PRIVATE KEY"), "\n".join(shown))


def _verify(signer: Signer, signature: bytes, digest: bytes) -> None:
    assert isinstance(signature, bytes)
    assert len(signature) == 64  # r||s, RFC 7518 section 3.4
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    assert 0 < r < _ORDER
    assert 0 < s < _ORDER
    key = load_der_public_key(signer.public_key.der())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    algorithm = ec.ECDSA(utils.Prehashed(SHA256()))
    key.verify(utils.encode_dss_signature(r, s), digest, algorithm)


def _refusal_of_closed(signer: Signer) -> SignerClosedError:
    # In a frame of its own: an error's traceback shows the locals of the frames it passed.
    with pytest.raises(SignerClosedError) as refused:
        signer.sign(_MESSAGE)
    return refused.value


def _assert_shows_none(secrets: tuple[str, ...], text: str) -> None:
    for number, secret in enumerate(secrets):
        # The secret itself stays out of the report of a failure too.
        shown = secret in text
        assert not shown, f"secret number {number} is shown"


@contextmanager
def _child(work: Callable[[], bytes]) -> Iterator[Callable[[], bytes]]:
    """Fork; the child does ``work`` and exits; yields what waits for its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # A stream that another thread was writing to stays locked in the child (CPython re-makes
        # the locks of loggers, not those of files): a log line could hang what is not at fault.
        logging.disable(logging.CRITICAL)
        status = 1
        try:
            os.write(writer, b"+" + work())
            status = 0
        except BaseException as error:  # noqa: BLE001 (told to the parent, which fails)
            os.write(writer, b"-" + type(error).__name__.encode() + b": " + str(error).encode())
        finally:
            os._exit(status)
    os.close(writer)

    def answer() -> bytes:
        ready, _, _ = select.select([reader], [], [], _PATIENCE)
        if not ready:
            pytest.fail("The forked child hangs.", pytrace=False)
        told = os.read(reader, 4096)
        if not told.startswith(b"+"):
            pytest.fail(f"The forked child failed: {told[1:].decode()}", pytrace=False)
        return told[1:]

    try:
        yield answer
    finally:
        # It is done, or it hangs; it has nothing to lose.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
