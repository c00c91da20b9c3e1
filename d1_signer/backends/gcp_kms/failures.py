# SPDX-License-Identifier: Apache-2.0
"""What the failures of google-cloud-kms mean.

The classes are those of ``google.api_core.exceptions``, one for each gRPC status and for each HTTP
status; when Cloud KMS gives which is in its guide "Errors and troubleshooting".
"""

from __future__ import annotations

import re
import threading

import grpc
import requests
from google.api_core import exceptions as sdk
from google.auth import exceptions as auth

from d1_signer.backends.remote import Details, Failures, Meaning, Service
from d1_signer.errors import (
    AccessDeniedError,
    ConfigurationError,
    D1SignerError,
    IntegrityError,
    InvalidKeyError,
    KeyDisabledError,
    KeyExistsError,
    KeyNotFoundError,
    LoginError,
    SignerError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.transport.foreign import quoted
from d1_signer.transport.proxies import may_pass


class _ThisCall(threading.local):
    """The call of this thread.

    Attributes:
        sent: The secrets that its request holds.
        proxy: URL of the proxy that it goes through, or None.
    """

    sent: tuple[str, ...] = ()
    proxy: str | None = None


this_call = _ThisCall()

_ALTERED = "Something between this process and Cloud KMS alters requests or answers."
_CREDENTIALS = "Check the application default credentials of this process."
_KIND = "D1 takes ES256 only: use a key for ASYMMETRIC_SIGN with EC_SIGN_P256_SHA256."
_LATER = "Try again later; see the Google Cloud Service Health page."
_NETWORK = "Check the network and the endpoint."

# What Cloud KMS answers, by its status: the error, and what to do. Whether a retry helps is the
# error's own.
STATUSES: dict[str, Meaning] = {
    "NOT_FOUND": (KeyNotFoundError, "Check project, location, key ring, key and version."),
    "UNAUTHENTICATED": (LoginError, _CREDENTIALS),
    "PERMISSION_DENIED": (
        AccessDeniedError,
        "Grant roles/cloudkms.signerVerifier on the key, and for custody roles/cloudkms.viewer.",
    ),
    "RESOURCE_EXHAUSTED": (SignerThrottled, "Ask for a higher quota, or reuse tokens longer."),
    "FAILED_PRECONDITION": (KeyDisabledError, "Look at the version's state in Cloud KMS."),
    "ALREADY_EXISTS": (KeyExistsError, "Choose another key name."),
    "DEADLINE_EXCEEDED": (SignerTimeout, "Check that Cloud KMS is reached, or allow more time."),
    "INVALID_ARGUMENT": (InvalidKeyError, _KIND),
    "OUT_OF_RANGE": (InvalidKeyError, _KIND),
    "UNIMPLEMENTED": (
        ConfigurationError,
        "Check the endpoint: what answers there is not Cloud KMS, or is not all of it.",
    ),
    "UNAVAILABLE": (SignerUnavailable, _LATER),
    "INTERNAL": (SignerUnavailable, _LATER),
    "UNKNOWN": (SignerUnavailable, _LATER),
    "DATA_LOSS": (SignerUnavailable, _LATER),
    "ABORTED": (SignerUnavailable, _LATER),
    "CANCELLED": (SignerUnavailable, _LATER),
}

# Why permission is denied, where Google says (google.rpc.ErrorInfo).
REASONS = {
    "SERVICE_DISABLED": "Enable the Cloud KMS API in the project.",
    "BILLING_DISABLED": "Enable billing in the project.",
    "CONSUMER_INVALID": "Check the project, and the quota project of the credentials.",
    "USER_PROJECT_DENIED": "Grant roles/serviceusage.serviceUsageConsumer on the quota project.",
    "ACCESS_TOKEN_SCOPE_INSUFFICIENT": "Let the instance have the scope cloudkms.",
    "SECURITY_POLICY_VIOLATED": "VPC Service Controls refuse it: look at the perimeter.",
}

# The states of a version: what to do, and whether it passes.
STATES: dict[str, tuple[str, bool]] = {
    "PENDING_GENERATION": ("The version is being made: try again in a moment.", True),
    "PENDING_IMPORT": ("Import the key material, or use a version that Cloud KMS made.", False),
    "GENERATION_FAILED": ("Make another version: this one could not be made.", False),
    "IMPORT_FAILED": ("Import the key material again, or make another version.", False),
    "DISABLED": ("Enable the version in Cloud KMS.", False),
    "DESTROY_SCHEDULED": ("Restore the version in Cloud KMS, and enable it.", False),
    "DESTROYED": ("Use another version: this one is destroyed.", False),
    "PENDING_EXTERNAL_DESTRUCTION": ("Use another version: this one is destroyed.", False),
    "EXTERNAL_DESTRUCTION_FAILED": ("Use another version: this one is destroyed.", False),
}
_STATE = re.compile(rf"\b({'|'.join(sorted(STATES, key=len, reverse=True))})\b")

# In this order: a class before the classes it derives from.
_FAILURES: Failures = (
    # Of the REST transport, by HTTP status.
    ((sdk.NotFound,), *STATUSES["NOT_FOUND"]),
    ((sdk.Unauthorized,), *STATUSES["UNAUTHENTICATED"]),
    ((sdk.Forbidden,), *STATUSES["PERMISSION_DENIED"]),
    ((sdk.TooManyRequests,), *STATUSES["RESOURCE_EXHAUSTED"]),
    ((sdk.FailedPrecondition,), *STATUSES["FAILED_PRECONDITION"]),
    ((sdk.Conflict,), *STATUSES["ALREADY_EXISTS"]),
    ((sdk.GatewayTimeout,), *STATUSES["DEADLINE_EXCEEDED"]),
    ((sdk.BadRequest,), *STATUSES["INVALID_ARGUMENT"]),
    ((sdk.MethodNotImplemented,), *STATUSES["UNIMPLEMENTED"]),
    ((sdk.ServerError, sdk.Cancelled), *STATUSES["UNAVAILABLE"]),
    ((sdk.GoogleAPICallError,), SignerError, "See the status in the Cloud KMS reference."),
    # Of a client that was given, and its credentials.
    ((auth.TransportError,), SignerUnavailable, "Check that the server of tokens is reached."),
    ((auth.GoogleAuthError,), LoginError, _CREDENTIALS),
    # Of the REST transport, whose own limit and ours may run out at the same moment.
    ((requests.Timeout,), SignerTimeout, _NETWORK),
    ((sdk.RetryError, grpc.RpcError, OSError), SignerUnavailable, _NETWORK),
    # A closed channel; and what the SDK says of settings that do not fit each other.
    ((ValueError,), SignerError, "Check the client's settings, and that it is not closed."),
)

# What gRPC itself says where a call does not come to a server of Cloud KMS.
_NOT_REACHED = re.compile(
    r"failed to connect|resolving|lookup failed|DNS resolution failed|Connection reset|"
    r"Socket closed|handshake|certificate|ping timeout|proxy|Endpoint read failed|recvmsg|sendmsg",
    re.IGNORECASE,
)
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|Hostname Verification|Peer name", re.IGNORECASE)
_PROXY_SAYS = re.compile(r"proxy returned response code (\d{3})", re.IGNORECASE)


def _refused(error: Exception, doing: str) -> D1SignerError | None:
    if not isinstance(error, sdk.GoogleAPICallError):
        return None
    details = _details(error)
    message = str(error.message or "")
    if "metadata from plugin failed" in message:
        # How gRPC reports that no access token could be had; the text may quote the exchange.
        return LoginError(
            f"Cloud KMS could not be asked {doing}: no access token.",
            hint="Check the application default credentials, and that their server is reached.",
            retryable=True,
            details=details,
        )
    status = str(details.get("grpc_status") or details.get("status") or details["sdk_error"])
    told = f" {quoted(message, this_call.sent)}" if message else ""
    if status == "UNAVAILABLE" and _NOT_REACHED.search(message):
        return _not_reached(message, told, doing, details)
    kind, hint = STATUSES.get(status) or CLOUD_KMS.meaning(error)
    retryable = None
    # A request whose checksum does not fit is refused as well; with which status is not documented
    # ("will report an error"), so the text has to tell.
    if "crc32c" in message.lower():
        kind, hint = IntegrityError, _ALTERED
    elif kind is KeyDisabledError and (found := _STATE.search(message)):
        hint, retryable = STATES[found[1]]
    elif kind is AccessDeniedError:
        hint = REASONS.get(str(details.get("reason")), hint)
    return kind(
        f"Cloud KMS refused {doing}: {status}{told}.",
        hint=hint,
        retryable=retryable,
        details=details,
    )


def _details(error: sdk.GoogleAPICallError) -> Details:
    details: Details = {"sdk_error": type(error).__name__}
    if error.grpc_status_code is not None:
        details["grpc_status"] = error.grpc_status_code.name
    elif error.code is not None:
        details["status"] = int(error.code)
    if error.reason:
        details["reason"] = _plain(str(error.reason))
    for detail in error.details:
        if request_id := getattr(detail, "request_id", ""):  # google.rpc.RequestInfo
            details["request_id"] = _plain(str(request_id))
    return details


def _plain(text: str) -> str:
    shown = quoted(text, this_call.sent)
    return text if shown[1:-1] == text else shown


def _not_reached(message: str, told: str, doing: str, details: Details) -> D1SignerError:
    hint, retryable, via = _NETWORK, True, ""
    if this_call.proxy:
        via = f" through the proxy {this_call.proxy}"
        hint = "Look at the proxy: whether it runs, what it logs of this, and whom it admits."
        if code := _PROXY_SAYS.search(message):
            details["proxy_status"] = int(code[1])
            retryable = may_pass(int(code[1]))
    if _UNTRUSTED.search(message):
        hint = "Name the file with the authority as ca_file, and check the host name."
        retryable = False
    return SignerUnavailable(
        f"Cloud KMS could not be asked {doing}{via}:{told or ' no connection'}.",
        hint=hint,
        retryable=retryable,
        details=details,
    )


CLOUD_KMS = Service(
    name="Cloud KMS",
    packages="google-cloud-kms and grpcio",
    altered_hint=_ALTERED,
    failures=_FAILURES,
    refused=_refused,
)
