# SPDX-License-Identifier: Apache-2.0
"""`SignerSet` on a clock of the test: order, failover, circuit breaker, rotation."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jws
from joserfc.jwk import KeySet
from jwcrypto.jwk import JWKSet

from d1_signer import jose
from d1_signer.errors import (
    ConfigurationError,
    InvalidInputError,
    KeyMismatchError,
    KeyNotFoundError,
    LoginError,
    SecretSourceError,
    SignerClosedError,
    SignerError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
    TokenTimeout,
)
from d1_signer.es256 import PublicKey
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.member import Health
from d1_signer.signing.signer import Signer
from d1_signer.signing.signer_set import SignerSet
from d1_signer.token import jwt

from .backends import KeyBackend

KEYS = [ec.derive_private_key(number, ec.SECP256R1()) for number in (21, 22, 23)]
PUBLIC = [PublicKey(key.public_key()) for key in KEYS]
PATIENCE = 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def signer(number: int, kid: str | None = None) -> Signer:
    return Signer(KeyBackend(KEYS[number]), kid=kid or f"k{number}")


def backend(one: Signer) -> KeyBackend:
    found = one._backend
    assert isinstance(found, KeyBackend)
    return found


class Work:
    """Work that fails for the kids it is told, and notes who was asked."""

    def __init__(self, **errors: Exception) -> None:
        self.errors: dict[str, Exception] = dict(errors)
        self.asked: list[str] = []

    def __call__(self, one: Signer) -> str:
        self.asked.append(one.kid)
        if one.kid in self.errors:
            raise self.errors[one.kid]
        return one.kid


def down(text: str = "down") -> SignerUnavailable:
    return SignerUnavailable(text)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(clock: Clock) -> SignerSet:
    return SignerSet([signer(0), signer(1)], clock=clock)


def states(signers: SignerSet) -> list[Health]:
    return [member.health for member in signers.health()]


# -- order and failover -----------------------------------------------------------------------


def test_first_that_can_does(two: SignerSet) -> None:
    work = Work()
    assert [two.attempt(work) for _ in range(3)] == ["k0"] * 3
    assert two.kids == ("k0", "k1")
    assert states(two) == [Health.WORKING] * 2


@pytest.mark.parametrize(
    "error", [down(), SignerThrottled("slow"), LoginError("x"), SignerError("x")]
)
def test_any_error_of_the_key_side_fails_over(two: SignerSet, error: SignerError) -> None:
    work = Work(k0=error)
    assert two.attempt(work) == "k1"
    first, second = two.health()
    assert (first.health, first.failures, first.last_error) == (Health.RESTING, 1, error.code)
    assert (second.health, second.failures, second.last_error) == (Health.WORKING, 0, None)
    assert two.attempt(work) == "k1"
    assert work.asked == ["k0", "k1", "k1"]


def test_the_log_says_why_and_the_error_which_kid(
    two: SignerSet, caplog: pytest.LogCaptureFixture
) -> None:
    reason = SignerUnavailable("The HSM is away.", hint="Look at it.")
    with pytest.raises(SignerUnavailable) as caught:
        two.attempt(Work(k0=reason, k1=down()))
    assert caught.value.details["kid"] == "k0"
    why = "The HSM is away. Look at it."
    assert f'signer_set.failed kid=k0 error=signer_unavailable message="{why}"' in caplog.messages


def test_first_error_is_told_when_none_can(two: SignerSet) -> None:
    first, second = down("first"), KeyNotFoundError("second")
    with pytest.raises(SignerUnavailable, match="first") as caught:
        two.attempt(Work(k0=first, k1=second))
    assert caught.value is not first  # a copy: the original may be raised in another thread


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), TokenTimeout("x")])
def test_other_errors_say_nothing_about_a_member(two: SignerSet, error: Exception) -> None:
    work = Work(k0=error)
    with pytest.raises(type(error)):
        two.attempt(work)
    assert work.asked == ["k0"]
    assert states(two) == [Health.WORKING] * 2


def test_a_pin_that_cannot_be_read_is_one_members_trouble(two: SignerSet) -> None:
    assert two.attempt(Work(k0=SecretSourceError("no file"))) == "k1"
    assert [state.last_error for state in two.health()] == ["secret_source", None]


def test_a_sole_member_is_asked_each_time(clock: Clock) -> None:
    alone = SignerSet([signer(0)], clock=clock)
    work = Work(k0=down("its own error"))
    for _ in range(3):
        with pytest.raises(SignerUnavailable, match="its own error"):
            alone.attempt(work)
    del work.errors["k0"]
    assert alone.attempt(work) == "k0"
    assert states(alone) == [Health.WORKING]


def test_some_kids_can_be_left_out(two: SignerSet) -> None:
    work = Work()
    assert two.attempt(work, without=frozenset({"k0"})) == "k1"
    assert work.asked == ["k1"]
    with pytest.raises(SignerUnavailable, match="none is left"):
        two.attempt(work, without=frozenset({"k0", "k1"}))


# -- the circuit breaker ----------------------------------------------------------------------


def test_rests_grow_and_end_with_a_signature(two: SignerSet, clock: Clock) -> None:
    work = Work(k0=down())
    rests = []
    for count in range(1, 9):
        assert two.attempt(work) == "k1"
        state = two.health()[0]
        assert (state.failures, state.health) == (count, Health.RESTING)
        rests.append(state.rests_for)
        clock.now += state.rests_for - 0.01
        asked = len(work.asked)
        two.attempt(work)
        assert work.asked[asked:] == ["k1"]  # not asked before its rest is over
        clock.now += 0.02
    assert rests == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    work.errors.clear()
    assert two.attempt(work) == "k0"
    assert two.health()[0].failures == 0
    work.errors["k0"] = down()
    two.attempt(work)
    assert two.health()[0].rests_for == pytest.approx(1)  # the count began anew


def test_what_does_not_mend_itself_rests_long(two: SignerSet) -> None:
    two.attempt(Work(k0=LoginError("refused")))
    assert two.health()[0].rests_for == pytest.approx(30)


def test_all_resting_is_one_retryable_error(two: SignerSet, clock: Clock) -> None:
    work = Work(k0=LoginError("x"), k1=down())
    with pytest.raises(LoginError):
        two.attempt(work)
    work.asked.clear()
    clock.now += 0.25
    with pytest.raises(SignerUnavailable, match="k0: login, k1: signer_unavailable") as caught:
        two.attempt(work)
    assert not work.asked
    assert caught.value.retryable
    assert caught.value.details == {"rests_for": 0.75}


def test_one_prober_at_a_time(two: SignerSet, clock: Clock) -> None:
    two.attempt(Work(k0=down()))
    clock.now += 2
    probing, release = threading.Event(), threading.Event()
    probes: list[str] = []

    def slow(one: Signer) -> str:
        if one.kid == "k0":
            probes.append(threading.current_thread().name)
            probing.set()
            assert release.wait(PATIENCE)
        return one.kid

    with ThreadPoolExecutor(9) as pool:
        prober = pool.submit(two.attempt, slow)
        assert probing.wait(PATIENCE)
        assert states(two) == [Health.PROBING, Health.WORKING]
        others = [pool.submit(two.attempt, slow) for _ in range(8)]
        assert [other.result(PATIENCE) for other in others] == ["k1"] * 8
        release.set()
        assert prober.result(PATIENCE) == "k0"
    assert len(probes) == 1
    assert states(two) == [Health.WORKING] * 2


def test_one_outage_seen_by_many_threads_is_one_rest(two: SignerSet) -> None:
    # 16 calls under way when the device goes: a blip must not become the longest rest.
    together = threading.Barrier(16, timeout=PATIENCE)

    def fails(one: Signer) -> str:
        if one.kid == "k0":
            together.wait()
            raise down()
        return one.kid

    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(two.attempt, fails) for _ in range(16)]
        assert [call.result(PATIENCE) for call in calls] == ["k1"] * 16
    state = two.health()[0]
    assert state.failures == 16
    assert state.rests_for == pytest.approx(1)


@pytest.mark.parametrize("end", [down(), ValueError("no verdict")])
def test_late_failure_does_not_admit_a_second_prober(
    two: SignerSet, clock: Clock, end: Exception
) -> None:
    late_in, late_out = threading.Event(), threading.Event()
    probe_in, probe_out = threading.Event(), threading.Event()

    def late(one: Signer) -> str:
        if one.kid == "k0":
            late_in.set()
            assert late_out.wait(PATIENCE)
            raise end
        return one.kid

    def probe(one: Signer) -> str:
        if one.kid == "k0":
            probe_in.set()
            assert probe_out.wait(PATIENCE)
        return one.kid

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(two.attempt, late)  # begins while all is well
        assert late_in.wait(PATIENCE)
        two.attempt(Work(k0=down()))
        clock.now += 2
        prober = pool.submit(two.attempt, probe)
        assert probe_in.wait(PATIENCE)
        late_out.set()
        assert slow.exception(PATIENCE) is (end if isinstance(end, ValueError) else None)
        clock.now += 100
        work = Work()
        assert two.attempt(work) == "k1"
        assert two.health()[0].health is Health.PROBING
        probe_out.set()
        assert prober.result(PATIENCE) == "k0"
    assert states(two) == [Health.WORKING] * 2


def test_probe_that_is_interrupted_leaves_the_place(two: SignerSet, clock: Clock) -> None:
    two.attempt(Work(k0=down()))
    clock.now += 2
    with pytest.raises(KeyboardInterrupt):
        two.attempt(Work(k0=KeyboardInterrupt()))  # type: ignore[arg-type]
    assert states(two) == [Health.RESTING, Health.WORKING]
    assert two.attempt(Work()) == "k0"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_while_a_thread_probes_and_one_opens(clock: Clock) -> None:
    inside, release = threading.Semaphore(0), threading.Event()

    def opener() -> Signer:
        if os.getpid() == parent:
            inside.release()
            assert release.wait(PATIENCE)
        return signer(1)

    def probe(one: Signer) -> str:
        if os.getpid() == parent:
            inside.release()
            assert release.wait(PATIENCE)
        return one.kid

    parent = os.getpid()
    lazy = LazySigner(opener, kid="k1", public_key=PUBLIC[1])
    both = SignerSet([signer(0), lazy], clock=clock)
    with pytest.raises(SignerUnavailable):
        SignerSet([signer(0)], clock=clock).attempt(Work(k0=down()))
    both._members[0].failed(object(), down(), clock())
    clock.now += 2
    with ThreadPoolExecutor(2) as pool:
        prober = pool.submit(both.attempt, probe)
        opened = pool.submit(lazy.signer)
        try:
            assert inside.acquire(timeout=PATIENCE)
            assert inside.acquire(timeout=PATIENCE)
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # a child that hangs on an inherited lock is killed by it
                try:
                    right = both.attempt(probe) == "k0" and lazy.signer().kid == "k1"
                finally:
                    os._exit(0 if right else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            release.set()
        assert prober.result(PATIENCE) == "k0"
        assert opened.result(PATIENCE).kid == "k1"


def test_patience_is_told_whether_another_can_follow(clock: Clock) -> None:
    three = SignerSet([signer(0), signer(1), signer(2)], clock=clock)
    told: list[bool] = []

    def patience(another: bool) -> float:
        told.append(another)
        return 1.0

    assert three.attempt(Work(k0=down(), k1=down()), patience=patience) == "k2"
    assert three.attempt(Work(), patience=patience) == "k2"  # the others rest
    assert three.attempt(Work(), without=frozenset({"k0", "k1"}), patience=patience) == "k2"
    clock.now += 2  # they may be tried again
    assert three.attempt(Work(), patience=patience) == "k0"
    assert told == [True, True, False, False, False, True]


# -- members that are down at start -----------------------------------------------------------


def test_lazy_signer_opens_when_it_is_up(clock: Clock) -> None:
    up: list[Signer] = []

    def opener() -> Signer:
        if not up:
            raise down()
        return up[0]

    both = SignerSet([LazySigner(opener, kid="k0", public_key=PUBLIC[0]), signer(1)], clock=clock)
    assert both.kids == ("k0", "k1")
    assert [key["kid"] for key in both.jwks()["keys"]] == ["k0", "k1"]
    assert both.attempt(Work()) == "k1"
    up.append(signer(0))
    assert both.attempt(Work()) == "k1"  # still resting
    clock.now += 2
    assert both.attempt(Work()) == "k0"
    both.close()
    assert backend(up[0]).closed == 1


@pytest.mark.parametrize(("number", "kid"), [(1, "k0"), (0, "other")])
def test_lazy_signer_with_another_key_is_refused_and_closed(number: int, kid: str) -> None:
    found = signer(number, kid)
    lazy = LazySigner(lambda: found, kid="k0", public_key=PUBLIC[0])
    with pytest.raises(KeyMismatchError, match="expected") as caught:
        lazy.signer()
    assert repr(kid) in str(caught.value)
    assert PUBLIC[number].thumbprint() in str(caught.value)
    assert backend(found).closed == 1


def test_closed_lazy_signer_is_not_opened_again() -> None:
    opened: list[Signer] = []

    def opener() -> Signer:
        opened.append(signer(0))
        return opened[-1]

    lazy = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    first = lazy.signer()
    assert lazy.signer() is first
    for _ in range(2):
        lazy.close()
    with pytest.raises(SignerClosedError):
        lazy.signer()
    unused = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    unused.close()
    with pytest.raises(SignerClosedError):
        unused.signer()
    assert [backend(one).closed for one in opened] == [1]


def test_threads_open_a_lazy_signer_once() -> None:
    opened: list[Signer] = []

    def opener() -> Signer:
        opened.append(signer(0))
        return opened[-1]

    lazy = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: lazy.signer(), range(64)))
    assert len(opened) == 1
    assert set(map(id, found)) == {id(opened[0])}


def test_an_opening_that_takes_too_long_goes_on() -> None:
    go_on = threading.Event()
    opened: list[Signer] = []

    def opener() -> Signer:
        assert go_on.wait(PATIENCE)
        opened.append(signer(0))
        return opened[-1]

    lazy = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    for _ in range(2):  # no second opening begins
        with pytest.raises(SignerTimeout, match=r"'k0' is not open within 0\.01 seconds") as caught:
            lazy.signer(timeout=0.01)
        assert caught.value.retryable
    go_on.set()
    found = lazy.signer(timeout=PATIENCE)
    assert opened == [found]
    assert lazy.signer(timeout=0) is found
    lazy.close()
    assert backend(found).closed == 1


def test_a_lazy_signer_that_is_closed_while_it_opens_says_so_and_leaves_nothing_open() -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    late = signer(0)
    close = backend(late).close

    def noting_close() -> None:
        close()
        closed.set()

    backend(late).close = noting_close  # type: ignore[method-assign]

    def opener() -> Signer:
        begun.set()
        assert go_on.wait(PATIENCE)
        return late

    lazy = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lazy.signer, timeout=PATIENCE)
        assert begun.wait(PATIENCE)
        lazy.close()
        go_on.set()
        with pytest.raises(SignerClosedError, match="'k0' is closed"):
            waiting.result(PATIENCE)
    assert closed.wait(PATIENCE)
    with pytest.raises(SignerClosedError):
        lazy.signer()
    assert backend(late).closed == 1


@pytest.mark.parametrize(
    ("opener", "key"), [(None, PUBLIC[0]), (signer, PUBLIC[0].pem()), (signer, None)]
)
def test_a_lazy_signer_of_something_else_is_refused(opener: object, key: object) -> None:
    with pytest.raises(ConfigurationError, match="callable"):
        LazySigner(opener, kid="k0", public_key=key)  # type: ignore[arg-type]


def test_lazy_signer_without_a_thread_is_opened_later(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = LazySigner(lambda: signer(0), kid="k0", public_key=PUBLIC[0])

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SignerUnavailable):
            lazy.signer(timeout=PATIENCE)
    assert lazy.signer(timeout=PATIENCE).kid == "k0"


def test_lazy_signer_whose_opener_exits_is_opened_again() -> None:
    exits = [SystemExit(1), KeyboardInterrupt()]

    def opener() -> Signer:
        if exits:
            raise exits.pop()
        return signer(0)

    lazy = LazySigner(opener, kid="k0", public_key=PUBLIC[0])
    for kind in ("KeyboardInterrupt", "SystemExit"):
        with pytest.raises(SignerError, match=kind):
            lazy.signer(timeout=PATIENCE)
    assert lazy.signer(timeout=PATIENCE).kid == "k0"


# -- kids and keys ----------------------------------------------------------------------------


def test_clones_share_a_kid(clock: Clock) -> None:
    clones = [signer(0, "k"), signer(0, "k")]
    both = SignerSet(clones, clock=clock)
    assert both.kids == ("k",)
    assert len(both.jwks()["keys"]) == 1
    asked: list[Signer] = []

    def work(one: Signer) -> int:
        asked.append(one)
        if one is clones[0]:
            raise down()
        return clones.index(one)

    assert both.attempt(work) == 1
    assert asked == clones
    both.add(signer(0, "k"))
    assert len(both) == len(both.health()) == 3


def test_two_keys_under_one_kid_are_refused(two: SignerSet) -> None:
    with pytest.raises(ConfigurationError, match="'k'"):
        SignerSet([signer(0, "k"), signer(1, "k")])
    lazy = LazySigner(lambda: signer(1), kid="k0", public_key=PUBLIC[1])
    for other in (signer(1, "k0"), lazy):
        with pytest.raises(ConfigurationError):
            two.add(other)
    assert len(two.health()) == 2
    with pytest.raises(ConfigurationError):
        SignerSet([])


def test_jwks_is_read_by_others(two: SignerSet) -> None:
    jwks = two.jwks()
    text = json.dumps(jwks)
    assert '"d"' not in text
    theirs = KeySet.import_key_set(json.loads(text))
    assert [key.kid for key in theirs.keys] == ["k0", "k1"]
    others = JWKSet.from_json(text)
    for number, kid in enumerate(two.kids):
        key = others.get_key(kid)
        assert key is not None
        assert key.thumbprint() == PUBLIC[number].thumbprint()
    for without in (frozenset[str](), frozenset({"k0"})):

        def token(one: Signer) -> str:
            unsigned = jwt.signing_input(one.kid, {"a": 1})
            return jose.compact(unsigned, one.sign(unsigned))

        read = jws.deserialize_compact(two.attempt(token, without=without), theirs)
        assert json.loads(read.payload) == {"a": 1}


# -- rotation and the end ---------------------------------------------------------------------


def test_rotation(two: SignerSet) -> None:
    new = signer(2)
    two.add(new)
    assert (two.kids, two.attempt(Work())) == (("k0", "k1", "k2"), "k0")
    two.promote("k2")
    assert (two.kids, two.attempt(Work())) == (("k2", "k0", "k1"), "k2")
    old = next(member.source for member in two._members if member.kid == "k0")
    assert isinstance(old, Signer)
    two.remove("k0")
    assert (two.kids, backend(old).closed) == (("k2", "k1"), 1)
    for change in (two.promote, two.remove):
        with pytest.raises(InvalidInputError, match="that kid") as caught:
            change("k0")
        assert caught.value.hint == "Known: k2, k1."
    two.remove("k1")
    with pytest.raises(InvalidInputError, match="last"):
        two.remove("k2")
    assert two.attempt(Work()) == "k2"


def test_health_stays_with_the_member_that_is_moved(two: SignerSet) -> None:
    two.attempt(Work(k0=down()))
    two.promote("k1")
    assert [(state.kid, state.failures) for state in two.health()] == [("k1", 0), ("k0", 1)]


def test_changes_beside_signing_threads() -> None:
    # Whoever still has a removed member in hand goes on to the next: no caller sees an error.
    signers = SignerSet([signer(0), signer(1)])
    stop = threading.Event()
    started = threading.Barrier(5, timeout=PATIENCE)

    def sign() -> set[str]:
        used: set[str] = set()
        started.wait()
        while not stop.is_set():
            used.add(signers.attempt(lambda one: (one.sign(b"m"), one.kid)[1]))
        return used

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(sign) for _ in range(4)]
        started.wait()
        try:
            for _ in range(60):
                signers.add(signer(2))
                signers.promote("k2")
                signers.attempt(lambda one: one.sign(b"m"))
                signers.promote("k1")
                signers.remove("k2")
        finally:
            stop.set()
        used = set().union(*(worker.result(PATIENCE) for worker in workers))
    assert used <= {"k0", "k1", "k2"}
    assert set(signers.kids) == {"k0", "k1"}


def test_closed_set_says_so_each_time() -> None:
    members = [signer(0), signer(1)]
    with SignerSet(members) as signers:
        assert "k0, k1" in repr(signers)
    signers.close()
    for _ in range(3):
        with pytest.raises(SignerClosedError) as caught:
            signers.attempt(Work())
        assert not caught.value.retryable
    with pytest.raises(SignerClosedError):
        signers.add(signer(2))
    assert all(backend(member).closed for member in members)


def test_one_that_fails_to_close_does_not_keep_the_others_open() -> None:
    members = [signer(0), signer(1), signer(2)]

    def fails() -> None:
        raise OSError

    backend(members[1]).close = fails  # type: ignore[method-assign]
    with pytest.raises(SignerError):
        SignerSet(members).close()
    assert [backend(member).closed for member in members] == [1, 0, 1]


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_set_cannot_be_pickled(two: SignerSet, leave: Callable[[object], object]) -> None:
    with pytest.raises(TypeError):
        leave(two)
