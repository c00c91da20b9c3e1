# SPDX-License-Identifier: Apache-2.0
"""What the failures of google-cloud-kms mean.

The classes are those of ``google.api_core.exceptions``, one for each gRPC status and for each HTTP
status; when Cloud KMS gives which is in its guide "Errors and troubleshooting".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import grpc
import requests
from google.api_core import exceptions as sdk
from google.auth import exceptions as auth

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

P = ParamSpec("P")
R = TypeVar("R")

ALTERED = "Something between this process and Cloud KMS alters requests or answers."
_LONGEST = 400

_LATER = (SignerUnavailable, "Try again later; see the Google Cloud Service Health page.")

# In this order: a class before the classes it derives from.
_CALL_ERRORS: tuple[tuple[tuple[type[Exception], ...], type[D1SignerError], str], ...] = (
    ((sdk.NotFound,), KeyNotFoundError, "Check project, location, key ring, key and version."),
    (
        (sdk.Unauthorized,),
        LoginError,
        "Check the application default credentials of this process.",
    ),
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
    ((sdk.ServerError, sdk.Aborted, sdk.Cancelled, sdk.RetryError), *_LATER),
)


def ask(doing: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call the SDK and translate its failure.

    The SDK's exception is left behind altogether, also as a context: it may carry the call's
    metadata with its access token.

    Args:
        doing: What is asked for, such as ``"to sign"``.
        function: The SDK's function.
        *args: Its arguments.
        **kwargs: Its arguments.
    """
    try:
        return function(*args, **kwargs)
    except D1SignerError as error:
        failure = error.with_traceback(None)
    except sdk.GoogleAPICallError as error:
        failure = _refused(error, doing)
    except Exception as error:  # noqa: BLE001 (nothing of an SDK may get out)
        failure = _failed(error, doing)
    failure.__context__ = None
    raise failure


def _refused(error: sdk.GoogleAPICallError, doing: str) -> D1SignerError:
    status = error.grpc_status_code
    details: dict[str, str | int | float] = {"sdk_error": type(error).__name__}
    if status is not None:
        details["grpc_status"] = status.name
    elif error.code is not None:
        details["status"] = int(error.code)
    if error.reason:
        details["reason"] = str(error.reason)
    code = details.get("grpc_status") or details.get("status") or details["sdk_error"]
    message = str(error.message or "")
    if "metadata from plugin failed" in message:
        # How gRPC reports that no access token could be had; the text may quote the exchange.
        return LoginError(
            f"Cloud KMS could not be asked {doing}: no access token.",
            hint="Check the application default credentials, and that their server is reached.",
            retryable=True,
            details=details,
        )
    kind, hint = _meaning(error, message)
    told = f" ({message})" if message.isprintable() and 0 < len(message) <= _LONGEST else ""
    return kind(f"Cloud KMS refused {doing}: {code}{told}.", hint=hint, details=details)


def _meaning(error: sdk.GoogleAPICallError, message: str) -> tuple[type[D1SignerError], str]:
    # A request whose checksum does not fit is refused as well; with which status is not documented
    # ("will report an error"), so the text has to tell.
    if "crc32c" in message.lower():
        return IntegrityError, ALTERED
    for kinds, kind, hint in _CALL_ERRORS:
        if isinstance(error, kinds):
            return kind, hint
    return SignerError, "See the status in the Cloud KMS reference."


def _failed(error: Exception, doing: str) -> D1SignerError:
    name = type(error).__name__
    kind: type[D1SignerError] = SignerError
    hint = "Report it, with the versions of google-cloud-kms and grpcio."
    if isinstance(error, auth.TransportError):
        kind, hint = SignerUnavailable, "Check that the server of the credentials is reached."
    elif isinstance(error, auth.GoogleAuthError):
        kind, hint = LoginError, "Check the application default credentials of this process."
    elif isinstance(error, requests.Timeout):
        # Of the REST transport, whose own limit and ours may run out at the same moment.
        kind, hint = SignerTimeout, "Check the network and the endpoint."
    elif isinstance(error, sdk.RetryError | grpc.RpcError | OSError):
        kind, hint = SignerUnavailable, "Check the network and the endpoint."
    elif isinstance(error, ValueError):
        # A closed channel; and what the SDK says of settings that do not fit each other.
        kind, hint = SignerError, "Check the client's settings, and that it is not closed."
    return kind(
        f"Cloud KMS could not be asked {doing}: {name}.", hint=hint, details={"sdk_error": name}
    )
