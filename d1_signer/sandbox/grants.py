# SPDX-License-Identifier: Apache-2.0
"""Reading token requests, and the answers of RFC 6749 section 5."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from aiohttp import web

from d1_signer.sandbox.strict_json import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"

_CORRELATION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_FIELDS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A JSON answer before it is sent."""

    status: int
    document: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The document as JSON text."""
        return json.dumps(dict(self.document)).encode()

    def altered(self, **members: object) -> Answer:
        """The answer with other members."""
        return replace(self, document={**self.document, **members})

    def response(self) -> web.Response:
        """The answer for the HTTP framework."""
        return web.Response(
            status=self.status, body=self.body, content_type=JSON, headers=self.headers
        )


def refusal(error: str, description: str, *, status: int = 400) -> Answer:
    """An error answer: `error` is a code of RFC 6749 section 5.2."""
    return Answer(status=status, document={"error": error, "error_description": description})


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What a token request asks for.

    Attributes:
        grant_type: As sent, None where absent or unreadable.
        assertion: As sent, ``""`` where absent or unreadable.
        refused: The answer to a request that is wrong in form, else None.
    """

    grant_type: str | None = None
    assertion: str = field(default="", repr=False)
    refused: Answer | None = None


def read_grant(content_type: str, body: bytes) -> Grant:
    """Read the body of a token request.

    Args:
        content_type: The media type in lower case, without parameters.
        body: The whole body.
    """
    if content_type not in (FORM, JSON):
        return _malformed(f"The content type is neither {FORM} nor {JSON}.")
    try:
        members = read_object(body) if content_type == JSON else _read_form(body)
    except ValueError:
        return _malformed("The body cannot be read, or names a parameter twice.")
    grant_type, assertion = members.get("grant_type"), members.get("assertion")
    # RFC 6749 section 3.1: a parameter without a value counts as omitted.
    if not isinstance(grant_type, str) or not grant_type:
        return _malformed("The grant_type is missing.")
    if not isinstance(assertion, str) or not assertion:
        return _malformed("The assertion is missing.", grant_type)
    if grant_type != GRANT_TYPE:
        refused = refusal("unsupported_grant_type", f"The grant_type is not {GRANT_TYPE}.")
        return Grant(grant_type=grant_type, assertion=assertion, refused=refused)
    return Grant(grant_type=grant_type, assertion=assertion)


def is_correlation_id(value: str) -> bool:
    """Whether D1's pattern for ``x-correlation-id`` fits."""
    return _CORRELATION_ID.fullmatch(value) is not None


def _malformed(description: str, grant_type: str | None = None) -> Grant:
    return Grant(grant_type=grant_type, refused=refusal("invalid_request", description))


def _read_form(body: bytes) -> dict[str, str]:
    pairs = parse_qsl(
        body.decode("ascii"),
        keep_blank_values=True,
        strict_parsing=True,
        errors="strict",
        max_num_fields=_MAX_FIELDS,
    )
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a parameter stands twice")
    return members
