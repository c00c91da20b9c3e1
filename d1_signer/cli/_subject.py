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
# What a value may consist of, where its ASN.1 type is none of Unicode (RFC 5280 appendix A).
_COUNTRY = (re.compile(r"[A-Za-z]{2}"), "no code of a country (ISO 3166), two letters")
_PRINTABLE = (
    re.compile(r"[A-Za-z0-9 '()+,./:=?-]+"),
    "characters that this attribute cannot have: letters of English, digits and '()+,-./:=? only",
)
_ASCII = (re.compile(r"[ -~]+"), "characters that this attribute cannot have: ASCII only")
_REPERTOIRES = {
    NameOID.COUNTRY_NAME: _COUNTRY,
    NameOID.JURISDICTION_COUNTRY_NAME: _COUNTRY,
    NameOID.SERIAL_NUMBER: _PRINTABLE,
    NameOID.DN_QUALIFIER: _PRINTABLE,
    NameOID.EMAIL_ADDRESS: _ASCII,
    NameOID.DOMAIN_COMPONENT: _ASCII,
}
_STANDS_FOR_A_NAME = re.compile(
    r"\N{HORIZONTAL ELLIPSIS}|\.\.\.|[<>{}]|(?<!\w)\$[\w(]|\A\[.*\]\Z|\A%\w+%\Z", re.DOTALL
)
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
        _require_value(attribute)
    if len(subject.get_attributes_for_oid(NameOID.COMMON_NAME)) != 1:
        raise click.UsageError("--subject has not one common name (CN=NAME), which D1 checks.")
    return subject


def _require_value(attribute: x509.NameAttribute[str | bytes]) -> None:
    value, name = str(attribute.value), attribute.rfc4514_attribute_name
    repertoire, other = _REPERTOIRES.get(attribute.oid, (None, ""))
    if not any(character.isalnum() for character in value):
        reason = "no letter and no digit"
    elif _STANDS_FOR_A_NAME.search(value):
        reason = "something in it that stands for a name, such as an ellipsis or $NAME"
    elif not value.isprintable():
        reason = "control characters"
    elif value != value.strip():
        reason = "blanks around it"
    elif repertoire is not None and not repertoire.fullmatch(value):
        reason = other
    else:
        return
    raise click.UsageError(f"--subject has a value that is no name: {name} has {reason}. {_FORM}")
