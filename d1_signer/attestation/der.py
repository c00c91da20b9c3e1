# SPDX-License-Identifier: Apache-2.0
"""DER, strictly: asn1crypto reads BER that DER forbids, and reads it late."""

from __future__ import annotations

from d1_signer.attestation.refusals import refused

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, NULL, UTF8_STRING = 0x01, 0x02, 0x03, 0x04, 0x05, 0x0C
SEQUENCE, SET = 0x30, 0x31

_DEEPEST = 24
_CONSTRUCTED = 0x20
_UNIVERSAL = 0x40  # tags below are universal
_HIGH_TAG = 0x1F
_LONG_FORM = 0x80
_SIGN = 0x80


def check(data: bytes, deepest: int = _DEEPEST) -> None:
    """Refuse what is not DER (X.690 section 10): one value in one form, nothing before or behind.

    What a BIT STRING or an OCTET STRING holds is not looked at, nor DEFAULT values: Luna's
    certificates state ``critical FALSE``.

    Raises:
        AttestationError: Another encoding than DER.
    """
    at = 0
    while at < len(data):
        tag, start, end = _header(data, at)
        _check_value(tag, data[start:end])
        if tag & _CONSTRUCTED:
            if not deepest:
                raise refused("its DER is nested too deeply")
            check(data[start:end], deepest - 1)
        at = end


def values(data: bytes, *tags: int) -> list[bytes]:
    """The contents of values that follow each other, of exactly these tags.

    Raises:
        AttestationError: Other values, or more.
    """
    found = []
    at = 0
    for expected in tags:
        tag, start, end = _header(data, at)
        if tag != expected:
            raise refused(f"its DER has the tag {tag:#04x} where {expected:#04x} is due")
        _check_value(tag, data[start:end])
        found.append(data[start:end])
        at = end
    if at != len(data):
        raise refused("something stands behind a DER value")
    return found


def unsigned(data: bytes) -> int:
    """One INTEGER that is not negative."""
    (content,) = values(data, INTEGER)
    if content[0] & _SIGN:
        raise refused("a number is negative")
    return int.from_bytes(content, "big")


def bits(data: bytes) -> int:
    """One BIT STRING of whole octets, as a number."""
    (content,) = values(data, BIT_STRING)
    if not content or content[0]:
        raise refused("a BIT STRING is not of whole octets")
    return int.from_bytes(content[1:], "big")


def unsigned_pair(data: bytes) -> tuple[int, int]:
    """A SEQUENCE of two INTEGERs whose sign octet may lack, as in signatures of a Luna HSM."""
    (content,) = values(data, SEQUENCE)
    numbers = []
    at = 0
    while at < len(content):
        tag, start, end = _header(content, at)
        if tag != INTEGER or start == end:
            raise refused("a signature is not two INTEGERs")
        numbers.append(int.from_bytes(content[start:end], "big"))
        at = end
    if len(numbers) != 2:  # noqa: PLR2004 (r and s)
        raise refused("a signature is not two INTEGERs")
    return numbers[0], numbers[1]


def _header(data: bytes, at: int) -> tuple[int, int, int]:
    """Tag, and where the content begins and ends."""
    head = data[at : at + 2]
    if len(head) < 2 or head[0] & _HIGH_TAG == _HIGH_TAG:  # noqa: PLR2004 (tag and length)
        raise refused("its DER is cut, or has a tag that nobody uses")
    length, start = head[1], at + 2
    if length & _LONG_FORM:
        octets = data[start : start + (length & ~_LONG_FORM)]
        start += length & ~_LONG_FORM
        length = int.from_bytes(octets, "big")
        if not octets or octets[0] == 0 or length < _LONG_FORM:
            raise refused("it is BER and not DER: a length in a form that is not the shortest")
    if start + length > len(data):
        raise refused("its DER is cut")
    return head[0], start, start + length


def _check_value(tag: int, content: bytes) -> None:
    if tag >= _UNIVERSAL:
        return
    whole = tag in (SEQUENCE, SET) if tag & _CONSTRUCTED else tag | _CONSTRUCTED not in (0x30, 0x31)
    if tag == INTEGER:
        whole = bool(content) and not (
            len(content) > 1 and (content[0], content[1] & _SIGN) in {(0x00, 0x00), (0xFF, _SIGN)}
        )
    elif tag == BOOLEAN:
        whole = content in {b"\x00", b"\xff"}
    elif tag == NULL:
        whole = not content
    if not whole:
        raise refused("it is BER and not DER")
