# SPDX-License-Identifier: Apache-2.0
"""Whoever is called at night gets log, metrics and status: each names the cause and what to do.

The same twelve as transcripts for people to read: ``python -m tests.oncall``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from d1_signer import Limits
from tests.oncall.faults import FAULTS
from tests.oncall.site import Pace, Prepared, Site

pytestmark = pytest.mark.stress

PACE = Pace(
    life=1.5,
    calls=0.1,
    healthy=1,
    retry=0.25,
    limits=Limits(total=2.0, sign=0.5, connect=1.0, read=1.0),
)


@pytest.mark.parametrize("name", FAULTS)
def test_cause_and_next_step_are_named(name: str, tmp_path: Path, prepared: Prepared) -> None:
    fault = FAULTS[name]
    with Site(tmp_path, prepared, fault.needs, PACE) as site:
        assert fault.missing(site.healthy())
        fault.plant(site)
        shown = str(site.until(fault.missing))
        assert not [secret for secret in site.secrets() if secret in shown]
