# SPDX-License-Identifier: Apache-2.0
"""What `SignerPrivateKey` takes for data; what it signs is tested with every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer import generate_key, open_signer
from d1_signer.errors import InvalidInputError

ALGORITHMS = [ec.ECDSA(SHA256()), ec.ECDSA(utils.Prehashed(SHA256()))]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("keys") / "key.pem"
    return generate_key(path.as_uri()).uri


# bytes() takes each of these: as a length, or as the numbers of an iterable.
@pytest.mark.parametrize("data", [5, 32, True, "text", None, [0] * 32, range(32)], ids=repr)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["message", "digest"])
def test_what_is_not_bytes_is_not_signed(uri: str, data: Any, algorithm: ec.ECDSA) -> None:
    with open_signer(uri) as signer, pytest.raises(InvalidInputError):
        signer.as_private_key().sign(data, algorithm)


@pytest.mark.parametrize(
    "data", [b"message", bytearray(b"message"), memoryview(b"m-e-s-s-a-g-e")[::2]]
)
def test_bytes_of_any_kind_are_signed(uri: str, data: bytes | bytearray | memoryview) -> None:
    with open_signer(uri) as signer:
        key = signer.as_private_key()
        signature = key.sign(data, ec.ECDSA(SHA256()))
        key.public_key().verify(signature, bytes(data), ec.ECDSA(SHA256()))
