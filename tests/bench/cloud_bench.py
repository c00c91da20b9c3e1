# SPDX-License-Identifier: Apache-2.0
"""Cloud keys: ``sign()`` beside the bare SDK call that does the same checks, in one run.

``python -m tests.bench.cloud_bench [aws|gcp|vault ...]``
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import google_crc32c
import hvac
import requests
import urllib3
from botocore.config import Config
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from google.cloud import kms_v1 as kms

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.servers import aws, gcp, vault

Sign = Callable[[bytes], bytes]

OVERHEAD_BAR = 1.05
THROUGHPUT_BAR = 0.95

_PREHASHED = ec.ECDSA(utils.Prehashed(SHA256()))
_MESSAGE = b"x" * 400  # as long as an assertion's signing input
_BLOCKS, _CALLS = 40, 25
_THREADS, _PAIRS, _EACH = 32, 15, 10


@dataclass(frozen=True)
class Subject:
    name: str
    ours: Sign
    bare: Sign
    peers: dict[str, Sign]


def _raw(der: bytes, digest: bytes, key: ec.EllipticCurvePublicKey) -> bytes:
    r, s = utils.decode_dss_signature(der)
    key.verify(der, digest, _PREHASHED)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _key(signer: Signer) -> ec.EllipticCurvePublicKey:
    key = load_der_public_key(signer.public_key.der())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


@contextmanager
def _aws(directory: Path) -> Iterator[Subject]:
    os.environ.update(aws.ENVIRONMENT)
    with aws.aws_kms(directory) as endpoint:
        arn = endpoint.make_key()
        config = Config(retries={"mode": "standard"}, max_pool_connections=128, tcp_keepalive=True)
        client = boto3.Session().client("kms", endpoint_url=endpoint.url, config=config)
        with open_signer(f"awskms:///{arn}?endpoint={endpoint.url}") as signer:
            key = _key(signer)

            def bare(message: bytes) -> bytes:
                digest = hashlib.sha256(message).digest()
                answer = client.sign(
                    KeyId=arn,
                    Message=digest,
                    MessageType="DIGEST",
                    SigningAlgorithm="ECDSA_SHA_256",
                )
                assert answer["KeyId"] == arn
                assert answer["SigningAlgorithm"] == "ECDSA_SHA_256"
                return _raw(answer["Signature"], digest, key)

            yield Subject("AWS KMS (boto3)", signer.sign, bare, {})


@contextmanager
def _gcp(_directory: Path) -> Iterator[Subject]:
    with gcp.cloud_kms() as server:
        client = server.client()
        with open_signer(f"gcpkms://{gcp.VERSION}", client=server.client) as signer:
            key = _key(signer)

            def bare(message: bytes) -> bytes:
                digest = hashlib.sha256(message).digest()
                request = kms.AsymmetricSignRequest(
                    name=gcp.VERSION,
                    digest=kms.Digest(sha256=digest),
                    digest_crc32c=google_crc32c.value(digest),
                )
                answer = client.asymmetric_sign(request=request, retry=None, timeout=10.0)
                der: bytes = answer.signature
                assert answer.verified_digest_crc32c is True
                assert answer.name == gcp.VERSION
                assert answer.protection_level == kms.ProtectionLevel.HSM
                assert answer.signature_crc32c == google_crc32c.value(der)
                return _raw(der, digest, key)

            yield Subject("Cloud KMS (google-cloud-kms)", signer.sign, bare, {})


@contextmanager
def _vault(directory: Path) -> Iterator[Subject]:
    with vault.vault(directory) as server:
        server.make_key("d1")
        token = vault.ROOT_TOKEN
        pool = urllib3.HTTPConnectionPool("127.0.0.1", server.port, maxsize=128)
        session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=128)
        session.mount("http://", adapter)
        client = hvac.Client(server.url, token=token, session=session)
        path = "/v1/transit/sign/d1/sha2-256"
        headers = {"X-Vault-Token": token, "Content-Type": "application/json"}
        with open_signer(
            "hashivault://d1", address=server.url, token_source=lambda: token
        ) as signer:
            key = _key(signer)

            def asked(digest: bytes) -> dict[str, object]:
                return {
                    "input": base64.b64encode(digest).decode(),
                    "prehashed": True,
                    "marshaling_algorithm": "jws",
                    "key_version": 1,
                }

            def checked(signature: str, digest: bytes) -> bytes:
                prefix, encoded = signature[:9], signature[9:]
                assert prefix == "vault:v1:"
                raw = base64.urlsafe_b64decode(encoded + "==")
                r, s = (int.from_bytes(half, "big") for half in (raw[:32], raw[32:]))
                key.verify(utils.encode_dss_signature(r, s), digest, _PREHASHED)
                return raw

            def bare(message: bytes) -> bytes:
                digest = hashlib.sha256(message).digest()
                body = json.dumps(asked(digest)).encode()
                answer = pool.urlopen("POST", path, body=body, headers=headers, retries=False)
                assert answer.status == 200
                return checked(json.loads(answer.data)["data"]["signature"], digest)

            def with_requests(message: bytes) -> bytes:
                digest = hashlib.sha256(message).digest()
                url, body = server.url + path, asked(digest)
                answer = session.post(url, json=body, headers=headers, timeout=10)
                return checked(answer.json()["data"]["signature"], digest)

            def with_hvac(message: bytes) -> bytes:
                digest = hashlib.sha256(message).digest()
                answer = client.secrets.transit.sign_data(  # type: ignore[no-untyped-call]
                    "d1",
                    hash_input=base64.b64encode(digest).decode(),
                    key_version=1,
                    hash_algorithm="sha2-256",
                    prehashed=True,
                    marshaling_algorithm="jws",
                )
                return checked(answer["data"]["signature"], digest)

            peers: dict[str, Sign] = {"requests": with_requests, "hvac": with_hvac}
            yield Subject("Vault Transit (urllib3)", signer.sign, bare, peers)


def _block(sign: Sign) -> list[float]:
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        sign(_MESSAGE)
        times.append(time.perf_counter() - started)
    return times


def one_thread(signs: dict[str, Sign]) -> dict[str, float]:
    """Median seconds for one call; the blocks take turns, so that all see the same machine."""
    for sign in signs.values():
        _block(sign)
    times: dict[str, list[float]] = {name: [] for name in signs}
    for _ in range(_BLOCKS):
        for name, sign in signs.items():
            times[name] += _block(sign)
    return {name: statistics.median(values) for name, values in times.items()}


def many_threads(sign: Sign) -> float:
    """Signatures a second of 32 threads on one signer or client."""
    barrier = threading.Barrier(_THREADS + 1)
    failures: list[BaseException] = []

    def work() -> None:
        barrier.wait()
        try:
            for _ in range(_EACH):
                sign(_MESSAGE)
        except BaseException as error:  # noqa: BLE001 (counted, and told)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if failures:
        raise failures[0]
    return _THREADS * _EACH / elapsed


def measure(subject: Subject) -> bool:
    medians = one_thread({"ours": subject.ours, "bare": subject.bare, **subject.peers})
    ratio = medians["ours"] / medians["bare"]
    # Pairs, each way round in turn: what else the machine does then meets both alike.
    pairs = []
    for turn in range(_PAIRS):
        first, second = (subject.ours, subject.bare)[:: 1 if turn % 2 else -1]
        rates = many_threads(first), many_threads(second)
        pairs.append(rates if turn % 2 else rates[::-1])
    ours, bare = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    share = statistics.median(one / other for one, other in pairs)
    print(f"{subject.name}")
    for name, seconds in medians.items():
        print(f"  {name:9} {seconds * 1e6:8.0f} us a signature")
    print(f"  ours / bare, one thread        {ratio:.3f}  (bar <= {OVERHEAD_BAR})")
    print(f"  32 threads: ours {ours:.0f}/s, bare {bare:.0f}/s")
    print(f"  ours / bare, 32 threads        {share:.3f}  (bar >= {THROUGHPUT_BAR})")
    return ratio <= OVERHEAD_BAR and share >= THROUGHPUT_BAR


SUBJECTS = {"aws": _aws, "gcp": _gcp, "vault": _vault}


def main(names: list[str]) -> int:
    met = True
    for name in names or list(SUBJECTS):
        with tempfile.TemporaryDirectory() as directory, SUBJECTS[name](Path(directory)) as subject:
            met &= measure(subject)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
