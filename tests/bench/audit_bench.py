# SPDX-License-Identifier: Apache-2.0
"""The audit trail: what a record costs, what verifying a million takes.

``python -m tests.bench.audit_bench``

The bars are absolute, so each figure is the best of several rounds: what the machine can do.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from d1_signer import AuditTrail, Signer
from d1_signer.audit import folder, verifying
from d1_signer.audit.note import VerifierKey
from d1_signer.audit.proving import prove
from tests.signing.backends import KeyBackend

PAIR_BAR = 60e-6
GROUP_BAR = 2000.0
VERIFY_BAR = 10.0
MEMORY_BAR = 100.0  # MiB
PROOF_BAR = 1.0
_PAIRS = 500_000
_ORIGIN = "bench.example/d1"
_SEALING = ec.derive_private_key(0x5EA1, ec.SECP256R1())
_ABOUT = {
    "backend": "pkcs11",
    "kid": "k" * 43,
    "thumbprint": "t" * 43,
    "digest": "a" * 64,
    "purpose": "d1-assertion",
    "references": (("iss", "bank"), ("jti", "j" * 22)),
}


def _pairs(trail: AuditTrail, count: int) -> None:
    for _ in range(count):
        trail.end(trail.begin("sign", _ABOUT), "done")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _told(what: str, figure: str, bar: str, *, met: bool) -> bool:
    print(f"{what:<48} {figure:>18}   bar {bar}: {'met' if met else 'NOT MET'}")
    return met


def one_thread(place: Path) -> bool:
    with AuditTrail(place, origin=_ORIGIN, sync="none") as trail:
        _pairs(trail, 1000)
        best = min(_seconds(lambda: _pairs(trail, 100)) / 100 for _ in range(100))
    return _told(
        "begin and end of one signature, no sync",
        f"{best * 1e6:.1f} us",
        f"{PAIR_BAR * 1e6:.0f} us",
        met=best <= PAIR_BAR,
    )


def group_commit(place: Path) -> bool:
    def round_of_threads() -> None:
        threads = [threading.Thread(target=_pairs, args=(trail, 200)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with AuditTrail(place, origin=_ORIGIN) as trail:
        _pairs(trail, 100)
        best = max(1600 / _seconds(round_of_threads) for _ in range(7))
    return _told(
        "pairs of 8 threads with group commit",
        f"{best:,.0f} /s",
        f"{GROUP_BAR:,.0f} /s",
        met=best >= GROUP_BAR,
    )


def without_a_trail() -> bool:
    """What a Signer without a trail pays beside its backend and its verification."""
    backend = KeyBackend(_SEALING)
    signer = Signer(backend)
    pinned = signer.public_key

    def bare() -> None:
        from d1_signer import es256

        answer = es256.raw_from_der(backend.sign_digest(bytes(32), None))
        pinned.verify_digest(answer, bytes(32))

    rounds = [
        (
            _seconds(lambda: [signer.sign_digest(bytes(32)) for _ in range(100)]),
            _seconds(_hundred(bare)),
        )
        for _ in range(60)
    ]
    ratio = min(ours for ours, _ in rounds) / min(theirs for _, theirs in rounds)
    return _told(
        "Signer without a trail, beside its parts", f"x {ratio:.3f}", "1.10", met=ratio <= 1.1
    )


def _hundred(work: Callable[[], None]) -> Callable[[], object]:
    return lambda: [work() for _ in range(100)]  # type: ignore[func-returns-value]


def a_million(place: Path) -> bool:
    sealing = Signer(KeyBackend(_SEALING))
    with AuditTrail(place, origin=_ORIGIN, checkpoint_signer=sealing, sync="none") as trail:
        _pairs(trail, _PAIRS)
        key = trail.verifier_key()
    code = f"from tests.bench import audit_bench as b; b.verify_once({str(place)!r}, {key!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall, cpu, memory = map(float, done.stdout.split())
    met = _told(
        "verifying 1,000,002 records",
        f"{wall:.1f} s, CPU {cpu:.1f} s",
        f"{VERIFY_BAR:.0f} s",
        met=wall <= VERIFY_BAR,
    )
    met &= _told("… memory", f"{memory:.0f} MiB", f"{MEMORY_BAR:.0f} MiB", met=memory <= MEMORY_BAR)
    (instance,) = folder.instances(place)
    best = min(_seconds(lambda: prove(instance, 2 * _PAIRS // 3)) for _ in range(5))
    proof_bar = f"{PROOF_BAR * 1e3:.0f} ms"
    return met & _told(
        "the proof of one of them", f"{best * 1e3:.0f} ms", proof_bar, met=best <= PROOF_BAR
    )


def verify_once(place: str, key: str) -> None:
    """Verify in a process of its own, and print seconds, seconds of CPU, and MiB."""
    started = time.perf_counter()
    (report,) = verifying.verify(folder.instances(Path(place)), [VerifierKey.parse(key)])
    wall = time.perf_counter() - started
    assert report.findings == []
    assert report.sealed == report.records == 2 * _PAIRS + 2
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(wall, time.process_time(), usage.ru_maxrss / 1024)


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        met = [
            one_thread(place / "one"),
            group_commit(place / "group"),
            without_a_trail(),
            a_million(place / "million"),
        ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
