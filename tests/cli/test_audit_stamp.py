# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit stamp` against `openssl ts` as the authority and as the verifier."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from d1_signer.audit import folder, stamp
from d1_signer.audit.trail import AuditTrail
from d1_signer.errors import AuditError
from tests.audit.trails import ORIGIN, sealing_signer, watched_signer
from tests.cli.conftest import Run
from tests.servers.process import closed_port
from tests.servers.tsa import Tsa, tsa

PAGE = Path(__file__).parents[2] / "docs" / "audit" / "README.md"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tsa]:
    with tsa(tmp_path_factory.mktemp("tsa") / "tsa") as running:
        yield running


@pytest.fixture
def authority(shared: Tsa) -> Tsa:
    shared.status = 200
    shared.answer = lambda response: response
    return shared


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    place = tmp_path / "trail"
    with (
        AuditTrail(place, origin=ORIGIN, checkpoint_signer=sealing_signer()) as trail,
        watched_signer(trail) as signer,
    ):
        signer.sign(b"x")
    (instance,) = folder.instances(place)
    shutil.copy(instance / folder.CHECKPOINTS, tmp_path / "collection")
    return tmp_path / "collection"


def arguments(checkpoints: Path, authority: Tsa, *further: str) -> tuple[str, ...]:
    return ("audit", "stamp", str(checkpoints), "--ca-file", str(authority.ca_file), *further)


def asked(run: Run, checkpoints: Path, authority: Tsa) -> tuple[int, str, Path]:
    file = checkpoints.with_suffix(".tsr")
    result = run(*arguments(checkpoints, authority, "--tsa", authority.url, "-o", str(file)))
    return result.status, result.out + result.err, file


def openssl_as_printed(folder: Path, authority: Tsa) -> str:
    (block,) = re.findall(
        r"^```sh\n(openssl ts .*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    shutil.copy(authority.ca_file, folder / "tsa-root.pem")
    done = subprocess.run(
        ["bash", "-c", block], cwd=folder, capture_output=True, text=True, check=False, timeout=30
    )
    return f"{done.returncode} {done.stdout}"


def test_a_stamp_is_got_and_openssl_verifies_it(
    run: Run, checkpoints: Path, authority: Tsa, tmp_path: Path
) -> None:
    status, text, file = asked(run, checkpoints, authority)
    assert status == 0, text
    assert "CN=tsa" in text
    assert openssl_as_printed(tmp_path, authority).startswith("0 Verification: OK")
    kept = run(*arguments(checkpoints, authority, "--stamp", str(file), "--json"))
    assert (kept.status, kept.document["authority"]) == (0, "CN=tsa")
    checkpoints.write_bytes(checkpoints.read_bytes() * 2)
    later = run(*arguments(checkpoints, authority, "--stamp", str(file), "--json"))
    assert later.status == 1
    assert "hash does not fit" in later.document["message"]
    assert not openssl_as_printed(tmp_path, authority).startswith("0")


def test_an_authority_with_rsa(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    with tsa(tmp_path / "rsa", key="rsa") as authority:
        status, text, _ = asked(run, checkpoints, authority)
        assert status == 0, text


@pytest.mark.parametrize(
    "usage", ["timeStamping", "critical, timeStamping, serverAuth", "critical, clientAuth"]
)
def test_another_extended_key_usage_is_refused(tmp_path: Path, usage: str) -> None:
    """Openssl signs with none of these itself: the certificate is put into a reply that holds."""
    with tsa(tmp_path / "other", usage=usage) as other:
        try:
            other.reply(stamp.request(b"x", 1))
        except subprocess.CalledProcessError:
            chain = (tmp_path / "other" / "tsa.pem").read_bytes()
        else:
            pytest.fail("openssl signs with it: ask it as an authority here")
        certificate = x509.load_pem_x509_certificate(chain)
        middle = x509.load_pem_x509_certificate((tmp_path / "other" / "middle.pem").read_bytes())
        with pytest.raises(AuditError, match="not trusted"):
            stamp._require_chain(
                certificate,
                [middle],
                other.ca_file.read_bytes(),
                certificate.not_valid_before_utc,
            )


def test_a_chain_to_nobody_known_is_refused(
    run: Run, checkpoints: Path, authority: Tsa, tmp_path: Path
) -> None:
    with tsa(tmp_path / "other") as other:
        file = str(tmp_path / "x.tsr")
        asking = ("--tsa", authority.url, "-o", file)
        result = run(*arguments(checkpoints, other, *asking))
    assert result.status == 1
    assert "not trusted" in result.err
    assert not Path(file).exists()


def test_another_requests_answer_is_refused(authority: Tsa) -> None:
    reply = authority.reply(stamp.request(b"x", 7))
    authorities = authority.ca_file.read_bytes()
    assert stamp.verify(reply, b"x", authorities, nonce=7).authority == "CN=tsa"
    with pytest.raises(AuditError, match="nonce"):
        stamp.verify(reply, b"x", authorities, nonce=8)
    with pytest.raises(AuditError, match="hash"):
        stamp.verify(reply, b"y", authorities)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # of an altered certificate
def test_no_altered_byte_passes_unseen(authority: Tsa) -> None:
    reply = authority.reply(stamp.request(b"x", 7))
    authorities = authority.ca_file.read_bytes()
    told = stamp.verify(reply, b"x", authorities, nonce=7)
    refused = 0
    for place in range(0, len(reply), 3):
        altered = bytearray(reply)
        altered[place] ^= 0x55
        try:
            found = stamp.verify(bytes(altered), b"x", authorities, nonce=7)
        except AuditError:
            refused += 1
        else:
            assert found == told  # a byte that says nothing, such as of a certificate not needed
    assert refused > len(reply) // 3 * 0.6
    for length in range(0, len(reply), 50):
        with pytest.raises(AuditError):
            stamp.verify(reply[:length], b"x", authorities, nonce=7)


def test_a_refusal_is_told(run: Run, checkpoints: Path, authority: Tsa) -> None:
    refusal = b"\x30\x13\x30\x11\x02\x01\x02\x30\x0c\x0c\x0ano account"  # DER, status 2
    authority.answer = lambda _: refusal
    status, text, _ = asked(run, checkpoints, authority)
    assert status == 1
    assert "no account" in text


def test_what_is_no_answer(run: Run, checkpoints: Path, authority: Tsa) -> None:
    for answer in (b"", b"<html>", secrets.token_bytes(1000), b"x" * (1 << 21)):
        authority.answer = lambda _, answer=answer: answer  # type: ignore[misc]
        assert asked(run, checkpoints, authority)[0] == 1
    authority.answer = lambda response: response
    authority.status = 503
    status, text, _ = asked(run, checkpoints, authority)
    assert (status, "HTTP 503" in text, "later may help" in text) == (1, True, True)
    authority.status = 404
    assert "HTTP 404" in asked(run, checkpoints, authority)[1]


def test_nobody_there_and_wrong_places(run: Run, checkpoints: Path, authority: Tsa) -> None:
    asking = ("-o", str(checkpoints.with_suffix(".tsr")), "--json")
    with closed_port() as port:
        gone = f"http://127.0.0.1:{port}"
        result = run(*arguments(checkpoints, authority, "--tsa", gone, *asking))
    assert (result.status, result.document["retryable"]) == (1, True)
    plain = run(*arguments(checkpoints, authority, "--tsa", "http://tsa.example/", *asking))
    assert (plain.status, plain.document["code"]) == (2, "configuration")
    assert run(*arguments(checkpoints, authority)).status == 2
    no_notes = arguments(authority.ca_file, authority, "--tsa", gone, *asking)
    assert run(*no_notes).status == 2
