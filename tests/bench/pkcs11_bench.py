# SPDX-License-Identifier: Apache-2.0
"""``sign()`` on a SoftHSM key beside a bare C loop, python-pkcs11 and the peers, in one run.

``python -m tests.bench.pkcs11_bench``. What is compared is measured in turns, block by block; the
ratio is that of the lower deciles, so that the blocks in which the machine was busy do not count.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SoftHsmToken, make_softhsm_token
from tests.pkcs11.wire import wire

Timer = Callable[[], float]

_MESSAGE = b"x" * 400  # as long as an assertion's signing input
_DIGEST = bytes(32)
_BLOCK, _ROUNDS = 50, 100


def per_call(work: Callable[[], object], block: int = _BLOCK) -> Timer:
    """Microseconds for a call, over a block of them."""

    def timer() -> float:
        began = time.perf_counter()
        for _ in range(block):
            work()
        return (time.perf_counter() - began) / block * 1e6

    return timer


def in_threads(work: Callable[[], object], threads: int, each: int = _BLOCK) -> Timer:
    """Microseconds from one signature to the next, with threads that sign together."""

    def timer() -> float:
        barrier = threading.Barrier(threads + 1)

        def run() -> None:
            barrier.wait()
            for _ in range(each):
                work()

        workers = [threading.Thread(target=run) for _ in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        return (time.perf_counter() - began) / (threads * each) * 1e6

    return timer


@contextmanager
def bare_loop(token: SoftHsmToken, directory: Path) -> Iterator[Timer | None]:
    """The C loop in a process of its own; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        yield None
        return
    program = directory / "bare_loop"
    source = Path(__file__).with_name("bare_loop.c")
    subprocess.run([compiler, "-O2", "-o", str(program), str(source), "-ldl"], check=True)
    with subprocess.Popen(
        [str(program), token.module_path, token.label, "d1"],
        env={**os.environ, "BARE_PIN": token.pin},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def timer() -> float:
            asked.write(f"{_BLOCK}\n")
            asked.flush()
            return float(answers.readline())

        try:
            yield timer
        finally:
            process.kill()


def binding(token: SoftHsmToken, stack: ExitStack) -> Callable[[], bytes]:
    """python-pkcs11 with a session and a key that are kept, on the module that is initialised."""
    import pkcs11
    from pkcs11 import Attribute, ObjectClass

    signer = stack.enter_context(open_signer(token.uri))
    module = signer._backend._module.binding  # type: ignore[attr-defined]
    slot = next(
        s for s in module.get_slots(token_present=True) if s.get_token().label == token.label
    )
    session = stack.enter_context(slot.get_token().open())
    wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: "d1"}
    (key,) = list(session.get_objects(wanted))
    return lambda: key.sign(_DIGEST, mechanism=pkcs11.Mechanism.ECDSA)


def verified(sign: Callable[[], bytes], signer: Signer) -> Callable[[], None]:
    """The binding and one verification by cryptography."""
    key = signer.public_key.cryptography_key()
    algorithm = ec.ECDSA(utils.Prehashed(SHA256()))

    def work() -> None:
        raw = sign()
        r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
        key.verify(utils.encode_dss_signature(r, s), _DIGEST, algorithm)

    return work


def peers(token: SoftHsmToken) -> dict[str, Timer]:
    """Other libraries, where they are installed."""
    found: dict[str, Timer] = {}
    try:
        import PyKCS11
    except ImportError:
        return found
    library = PyKCS11.PyKCS11Lib()
    library.load(token.module_path)
    slot = next(
        s
        for s in library.getSlotList(tokenPresent=True)
        if library.getTokenInfo(s).label.strip() == token.label
    )
    session = library.openSession(slot)
    key = session.findObjects(
        [(PyKCS11.CKA_CLASS, PyKCS11.CKO_PRIVATE_KEY), (PyKCS11.CKA_LABEL, "d1")]
    )[0]
    mechanism = PyKCS11.Mechanism(PyKCS11.CKM_ECDSA, None)
    found["PyKCS11, session kept"] = per_call(lambda: session.sign(key, _DIGEST, mechanism))
    return found


def undisturbed(figures: tuple[float, ...]) -> float:
    """The lower decile."""
    return statistics.quantiles(figures, n=10)[0]


class Report:
    """The figures, and whether the bars are met."""

    def __init__(self) -> None:
        self.failed = False

    def compare(
        self, name: str, ours: Timer, other: Timer, bar: float, *, least: bool = False
    ) -> None:
        """Print a ratio; ``least``: it is a gain, other / ours."""
        ours(), other()
        rounds = [(ours(), other()) for _ in range(_ROUNDS)]
        mine, theirs = (undisturbed(column) for column in zip(*rounds, strict=True))
        ratio = theirs / mine if least else mine / theirs
        met = ratio >= bar if least else ratio <= bar
        self.failed |= not met
        print(
            f"{name:<66} {mine:8.1f} µs {theirs:8.1f} µs  x {ratio:5.2f}  "
            f"bar {'>=' if least else '<='} {bar:.2f}  {'met' if met else 'NOT MET'}",
            flush=True,
        )


def main() -> int:
    """Measure; 0 where all bars are met."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory = Path(folder)
        token = make_softhsm_token(directory)
        os.environ["SOFTHSM2_CONF"] = str(token.configuration)
        generate_key(token.uri)
        plain = stack.enter_context(open_signer(token.uri, verify=False))
        signer = stack.enter_context(open_signer(token.uri))
        bare = stack.enter_context(bare_loop(token, directory))
        raw = binding(token, stack)
        print(f"{'one signature':<66} {'ours':>11} {'other':>11}")
        unverified, checked = (
            per_call(lambda: plain.sign(_MESSAGE)),
            per_call(lambda: signer.sign(_MESSAGE)),
        )
        if bare is None:
            print("no C compiler: the rows against the bare C loop are left out")
        else:
            report.compare("sign() without verification / bare C loop", unverified, bare, 1.20)
        report.compare(
            "sign() / python-pkcs11 and one verification",
            checked,
            per_call(verified(raw, signer)),
            1.10,
        )
        for name, timer in {"python-pkcs11, session kept": per_call(raw), **peers(token)}.items():
            timer()
            rounds = [(timer(), bare() if bare else 1.0) for _ in range(_ROUNDS)]
            figure, loop = (undisturbed(column) for column in zip(*rounds, strict=True))
            against = f"  x {figure / loop:5.2f} of the C loop" if bare else ""
            print(f"{name:<66} {figure:8.1f} µs{against}")
        _isolated(report, token, checked, signer)
    _over_a_wire(report)
    return 1 if report.failed else 0


def _isolated(report: Report, token: SoftHsmToken, checked: Timer, signer: Signer) -> None:
    with open_signer(token.uri, isolation="process") as hosted:
        report.compare(
            "sign() in a child process / in this process",
            per_call(lambda: hosted.sign(_MESSAGE)),
            checked,
            1.60,
        )
    with open_signer(token.uri, isolation="process", processes=2) as hosted:
        report.compare(
            "two children, two threads: signatures a second / in this process",
            in_threads(lambda: hosted.sign(_MESSAGE), 2),
            in_threads(lambda: signer.sign(_MESSAGE), 2),
            1.50,
            least=True,
        )


def _over_a_wire(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        token = make_softhsm_token(directory)
        os.environ["SOFTHSM2_CONF"] = str(token.configuration)
        generate_key(token.uri)
        with wire(token, directory) as hsm:
            os.environ.update(hsm.env)
            with open_signer(token.uri, module_path=hsm.client, verify=False) as signer:
                report.compare(
                    "p11-kit's socket, 4 threads: signatures a second / 1 thread",
                    in_threads(lambda: signer.sign(_MESSAGE), 4, 50),
                    in_threads(lambda: signer.sign(_MESSAGE), 1, 50),
                    2.50,
                    least=True,
                )


if __name__ == "__main__":
    sys.exit(main())
