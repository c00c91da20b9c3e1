# SPDX-License-Identifier: Apache-2.0
"""D1, the store and the signing device as the simulation knows them: they keep state and fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer import SignatureEncoding, jose
from d1_signer.custody.evidence import Evidence
from d1_signer.errors import (
    LoginError,
    SignerTimeout,
    SignerUnavailable,
    StoreUnavailable,
    TokenResponseError,
    TokenUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import Secret
from d1_signer.token.endpoint import Reply
from d1_signer.token.response import Grant, error_from
from tests.token.fleet.simulation.world import Process, World

_SKEW_ALLOWED = 5.0
_LONGEST_ASSERTION = 900.0
_STORE_TIMEOUT = 1.0
_CLAIM = 2.0


@dataclass(frozen=True)
class Trouble:
    """One kind of misbehaviour between two moments."""

    kind: str
    begins: float
    ends: float
    value: float = 0.0


class Plan:
    """What goes wrong, and when."""

    def __init__(self, world: World, troubles: list[Trouble]) -> None:
        self._world = world
        self.troubles = troubles

    def now(self, *kinds: str) -> Trouble | None:
        for trouble in self.troubles:
            if trouble.kind in kinds and trouble.begins <= self._world.now < trouble.ends:
                return trouble
        return None


class D1:
    """The authorization server: knows which tokens live, and who asks."""

    def __init__(self, world: World, plan: Plan, kids: set[str], life: float) -> None:
        self.world = world
        self.plan = plan
        self.kids = kids
        self.life = life
        self.dies_at: dict[str, float] = {}
        self.identifiers: set[str] = set()
        self.under_way: list[SimulatedEndpoint] = []
        self.moments: list[float] = []
        self.most_at_once = 0

    @property
    def requests(self) -> int:
        return len(self.moments)

    def is_valid(self, token: str) -> bool:
        return self.dies_at[token] > self.world.now

    def revoke(self, token: str) -> None:
        self.dies_at[token] = min(self.dies_at[token], self.world.now)

    def reads(self, assertion: str) -> str:
        """Why the assertion is refused; empty where it is not."""
        header, claims = (json.loads(jose.b64url_decode(part)) for part in assertion.split(".")[:2])
        if claims["jti"] in self.identifiers:
            self.world.problems.append("two assertions with one jti")
        self.identifiers.add(claims["jti"])
        now = self.world.true_wall
        if header["kid"] not in self.kids or self.plan.now("d1-refuses"):
            return "invalid_grant"
        in_time = now < claims["exp"] <= now + _LONGEST_ASSERTION + _SKEW_ALLOWED
        return "" if in_time and claims["iat"] <= now + _SKEW_ALLOWED else "invalid_grant"

    def issues(self) -> Grant:
        short = self.plan.now("d1-short")
        life = self.life if short is None else short.value
        value = f"token-{len(self.dies_at)}"
        self.dies_at[value] = self.world.now + life
        return Grant(value=value, expires_in=life, scope="d1")


class SimulatedEndpoint:
    """Stands for `TokenEndpoint`: the way to D1 and back, with its time limits."""

    d1: D1  # of the schedule that runs
    address = "d1.example:443"

    def __init__(
        self,
        environment: object,
        context: object,
        *,
        proxy: str | None,
        connect_timeout: float,
        read_timeout: float,
        request_format: object,
    ) -> None:
        del environment, context, proxy, request_format
        self._limits = (connect_timeout, read_timeout)
        self._aborts = 0

    def post(self, assertion: Secret, *, correlation_id: str, deadline: float) -> Reply:
        del correlation_id
        d1, world = self.d1, self.d1.world
        remaining = deadline - world.time.monotonic()
        if remaining <= 0:
            return Reply(outcome=TokenUnavailable("too late"))
        d1.moments.append(world.now)
        d1.under_way.append(self)
        d1.most_at_once = max(d1.most_at_once, len(d1.under_way))
        if d1.under_way.count(self) > 1:
            world.problems.append("one fetcher has two requests under way")
        aborts = self._aborts
        try:
            return self._exchange(assertion, remaining, lambda: self._aborts > aborts)
        finally:
            d1.under_way.remove(self)

    def _exchange(self, assertion: Secret, remaining: float, aborted: Callable[[], bool]) -> Reply:
        world, plan = self.d1.world, self.d1.plan
        connect, read = (min(limit, remaining) for limit in self._limits)
        if plan.now("d1-unreachable"):
            return Reply(outcome=TokenUnavailable("connection refused"))
        slow = plan.now("d1-slow")
        latency = slow.value if slow else world.chance.uniform(0.01, 0.3)
        if plan.now("d1-silent") or latency > connect + read:
            # The worst that two time-outs in a row allow.
            world.block(aborted, connect + read)
            return Reply(outcome=TokenUnavailable("no answer"))
        if world.block(aborted, latency / 2):
            return Reply(outcome=TokenUnavailable("cut"))
        reply = self._answer(assertion)
        if world.block(aborted, latency / 2) or plan.now("d1-loses-answers"):
            return Reply(outcome=TokenUnavailable("the connection was closed"))
        return reply

    def _answer(self, assertion: Secret) -> Reply:
        d1, plan = self.d1, self.d1.plan
        offset = d1.world.true_wall - d1.world.wall()
        busy = plan.now("d1-busy", "d1-throttles")
        if busy:
            wait, status = busy.value or None, 429 if busy.kind == "d1-throttles" else 503
            error = error_from(status, b"", assertion=assertion, retry_after=wait)
            return Reply(outcome=error, status=status, clock_offset=offset)
        if plan.now("d1-garbles"):
            return Reply(outcome=TokenResponseError("no JSON"), status=200, clock_offset=offset)
        refusal = d1.reads(assertion.reveal())
        if refusal:
            body = json.dumps({"error": refusal}).encode()
            error = error_from(400, body, assertion=assertion, retry_after=None)
            return Reply(outcome=error, status=400, clock_offset=offset)
        return Reply(outcome=d1.issues(), status=200, clock_offset=offset)

    def abort(self) -> None:
        self._aborts += 1

    def close(self) -> None:
        pass


class Store:
    """Stands for a Redis: one for the fleet, away at times, and its answers get lost at times."""

    def __init__(self, world: World, plan: Plan) -> None:
        self._world = world
        self._plan = plan
        self._kept: dict[str, tuple[bytes, float]] = {}
        self._leases: dict[str, tuple[object, float]] = {}

    def _reached(self) -> bool:
        """Whether the answer will come; raises where the command is not even executed."""
        if self._plan.now("store-down"):
            raise StoreUnavailable("refused")
        if self._plan.now("store-hangs"):
            self._world.sleep(_STORE_TIMEOUT)
            raise StoreUnavailable("no answer")
        self._world.sleep(self._world.chance.uniform(0.0, 0.002))
        return self._plan.now("store-loses-answers") is None or self._world.chance.random() < 0.5

    def _lost(self) -> StoreUnavailable:
        self._world.sleep(_STORE_TIMEOUT)
        return StoreUnavailable("no answer")

    def load(self, name: str) -> tuple[bytes, float] | None:
        if not self._reached():
            raise self._lost()
        sealed, until = self._kept.get(name, (b"", 0.0))
        if self._plan.now("store-garbles"):
            sealed = sealed[:-1]
        return (sealed, until - self._world.now) if until > self._world.now else None

    def save(self, name: str, sealed: bytes, *, life: float) -> None:
        answered = self._reached()
        self._kept[name] = (sealed, self._world.now + life)
        if not answered:
            raise self._lost()

    def lease(self, name: str, *, life: float) -> Any:
        answered = self._reached()
        if self._leases.get(name, (None, 0.0))[1] > self._world.now:
            if not answered:
                raise self._lost()
            return None
        owner = object()
        if not answered:
            self._leases[name] = (owner, self._world.now + _CLAIM)
            raise self._lost()
        self._leases[name] = (owner, self._world.now + life)
        return _Lease(self, name, owner)

    def released(self, name: str, owner: object) -> None:
        answered = self._reached()
        if self._leases.get(name, (None, 0.0))[0] is owner:
            del self._leases[name]
        if not answered:
            raise self._lost()


class _Lease:
    def __init__(self, store: Store, name: str, owner: object) -> None:
        self._store = store
        self._name = name
        self._owner = owner

    def release(self) -> None:
        self._store.released(self._name, self._owner)


_KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]


class Device:
    """Stands for an HSM: signs with a real key, slowly, or not at all."""

    name = "simulated"
    encoding = SignatureEncoding.DER

    def __init__(self, world: World, plan: Plan, number: int) -> None:
        self._world = world
        self._plan = plan
        self._number = number
        self._key = _KEYS[number]

    def public_key(self) -> PublicKey:
        return PublicKey(self._key.public_key())

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        assert deadline is not None
        suffix = f"-{self._number}"
        if self._plan.now(f"hsm-down{suffix}"):
            raise SignerUnavailable("no device")
        if self._plan.now(f"hsm-refuses{suffix}"):
            raise LoginError("wrong PIN")
        hangs = self._plan.now(f"hsm-hangs{suffix}")
        if hangs:
            # A module that no time limit can call back.
            self._world.sleep(hangs.value)
        slow = self._plan.now(f"hsm-slow{suffix}")
        self._world.sleep(slow.value if slow else self._world.chance.uniform(0.0, 0.01))
        if self._world.time.monotonic() > deadline and not hangs:
            raise SignerTimeout("too slow")
        return self._key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256())))

    def custody(self) -> Evidence:
        raise NotImplementedError

    def close(self) -> None:
        pass


def machine(world: World, number: int) -> Process:
    process = world.process(f"p{number}")
    process.skew = world.chance.choice([0.0, 0.0, world.chance.uniform(-300, 300)])
    return process
