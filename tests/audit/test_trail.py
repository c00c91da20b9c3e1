# SPDX-License-Identifier: Apache-2.0
"""No signature without a record, through every door."""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer import (
    AuditError,
    AuditTrail,
    AuditUnavailable,
    ConfigurationError,
    CustodyError,
    CustodyPolicy,
    InvalidInputError,
    LoginError,
    Signer,
    SignerClosedError,
    Use,
    generate_key,
    open_signer,
)
from d1_signer.audit import folder
from d1_signer.errors import SecretSourceError, SignerError
from d1_signer.testing import SignerConformance
from tests.audit.trails import (
    ORIGIN,
    SEALING,
    SIGNING,
    findings,
    records,
    sealing_signer,
    verified,
    verifier_key,
    watched_signer,
)
from tests.signing.backends import AnsweringBackend, KeyBackend


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trail"


@pytest.fixture
def trail(place: Path) -> Iterator[AuditTrail]:
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
        yield trail


class Looking(KeyBackend):
    """Looks at the records while it is asked for a signature."""

    def __init__(self, place: Path) -> None:
        super().__init__(SIGNING)
        self.place = place
        self.seen: list[str] = []

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        last = records(self.place)[-1]
        assert (last["event"], last["action"]) == ("begin", "sign")
        self.seen.append(last["digest"])
        return super().sign_digest(digest, deadline)


def test_the_record_is_there_before_the_backend_is_asked(trail: AuditTrail, place: Path) -> None:
    backend = Looking(place)
    with Signer(backend, kid="bank-2026", trail=trail) as signer:
        use = Use(purpose="d1-assertion", references=(("iss", "bank"), ("jti", "j-1")))
        signer.sign(b"message", use=use)
        signer.sign_digest(bytes(32))
        key = signer.as_private_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
        x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
        key.sign(b"message", ec.ECDSA(SHA256()))
    assert len(backend.seen) == 4
    assert backend.seen[:2] == [hashlib.sha256(b"message").hexdigest(), bytes(32).hex()]
    told = records(place)
    begin = next(record for record in told if record["event"] == "begin")
    assert begin["purpose"] == "d1-assertion"
    assert begin["references"] == [["iss", "bank"], ["jti", "j-1"]]
    assert (begin["kid"], begin["backend"]) == ("bank-2026", "unit")
    assert begin["thumbprint"] == signer.public_key.thumbprint()
    ends = {record["begin"]: record["outcome"] for record in told if record["event"] == "end"}
    begins = [record["number"] for record in told if record["event"] == "begin"]
    assert ends == dict.fromkeys(begins, "done")
    assert [record["number"] for record in told] == list(range(len(told)))
    assert told[0]["event"] == "opened"
    assert told[-1]["event"] == "key-closed"


def test_nothing_secret_and_no_message_is_recorded(trail: AuditTrail, place: Path) -> None:
    with watched_signer(trail) as signer:
        signature = signer.sign(b"a message nobody may see")
    (instance,) = folder.instances(place)
    data = b"".join(file.read_bytes() for file in instance.iterdir())
    assert b"a message" not in data
    for form in (signature, signature.hex().encode(), signature[:32].hex().encode()):
        assert form not in data


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (LoginError("the PIN was refused"), "login"),
        (SignerError("no"), "signer"),
        (RuntimeError("plug-in"), "signer"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_failure_is_recorded_by_its_code(
    trail: AuditTrail, place: Path, failure: BaseException, outcome: str
) -> None:
    def answer(_: bytes) -> bytes:
        raise failure

    signer = Signer(AnsweringBackend(SIGNING, answer), trail=trail)
    with signer, pytest.raises((SignerError, KeyboardInterrupt)):
        signer.sign(b"x")
    assert [r["outcome"] for r in records(place) if r["event"] == "end"] == [outcome]


def test_a_signature_that_does_not_verify_is_no_success(trail: AuditTrail, place: Path) -> None:
    signer = Signer(AnsweringBackend(SIGNING, lambda _: bytes([1]) * 64), trail=trail)
    with signer, pytest.raises(SignerError):
        signer.sign(b"x")
    (end,) = [r for r in records(place) if r["event"] == "end"]
    assert end["outcome"] == "invalid_signature"


def test_making_opening_refusing_and_custody_are_records(
    trail: AuditTrail, place: Path, tmp_path: Path
) -> None:
    uri = (tmp_path / "key.pem").as_uri()
    generate_key(uri, trail=trail)
    with open_signer(uri, kid="k", trail=trail) as signer:
        signer.custody()
        signer.sign(b"x")
    with pytest.raises(CustodyError):
        open_signer(uri, trail=trail, custody_policy=CustodyPolicy(hardware=True))
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(SecretSourceError):
        open_signer(uri, trail=trail)
    told = records(place)
    actions = [record["action"] for record in told if record["event"] == "begin"]
    assert actions == ["generate-key", "open", "custody", "sign", "open", "open"]
    ends = [record for record in told if record["event"] == "end"]
    assert [end["outcome"] for end in ends] == [
        *("done", "done", "done", "done", "custody", "secret_source")
    ]
    assert [end["begin"] for end in ends[:4]] == [1, 3, 6, 8]
    (policy,) = [record for record in told if record["event"] == "policy"]
    assert (policy["demands"], policy["outcome"]) == (["hardware"], "custody")
    for answers in (ends[2], policy):
        assert answers["exportable"] is True
        assert answers["never_exportable"] is False
        assert answers["generated_in_place"] is None
        assert answers["hardware"] is False
        assert answers["fips_mode"] is None
    assert findings(place) == []


def test_no_conformance_test_goes_around_the_trail(trail: AuditTrail, place: Path) -> None:
    # It makes a second signer of a signer's backend.
    with watched_signer(trail) as signer:
        SignerConformance().test_kid_defaults_to_the_rfc7638_thumbprint(signer)
        SignerConformance().test_public_key_is_pinned(signer)
        assert signer.trail is trail
    keys = [record for record in records(place) if record["event"] == "key"]
    assert [record["kid"] for record in keys] == ["bank-2026", signer.public_key.thumbprint()]


def test_what_does_not_fit_into_a_record_is_not_signed(trail: AuditTrail, place: Path) -> None:
    with watched_signer(trail) as signer:
        backend = signer._backend
        for purpose in ("x" * 70_000, "\ud800"):
            with pytest.raises(InvalidInputError, match="purpose"):
                signer.sign(b"x", use=Use(purpose=purpose))
        assert isinstance(backend, KeyBackend)
        assert backend.asked == []
        signer.sign(b"x", use=Use(purpose="short"))
    assert [r["purpose"] for r in records(place) if r["event"] == "begin"] == ["short"]


def test_the_key_that_seals_is_not_watched_and_is_not_recorded(
    trail: AuditTrail, place: Path
) -> None:
    with pytest.raises(ConfigurationError, match="seals the audit trail"):
        watched_signer(trail, key=SEALING)
    with (
        watched_signer(trail) as recorded,
        pytest.raises(ConfigurationError, match="has an audit trail itself"),
    ):
        AuditTrail(place, origin=ORIGIN, checkpoint_signer=recorded)
    for wrong in ("key", object(), sealing_signer().as_private_key()):
        with pytest.raises(ConfigurationError, match="not a Signer"):
            AuditTrail(place, origin=ORIGIN, checkpoint_signer=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("origin", ["", "a b", "a+b", "a\nb", None, 3])
def test_an_origin_is_a_name(place: Path, origin: str) -> None:
    with pytest.raises(ConfigurationError, match="origin"):
        AuditTrail(place, origin=origin)


@pytest.mark.parametrize(
    "setting",
    [
        {"sync": "always"},
        {"on_failure": "ignore"},
        {"timeout": 0},
        {"seal_records": 0},
        {"seal_seconds": -1.0},
        {"segment_bytes": 0},
        {"timeout": "10"},
    ],
)
def test_settings_are_checked(place: Path, setting: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        AuditTrail(place, origin=ORIGIN, **setting)  # type: ignore[arg-type]
    assert not place.exists()


def test_what_is_no_trail_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a path"):
        AuditTrail(17, origin=ORIGIN)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not an audit trail"):
        Signer(KeyBackend(SIGNING), trail="/var/lib/d1/audit")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not an audit trail"):
        open_signer("file:///nowhere", trail=object())  # type: ignore[arg-type]


def test_a_trail_that_is_closed_signs_no_more(place: Path) -> None:
    trail = AuditTrail(place, origin=ORIGIN)
    signer = watched_signer(trail)
    trail.close()
    trail.close()
    with pytest.raises(AuditError, match="closed"):
        signer.sign(b"x")
    signer.close()
    with pytest.raises(SignerClosedError):
        signer.sign(b"x")
    assert repr(trail) == f"<AuditTrail {ORIGIN}>"
    with pytest.raises(TypeError):
        pickle.dumps(trail)


def test_without_a_checkpoint_signer_nothing_is_sealed_and_that_is_said(place: Path) -> None:
    with AuditTrail(place, origin=ORIGIN) as trail:
        with watched_signer(trail) as signer:
            signer.sign(b"x")
        assert not trail.seal()
        with pytest.raises(ConfigurationError, match="no checkpoint signer"):
            trail.verifier_key()
    (report,) = verified(place)
    assert report.findings == []
    assert "not sealed" in report.notes[-1]
    assert (report.sealed, report.records) == (0, len(records(place)))


def test_records_are_sealed_when_there_are_enough_of_them(place: Path) -> None:
    with (
        AuditTrail(
            place, origin=ORIGIN, checkpoint_signer=sealing_signer(), seal_records=10
        ) as trail,
        watched_signer(trail) as signer,
    ):
        until = time.monotonic() + 30
        while time.monotonic() < until and verified(place)[0].sealed < 30:
            signer.sign(b"x")
        assert verified(place)[0].sealed >= 30
        assert trail.verifier_key() == str(verifier_key())
    (report,) = verified(place)
    assert report.findings == []
    assert report.sealed == report.records
    assert report.checkpoints >= 3


def test_records_are_sealed_after_a_time(place: Path) -> None:
    with (
        AuditTrail(
            place, origin=ORIGIN, checkpoint_signer=sealing_signer(), seal_seconds=0.01
        ) as trail,
        watched_signer(trail) as signer,
    ):
        signer.sign(b"x")
        until = time.monotonic() + 30
        while verified(place)[0].sealed < 4 and time.monotonic() < until:
            threading.Event().wait(0.01)
        assert verified(place)[0].sealed == 4


def test_a_seal_that_fails_keeps_nobody_from_signing_and_is_made_up(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down = True

    def answer(digest: bytes) -> bytes:
        if down:
            raise SignerError("the sealing HSM is down")
        return KeyBackend.sign_digest(backend, digest, None)

    backend = AnsweringBackend(SEALING, answer)
    backend.encoding = KeyBackend(SEALING).encoding
    sealing = Signer(backend)
    trail = AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing)
    with watched_signer(trail) as signer:
        signer.sign(b"x")
        with pytest.raises(SignerError, match="down"):
            trail.seal()
        signer.sign(b"y")
    trail.close()
    assert "audit.seal_failed code=signer the sealing HSM is down" in caplog.text
    (report,) = verified(place)
    assert (report.sealed, report.unfinished) == (0, 0)
    assert [finding.text for finding in report.findings] == [
        "It was closed, and no checkpoint seals it. Have it sealed."
    ]
    down = False
    with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing) as trail:
        watched_signer(trail).close()
    (report,) = verified(place)
    assert report.findings == []
    assert report.sealed == report.records == len(records(place))


def test_waiting_for_the_record_counts_against_the_callers_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, waiting = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        waiting.set()
        hanging.wait(60)

    with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
        monkeypatch.setattr("os.fdatasync", hang)
        started = time.monotonic()
        with pytest.raises(AuditUnavailable, match="in time") as caught:
            signer.sign(b"x", timeout=0.05)
        assert waiting.is_set()
        assert time.monotonic() - started < 20
        assert caught.value.retryable
        backend = signer._backend
        assert isinstance(backend, KeyBackend)
        assert backend.asked == []
        hanging.set()
        monkeypatch.undo()
        signer.sign(b"x")
    outcomes = [record["outcome"] for record in records(place) if record["event"] == "end"]
    assert outcomes == ["audit_unavailable", "done"]
    assert findings(place) == []


def test_an_idle_instance_is_used_again_and_a_busy_one_is_not(place: Path) -> None:
    with AuditTrail(place, origin=ORIGIN) as first, AuditTrail(place, origin=ORIGIN) as second:
        watched_signer(first).close()
        watched_signer(second).close()
        assert len(folder.instances(place)) == 2
    for _ in range(5):
        with AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail:
            watched_signer(trail).close()
    assert len(folder.instances(place)) == 2
    assert findings(place) == []


def test_files_are_rotated_without_losing_the_tree(place: Path) -> None:
    for _ in range(3):
        with (
            AuditTrail(
                place, origin=ORIGIN, checkpoint_signer=sealing_signer(), segment_bytes=4000
            ) as trail,
            watched_signer(trail) as signer,
        ):
            for _ in range(20):
                signer.sign(b"x")
            assert trail.seal()
    (instance,) = folder.instances(place)
    files = folder.segments(instance)
    assert len(files) > 5
    assert max(file.stat().st_size for _, file in files) < 6000
    (report,) = verified(place)
    assert report.findings == []
    assert report.sealed == report.records == len(records(place))
    files[3][1].unlink()
    text = f"{files[3][0]}: The records {files[3][0]} to {files[4][0] - 1} are missing."
    assert findings(place) == [text]


def test_a_trail_is_verified_while_it_is_written(place: Path) -> None:
    stop = threading.Event()
    allowed = threading.Semaphore(0)  # so that reading all of it again and again has an end
    trail = AuditTrail(
        place, origin=ORIGIN, checkpoint_signer=sealing_signer(), sync="none", seal_records=5
    )
    with trail, watched_signer(trail) as signer:

        def sign() -> None:
            while allowed.acquire() and not stop.is_set():
                signer.sign(b"x")

        threads = [threading.Thread(target=sign) for _ in range(2)]
        for thread in threads:
            thread.start()
        found = []
        try:
            for _ in range(40):
                allowed.release(200)
                found.append(verified(place)[0])
        finally:
            stop.set()
            allowed.release(2)
            for thread in threads:
                thread.join(30)
    assert [report.findings for report in found] == [[]] * 40
    assert found[-1].checkpoints > found[0].checkpoints
    assert findings(place) == []
