# SPDX-License-Identifier: Apache-2.0
"""Thousands of signatures with random faults: what comes back is right, or an error of ours."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from d1_signer import errors
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.backends import test_aws
from tests.backends.vault import test_signing as test_vault
from tests.servers import aws, gcp, vault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.fault_proxy import Answer, Fault, Forward, Request

SEED = 20261124

COUNTS = [
    pytest.param(500, id="500"),
    pytest.param(10_000, id="10000", marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
]


def _at_random(faults: list[Fault]) -> Fault:
    """Half of the requests are left alone."""
    source = random.Random(SEED)

    def one(request: Request, forward: Forward) -> Answer:
        if source.random() < 0.5:
            return forward(request)
        return source.choice(faults)(request, forward)

    return one


@pytest.fixture
def aws_signer(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Signer]:
    for name, value in aws.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as endpoint, endpoint.proxy() as proxy:
        uri = f"awskms:///{endpoint.make_key()}?endpoint={proxy.url}"
        # One attempt: boto3's pauses between attempts would only make this slow.
        with open_signer(uri, max_attempts=1) as signer:
            other_key = aws.asking(KeyId=endpoint.make_key())
            faults = [fault for _, fault, *_ in test_aws.FAULTS]
            proxy.fault = aws.on_sign(_at_random([*faults, other_key]))
            yield signer


@pytest.fixture
def gcp_signer() -> Iterator[Signer]:
    with (
        gcp.cloud_kms() as server,
        open_signer(f"gcpkms://{gcp.VERSION}", client=server.client) as signer,
    ):
        server.tell(seed=SEED)
        yield signer


@pytest.fixture
def vault_signer(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Signer]:
    # One attempt, as above.
    monkeypatch.setattr("d1_signer.backends.vault.http._PAUSES", (1000.0,))
    with vault.vault(tmp_path_factory.mktemp("vault")) as server, server.proxy() as proxy:
        server.make_key("d1")
        server.make_key("other")
        with open_signer(
            "hashivault://d1", address=proxy.url, token_source=lambda: vault.ROOT_TOKEN
        ) as signer:
            proxy.fault = vault.on_sign(_at_random([fault for _, fault, *_ in test_vault.FAULTS]))
            yield signer


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("backend", ["aws", "gcp", "vault"])
def test_no_wrong_signature_is_ever_returned(
    backend: str, count: int, request: pytest.FixtureRequest
) -> None:
    signer: Signer = request.getfixturevalue(f"{backend}_signer")
    public = load_pem_public_key(signer.public_key.pem().encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    source, ends = random.Random(SEED), Counter[str]()
    for _ in range(count):
        message = source.randbytes(64)
        try:
            signature = signer.sign(message)
        except errors.D1SignerError as error:
            ends[error.code] += 1
            continue
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        public.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
        ends["signed"] += 1
    assert ends.total() == count
    # The run is worth something: many were signed, many were not, for several reasons.
    assert ends["signed"] > count / 10
    assert ends["invalid_signature"] > count / 20
    assert ends["integrity"] > count / 20
