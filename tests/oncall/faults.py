# SPDX-License-Identifier: Apache-2.0
"""The twelve faults: how each is planted from outside, and what must be shown of it."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer.sandbox import Sandbox
from tests.leaks.known import known
from tests.oncall.seen import Seen
from tests.oncall.site import ISSUER, KID, Needs, Site

OTHER_PIN = known("pin-that-the-officer-set")
OTHER_KID = "nordbank-2062"
OTHER_ISSUER = "nordbank-crads"
OTHER_PASSWORD = known("second-password-of-the-proxy")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of them.

    Attributes:
        plant: Makes it happen.
        needs: What the service uses.
        event: Of the line that names it.
        told: Words of that line and of the status: the cause, and the next step.
        facts: Other words of the line.
        before: Words of a line that came before it.
        code: Of the renewals that fail; None where none does.
        member: Last error of the signer, where it is the signer that fails.
        store: State of the store, where it is about that.
        series: What stands in one line of the metrics each.
    """

    plant: Callable[[Site], object]
    needs: Needs = field(default_factory=Needs)
    event: str = "token.failed"
    told: tuple[str, ...]
    facts: tuple[str, ...]
    before: tuple[str, ...] = ()
    code: str | None = None
    member: str | None = None
    store: str = "none"
    series: tuple[str, ...]

    def missing(self, seen: Seen) -> list[str]:
        """What of it is not shown."""
        code = () if self.code is None else (f"code={self.code}",)
        lines = (*code, *self.told, *self.facts)
        missing = [] if _together(lines, seen.lines(self.event)) else [f"a line with {lines}"]
        if self.before and not _together(self.before, seen.log.splitlines()):
            missing.append(f"a line with {self.before}")
        if not any(self._is_told_by(status) for status in seen.status.values()):
            missing.append("a status with it")
        return missing + [one for one in self.series if one not in seen.metrics]

    def _is_told_by(self, status: dict[str, Any]) -> bool:
        failure = status["last_failure"] or dict.fromkeys(("code", "message", "hint"), "")
        text = f"{failure['message']} {failure['hint']} {status['store_error']}"
        return (
            failure["code"] == (self.code or "")
            and all(words in text for words in self.told)
            and status["store"] == self.store
            and status["members"][0]["last_error"] == self.member
        )


def _together(words: tuple[str, ...], lines: list[str]) -> bool:
    return any(all(word in line for word in words) for line in lines)


def _renewals(code: str) -> str:
    return (
        "d1_signer_token_renewal_duration_seconds_count{"
        f'd1_signer_shared="False",d1_signer_store="none",error_type="{code}"'
    )


def _signatures(code: str) -> str:
    return f'd1_signer_kid="{KID}",error_type="{code}"'


def _own(host: str, store: str) -> str:
    """Tokens that a host has fetched for itself."""
    return (
        "d1_signer_token_renewal_duration_seconds_count{"
        f'd1_signer_shared="False",d1_signer_store="{store}",host_name="{host}"}}'
    )


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
        site.change(host, key=f"{key}#{OTHER_KID}")


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
        site.change(host, issuer_id=OTHER_ISSUER)
        site.start(host)


FAULTS: Mapping[str, Fault] = {
    "expired certificate": Fault(
        plant=_expire,
        code="tls",
        told=("The client certificate expired on ", "have Thales sign a new certificate"),
        facts=("kid=", "correlation_id="),
        series=(
            _renewals("tls"),
            'client_certificate_remaining_life_seconds{host_name="issuer-1"} 0',
        ),
    ),
    "wrong kid": Fault(
        plant=_wrong_kid,
        code="token_refused",
        told=(
            "'invalid_grant' 'The kid of the assertion is unknown'",
            "Check the issuer id, the kid",
        ),
        facts=(f"kid={OTHER_KID}", f"issuer={ISSUER}", "status=400", "correlation_id="),
        before=("settings.taken ", "changed=key"),
        series=(_renewals("token_refused"), 'http_response_status_code="400"'),
    ),
    "clock off": Fault(
        plant=_clock,
        code="token_refused",
        told=("look at its time service", "seconds behind D1's, as the Date"),
        facts=("clock_offset=3", "correlation_id="),
        series=(_renewals("token_refused"), 'http_response_status_code="400"'),
    ),
    "HSM away": Fault(
        plant=lambda site: site.hsm.kill(),
        code="signer_unavailable",
        told=("The PKCS#11 token does not work (CKR_", "Check the HSM, its connection"),
        facts=('token="pkcs11:token=nordbank"', f"kid={KID}"),
        before=("pkcs11.away token=pkcs11:token=nordbank", "CKR_"),
        series=(_renewals("signer_unavailable"), _signatures("signer_unavailable")),
        member="signer_unavailable",
    ),
    "HSM hangs": Fault(
        plant=lambda site: site.hsm.signal(signal.SIGSTOP),
        code="signer_timeout",
        told=("The HSM gave no answer within the deadline", "Check the HSM and its connection"),
        facts=("busy_sessions=1", 'token="pkcs11:token=nordbank"', f"kid={KID}"),
        series=(_renewals("signer_timeout"), _signatures("signer_timeout")),
        member="signer_timeout",
    ),
    "PIN changed": Fault(
        plant=_change_pin,
        code="login",
        told=("PIN", "the PIN at its source"),
        facts=("CKR_PIN_INCORRECT", 'token="pkcs11:token=nordbank"', f"kid={KID}"),
        before=("pkcs11.pin_refused_after_it_worked token='nordbank'", "probably changed"),
        series=(_renewals("login"), _signatures("login")),
        member="login",
    ),
    "D1 answers 503": Fault(
        plant=lambda site: site.d1.misbehave("status-503"),
        code="token_unavailable",
        told=("D1 cannot give a token now (HTTP 503)", "ask Thales with the correlation id "),
        facts=("status=503", "correlation_id=", "host="),
        series=(_renewals("token_unavailable"), 'http_response_status_code="503"'),
    ),
    "proxy answers 407": Fault(
        plant=_change_password,
        needs=Needs(proxy=True),
        code="token_unavailable",
        told=("it answers HTTP 407, it refuses the credentials", "(proxy_credentials_source)"),
        facts=("proxy=127.0.0.1:", "status=407"),
        series=(_renewals("token_unavailable"),),
    ),
    "Redis hung": Fault(
        plant=lambda site: site.redis.freeze(),
        needs=Needs(hosts=2, store=True),
        event="fleet.store_unavailable",
        told=("The token store 127.0.0.1:", "does not answer", "Look at Redis"),
        facts=("host=", f"issuer={ISSUER}"),
        store="away",
        series=(_own("issuer-1", "away"), _own("issuer-2", "away")),
    ),
    "wrong store key": Fault(
        plant=_other_store_key,
        needs=Needs(hosts=2, store=True),
        event="fleet.token_unreadable",
        told=("was not sealed with this store_key", "Give all of the fleet the same store_key"),
        facts=("host=", f"issuer={ISSUER}"),
        store="unreadable",
        series=(_own("issuer-2", "unreadable"),),
    ),
    "key disabled": Fault(
        plant=_disable_key,
        needs=Needs(kms=True),
        code="key_disabled",
        told=("AWS KMS refused to sign: DisabledException", "Find out who disabled it"),
        facts=("endpoint=http", "request_id=", f"kid={KID}"),
        series=(_renewals("key_disabled"), _signatures("key_disabled")),
        member="key_disabled",
    ),
    "wrong issuer id": Fault(
        plant=_wrong_issuer,
        code="token_refused",
        told=("'invalid_grant' 'The iss is not a known issuer'", "Check the issuer id, the kid"),
        facts=(f"issuer={OTHER_ISSUER}", f"kid={KID}", "correlation_id="),
        series=(_renewals("token_refused"), 'http_response_status_code="400"'),
    ),
}
