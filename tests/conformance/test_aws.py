# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on a key in AWS KMS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from d1_signer.testing import SignerConformance
from tests.conformance.interop import PrivateKeyInterop
from tests.servers import aws

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws.Aws]:
    with aws.aws_kms(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def uri(endpoint: aws.Aws) -> str:
    key_id = endpoint.make_key().rpartition("/")[2]
    return f"awskms:///{key_id}?endpoint={endpoint.url}"


class TestAws(PrivateKeyInterop, SignerConformance):
    @pytest.fixture
    def secrets(self) -> tuple[str, ...]:
        return (aws.SECRET_KEY, aws.SESSION_TOKEN)

    @pytest.fixture
    def signer(self, uri: str, monkeypatch: pytest.MonkeyPatch) -> Signer:
        for name, value in aws.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        return open_signer(uri)
