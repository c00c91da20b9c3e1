# SPDX-License-Identifier: Apache-2.0
"""What the failures of google-cloud-kms mean.

The classes are those of ``google.api_core.exceptions``, one for each gRPC status and for each HTTP
status; when Cloud KMS gives which is in its guide "Errors and troubleshooting".
"""

from __future__ import annotations

import grpc
import requests
from google.api_core import exceptions as sdk
from google.auth import exceptions as auth

from d1_signer.backends.remote import Details, Failures, Service
from d1_signer.errors import (
    AccessDeniedError,
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

_ALTERED = "Something between this process and Cloud KMS alters requests or answers."
# In this order: a class before the classes it derives from.
_FAILURES: Failures = (
    ((sdk.NotFound,), KeyNotFoundError, "Check project, location, key ring, key and version."),
    ((sdk.Unauthorized,), LoginError, "Check the application default credentials of this process."),
    (
        (sdk.Forbidden,),
        AccessDeniedError,
        "Grant roles/cloudkms.signerVerifier on the key, and for custody roles/cloudkms.viewer.",
    ),
    ((sdk.TooManyRequests,), SignerThrottled, "Ask for a higher quota, or reuse tokens longer."),
    (
        (sdk.FailedPrecondition,),
        KeyDisabledError,
        "Look at the version's state: disabled, scheduled for destruction, or destroyed.",
    ),
    ((sdk.AlreadyExists,), KeyExistsError, "Choose another key name."),
    (
        (sdk.DeadlineExceeded, sdk.GatewayTimeout),
        SignerTimeout,
        "Check that Cloud KMS can be reached, or allow more time.",
    ),
    (
        (sdk.InvalidArgument, sdk.BadRequest),
        InvalidKeyError,
        "D1 takes ES256 only: use a key for ASYMMETRIC_SIGN with EC_SIGN_P256_SHA256.",
    ),
    (
        (sdk.ServerError, sdk.Aborted, sdk.Cancelled),
        SignerUnavailable,
        "Try again later; see the Google Cloud Service Health page.",
    ),
    ((sdk.GoogleAPICallError,), SignerError, "See the status in the Cloud KMS reference."),
    (
        (auth.TransportError,),
        SignerUnavailable,
        "Check that the server of the credentials is reached.",
    ),
    (
        (auth.GoogleAuthError,),
        LoginError,
        "Check the application default credentials of this process.",
    ),
    # Of the REST transport, whose own limit and ours may run out at the same moment.
    ((requests.Timeout,), SignerTimeout, "Check the network and the endpoint."),
    (
        (sdk.RetryError, grpc.RpcError, OSError),
        SignerUnavailable,
        "Check the network and the endpoint.",
    ),
    # A closed channel; and what the SDK says of settings that do not fit each other.
    ((ValueError,), SignerError, "Check the client's settings, and that it is not closed."),
)


def _refused(error: Exception, doing: str) -> D1SignerError | None:
    if not isinstance(error, sdk.GoogleAPICallError):
        return None
    details: Details = {"sdk_error": type(error).__name__}
    if error.grpc_status_code is not None:
        details["grpc_status"] = error.grpc_status_code.name
    elif error.code is not None:
        details["status"] = int(error.code)
    if error.reason:
        details["reason"] = str(error.reason)
    message = str(error.message or "")
    if "metadata from plugin failed" in message:
        # How gRPC reports that no access token could be had; the text may quote the exchange.
        return LoginError(
            f"Cloud KMS could not be asked {doing}: no access token.",
            hint="Check the application default credentials, and that their server is reached.",
            retryable=True,
            details=details,
        )
    # A request whose checksum does not fit is refused as well; with which status is not documented
    # ("will report an error"), so the text has to tell.
    altered = "crc32c" in message.lower()
    meaning = (IntegrityError, _ALTERED) if altered else CLOUD_KMS.meaning(error)
    code = details.get("grpc_status") or details.get("status") or details["sdk_error"]
    return CLOUD_KMS.refusal(doing, code, message, meaning, details)


CLOUD_KMS = Service(
    name="Cloud KMS",
    packages="google-cloud-kms and grpcio",
    altered_hint=_ALTERED,
    failures=_FAILURES,
    refused=_refused,
)
