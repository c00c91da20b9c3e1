# SPDX-License-Identifier: Apache-2.0
"""Forks while threads sign, on each service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import aws, gcp, vault

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stress


def _forks(count: int, *arguments: str, **environment: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.backends.forking", str(count), *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_aws(tmp_path: Path) -> None:
    with aws.aws_kms(tmp_path) as endpoint:
        uri = f"awskms:///{endpoint.make_key()}?endpoint={endpoint.url}"
        _forks(20, uri, **aws.ENVIRONMENT)


def test_gcp() -> None:
    with gcp.cloud_kms() as server:
        _forks(100, f"gcpkms://{gcp.VERSION}", str(server.port))


def test_vault(tmp_path: Path) -> None:
    with vault.vault(tmp_path) as server:
        server.make_key("d1")
        settings = {"VAULT_ADDR": server.tls_url, "VAULT_CACERT": str(server.ca_file)}
        _forks(100, "hashivault://d1", VAULT_TOKEN=server.make_token(), **settings)
