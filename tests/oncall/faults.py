# SPDX-License-Identifier: Apache-2.0
"""The twelve faults: how each is planted from outside, and what must be shown of it."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer.sandbox import Sandbox
from tests.leaks.known import known
from tests.oncall.site import Needs, Site

OTHER_PIN = known("pin-that-the-officer-set")
OTHER_PASSWORD = known("second-password-of-the-proxy")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of them.

    Attributes:
        plant: Makes it happen.
        needs: What the service uses.
        event: Of the line that names it.
        once: Whether that line is written once.
        line: Words of that line: cause, and next step.
        failure: ``last_failure`` of the status: its code, and words of message and hint.
        status: Other members of the status.
        series: Of the metrics: a name, and labels.
        host: Who shows it.
    """

    plant: Callable[[Site], object]
    needs: Needs = Needs()
    event: str = "token.failed"
    once: bool = False
    line: tuple[str, ...]
    failure: tuple[str, ...] = ()
    status: Mapping[str, object]
    series: tuple[str, ...]
    host: str = "issuer-1"

    def told_at_least(self, lines: int) -> int:
        """How many lines of its event are waited for where so many are wanted."""
        return 1 if self.once else lines


def _expire(site: Site) -> None:
    end = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
    for host in site.hosts:
        _reissue(site.d1, site.etc(host) / "client.pem", end)


def _reissue(d1: Sandbox, file: Path, end: dt.datetime) -> None:
    """Put a certificate in the place of another, of the same key, which ends at a moment."""
    old = x509.load_pem_x509_certificate(file.read_bytes())
    builder = (
        x509.CertificateBuilder()
        .issuer_name(old.issuer)
        .subject_name(old.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(end)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    folder: Any = d1._folder()
    certificate = builder.sign(folder._authority._key, SHA256())
    fresh = file.with_suffix(".new")
    fresh.write_bytes(certificate.public_bytes(Encoding.PEM))
    fresh.replace(file)


def _wrong_kid(site: Site) -> None:
    for host in site.hosts:
        key = site.settings[host]["key"].partition("#")[0]
        site.change(host, key=f"{key}#nordbank-2062")


def _clock(site: Site) -> None:
    site.ahead = 3600.0


def _change_pin(site: Site) -> None:
    site.hsm.kill()
    pins = ["--pin", site.token.pin, "--new-pin", OTHER_PIN]
    module = ["--module", site.token.module_path, "--token-label", site.token.label]
    subprocess.run(
        ["pkcs11-tool", *module, "--login", *pins, "--change-pin"],
        env={**os.environ, "SOFTHSM2_CONF": str(site.token.configuration)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    site.hsm.start()


def _change_password(site: Site) -> None:
    site.proxy.credentials = f"d1-egress:{OTHER_PASSWORD}"


def _other_store_key(site: Site) -> None:
    site.write_secret("issuer-2", "store-key", os.urandom(32).hex())
    site.start("issuer-2")


def _disable_key(site: Site) -> None:
    client = site.aws.client()
    client.disable_key(KeyId=site.key_id)
    client.close()


def _wrong_issuer(site: Site) -> None:
    for host in site.hosts:
        site.change(host, issuer_id="nordbank-crads")
        site.start(host)


FAULTS: Mapping[str, Fault] = {
    "expired certificate": Fault(
        plant=_expire,
        line=(),
        status={},
        series=(),
    ),
    "wrong kid": Fault(plant=_wrong_kid, line=(), status={}, series=()),
    "clock off": Fault(plant=_clock, line=(), status={}, series=()),
    "HSM away": Fault(plant=lambda site: site.hsm.kill(), line=(), status={}, series=()),
    "HSM hangs": Fault(
        plant=lambda site: site.hsm.signal(signal.SIGSTOP), line=(), status={}, series=()
    ),
    "PIN changed": Fault(plant=_change_pin, line=(), status={}, series=()),
    "D1 answers 503": Fault(
        plant=lambda site: site.d1.misbehave("status-503"), line=(), status={}, series=()
    ),
    "proxy answers 407": Fault(
        plant=_change_password, needs=Needs(proxy=True), line=(), status={}, series=()
    ),
    "Redis hung": Fault(
        plant=lambda site: site.redis.freeze(),
        needs=Needs(hosts=2, store=True),
        line=(),
        event="fleet.store_unavailable",
        status={},
        series=(),
    ),
    "wrong store key": Fault(
        plant=_other_store_key,
        needs=Needs(hosts=2, store=True),
        event="fleet.token_unreadable",
        host="",
        once=True,
        line=(),
        status={},
        series=(),
    ),
    "key disabled": Fault(
        plant=_disable_key, needs=Needs(kms=True), line=(), status={}, series=()
    ),
    "wrong issuer id": Fault(plant=_wrong_issuer, line=(), status={}, series=()),
}
