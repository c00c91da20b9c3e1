# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit collect`: many trails, one signed file, and what it finds later."""

from __future__ import annotations

import base64
import shutil
from itertools import permutations
from pathlib import Path

import pytest

from d1_signer import AuditError, generate_key
from d1_signer.audit import folder
from d1_signer.audit.collecting import newest
from d1_signer.audit.note import Checkpoint, SignedNote, VerifierKey, split_notes
from d1_signer.audit.trail import AuditTrail
from tests.audit import second
from tests.audit.trails import ORIGIN, sealing_signer, verifier_key, watched_signer
from tests.cli.conftest import Run

COLLECTOR = "collector.example"


def more(place: Path) -> None:
    with (
        AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail,
        watched_signer(trail) as signer,
    ):
        signer.sign(b"x")


@pytest.fixture
def trails(tmp_path: Path) -> Path:
    place = tmp_path / "trails"
    place.mkdir()
    for host in ("a", "b", "c"):
        more(place / host)
        more(place / host)  # a second checkpoint
    return place


@pytest.fixture
def collector(tmp_path: Path) -> dict[str, str]:
    uri = generate_key((tmp_path / "collector.pem").as_uri()).uri
    return {"D1_AUDIT_KEY": uri, "D1_AUDIT_ORIGIN": COLLECTOR}


@pytest.fixture
def collected(
    run: Run, trails: Path, collector: dict[str, str], tmp_path: Path
) -> tuple[Path, str]:
    """A collection of three hosts, one of them by its file of checkpoints; the collector's key."""
    (instance,) = folder.instances(trails / "c")
    shutil.copy(instance / folder.CHECKPOINTS, tmp_path / "from-c")
    file = tmp_path / "collection"
    result = run(
        *("audit", "collect", str(trails / "a"), str(trails / "b"), str(tmp_path / "from-c")),
        *("--key", str(verifier_key()), "-o", str(file), "--json"),
        **collector,
    )
    assert (result.status, result.document["checkpoints"]) == (0, 3)
    assert result.document["collection"].encode() == file.read_bytes()
    return file, result.document["verifier_key"]


def verify(run: Run, trails: Path, collected: tuple[Path, str]) -> tuple[int, str]:
    file, key = collected
    keys = ("--key", str(verifier_key()), "--key", key)
    result = run("audit", "verify", str(trails), *keys, "--since", str(file))
    return result.status, result.out + result.err


def test_a_second_implementation_makes_the_same_tree(collected: tuple[Path, str]) -> None:
    with collected[0].open("rb") as file:
        head, *leaves = [note for note, _ in split_notes(file)]
    origin, size, root, line, *_ = head.decode().split("\n")
    assert (origin, size) == (COLLECTOR, "3")
    assert line.startswith("collection 2")
    assert base64.b64decode(root) == second.mth(leaves)


def test_it_is_verified_and_finds_what_was_taken_back(
    run: Run, trails: Path, collected: tuple[Path, str], tmp_path: Path
) -> None:
    assert verify(run, trails, collected)[0] == 0
    more(trails / "a")
    assert verify(run, trails, collected)[0] == 0
    shutil.move(trails / "b", tmp_path / "away")
    status, text = verify(run, trails, collected)
    assert status == 1
    assert "The instance is not there" in text


def test_an_older_state_of_one_host_is_found(
    run: Run, trails: Path, collector: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(trails / "b", tmp_path / "old")
    more(trails / "b")
    arguments = ("audit", "collect", str(trails), "--key", str(verifier_key()))
    result = run(*arguments, "--json", **collector)
    (tmp_path / "collection").write_text(result.document["collection"])
    shutil.rmtree(trails / "b")
    shutil.copytree(tmp_path / "old", trails / "b")
    collected = (tmp_path / "collection", result.document["verifier_key"])
    assert verify(run, trails, collected)[0] == 1


@pytest.mark.parametrize("tampering", ["drop", "swap", "foreign", "twice"])
def test_a_tampered_collection_is_refused(
    run: Run, trails: Path, collected: tuple[Path, str], tampering: str
) -> None:
    file, key = collected
    with file.open("rb") as opened:
        head, *leaves = [note for note, _ in split_notes(opened)]
    match tampering:
        case "drop":
            leaves.pop()
        case "swap":
            leaves.reverse()
        case "foreign":
            key = str(verifier_key())  # the collector's is not given
        case "twice":
            leaves.append(leaves[0])
    file.write_bytes(head + b"".join(leaves))
    status, text = verify(run, trails, (file, key))
    assert status == 2
    assert "--since cannot be used" in text


def test_what_is_not_sealed_by_the_key_is_not_collected(
    run: Run, trails: Path, collector: dict[str, str], tmp_path: Path
) -> None:
    (instance,) = folder.instances(trails / "a")
    checkpoints = instance / folder.CHECKPOINTS
    checkpoints.write_bytes(
        checkpoints.read_bytes().replace(b"\n2", b"\n1").replace(b"\n1", b"\n9")
    )
    arguments = ("audit", "collect", str(trails), "--key", str(verifier_key()))
    result = run(*arguments, "--json", **collector)
    assert (result.status, result.document["code"]) == (2, "configuration")
    (tmp_path / "empty").mkdir()
    arguments = ("audit", "collect", str(tmp_path / "empty"), "--key", str(verifier_key()))
    assert run(*arguments, **collector).status == 2


def note_of(instance: str, size: int, root: int, *, origin: str = ORIGIN) -> bytes:
    signer = sealing_signer()
    key = VerifierKey(origin, signer.public_key)
    text = Checkpoint(origin, size, bytes([root]) * 32, (f"instance {instance}",)).text()
    return SignedNote(text, (key.signature(signer.sign(text.encode())),)).encode()


def test_checkpoints_that_contradict_are_told_in_any_order() -> None:
    told = [note_of("a", 5, 1), note_of("a", 7, 2), note_of("a", 5, 3), note_of("b", 5, 3)]
    for order in permutations(told):
        with pytest.raises(AuditError, match="Two checkpoints of a over 5 records contradict"):
            newest(order, [verifier_key()])
    assert newest(told[:2], [verifier_key()]) == [told[1]]


def test_an_instance_has_one_origin() -> None:
    """Or who seals elsewhere could put a checkpoint of his own in the place of the newest."""
    other = VerifierKey("other.example/d1", sealing_signer().public_key)
    told = [note_of("a", 5, 1), note_of("a", 9, 2, origin=other.name)]
    for order in permutations(told):
        with pytest.raises(AuditError, match="a has checkpoints of"):
            newest(order, [verifier_key(), other])
