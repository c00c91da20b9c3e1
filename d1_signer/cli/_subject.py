# SPDX-License-Identifier: Apache-2.0
"""The subject of a certificate signing request, read from a command line."""

from __future__ import annotations

import re

import click
from cryptography import x509
from cryptography.x509 import NameOID, ObjectIdentifier

# Names are the same in any case (RFC 4512 section 2.5).
_ATTRIBUTES = {
    "CN": NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "STREET": NameOID.STREET_ADDRESS,
    "DC": NameOID.DOMAIN_COMPONENT,
    "UID": NameOID.USER_ID,
    "SERIALNUMBER": NameOID.SERIAL_NUMBER,
    "EMAILADDRESS": NameOID.EMAIL_ADDRESS,
    "ORGANIZATIONIDENTIFIER": NameOID.ORGANIZATION_IDENTIFIER,
}
_ATTRIBUTE = re.compile(r"(?:^|(?<!\\)[,+])\s*([A-Za-z][A-Za-z0-9-]*)\s*=")
_FORM = "Write CN=NAME,O=Bank,C=FR, and a backslash before a comma within a value."


def read_subject(text: str) -> x509.Name:
    """Read a distinguished name (RFC 4514).

    Raises:
        click.UsageError: It is none, or has not one common name, or has something in it that stands
            for a name: Thales would sign it as it is.
    """
    used = _ATTRIBUTE.findall(text)
    unknown = [name for name in used if name.upper() not in _ATTRIBUTES]
    if unknown:
        raise click.UsageError(
            f"--subject has an attribute that is not known: {unknown[0]}. "
            f"Known: {', '.join(_ATTRIBUTES)}, and others by their object identifier."
        )
    names: dict[str, ObjectIdentifier] = {name: _ATTRIBUTES[name.upper()] for name in used}
    try:
        subject = x509.Name.from_rfc4514_string(text, names)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise click.UsageError(
            f"--subject is no distinguished name ({reason or 'not as in RFC 4514'}). {_FORM}"
        ) from None
    for attribute in subject:
        _require_value(str(attribute.value), attribute.rfc4514_attribute_name)
    if len(subject.get_attributes_for_oid(NameOID.COMMON_NAME)) != 1:
        raise click.UsageError("--subject has not one common name (CN=NAME), which D1 checks.")
    return subject


def _require_value(value: str, name: str) -> None:
    if not any(character.isalnum() for character in value):
        reason = "no letter and no digit"
    elif "\N{HORIZONTAL ELLIPSIS}" in value or "..." in value or re.search(r"[<>{}]", value):
        reason = "something in it that stands for a name, such as an ellipsis"
    elif not value.isprintable():
        reason = "control characters"
    elif value != value.strip():
        reason = "blanks around it"
    else:
        return
    raise click.UsageError(f"--subject has a value that is no name: {name} has {reason}. {_FORM}")
