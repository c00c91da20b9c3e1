# SPDX-License-Identifier: Apache-2.0
"""Marvell: the private object counts, and both chains certify one partition key."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from d1_signer.attestation import AttestationError
from tests.attestation.changing import refusal, to, with_key
from tests.attestation.makers import KEY, OWNER_ROOT, ROOT, Made, marvell, trusted
from tests.attestation.pki import (
    START,
    Holder,
    Settings,
    certificate,
    ec_key,
    rsa_key,
    spki,
    spki_sha256,
)

_EXTRACTABLE, _LOCAL, _NEVER = 0x0162, 0x0163, 0x0164
_SENSITIVE, _ALWAYS = 0x0103, 0x0165


def test_keys_of_rsa_and_packed_or_plain() -> None:
    key = rsa_key("statement")
    for packed in (True, False):
        made = marvell(key=key, packed=packed)
        assert made.verify(public_key=spki(key)).spki == spki(key)
    verified = marvell().verify()
    assert verified.device == "Marvell LiquidSecurity HSM 1.0-TEST, partition 7"
    assert verified.fips_mode is True
    assert verified.facts["owner anchor"] == spki_sha256(OWNER_ROOT.key)


def test_the_private_objects_attributes_count() -> None:
    """The public object says EXTRACTABLE in every statement."""
    verified = marvell(private={_EXTRACTABLE: b"\x01", _NEVER: b"\x00"}).verify()
    assert (verified.exportable, verified.never_exportable) == (True, False)
    verified = marvell(public={_EXTRACTABLE: b"\x00", _NEVER: b"\x01"}).verify()
    assert (verified.exportable, verified.never_exportable) == (False, True)


def test_a_key_that_was_extractable_once_is_told() -> None:
    verified = marvell(private={_NEVER: b"\x00"}).verify()
    assert (verified.exportable, verified.never_exportable) == (False, False)
    verified = marvell(private={_ALWAYS: b"\x00"}).verify()
    assert (verified.exportable, verified.never_exportable) == (False, False)
    verified = marvell(private={_SENSITIVE: b"\x00"}).verify()
    assert (verified.exportable, verified.never_exportable) == (True, False)
    verified = marvell(private={_LOCAL: b"\x00"}).verify()
    assert (verified.never_exportable, verified.generated_in_place) == (False, False)
    assert verified.facts["CKA_LOCAL"] is False


@pytest.mark.parametrize(
    "number",
    [_EXTRACTABLE, _LOCAL, _NEVER, _SENSITIVE, _ALWAYS, 0x0000, 0x0100, 0x0121, 0x1003],
)
def test_what_is_missing_or_odd_is_not_guessed(number: int) -> None:
    assert refusal(marvell(private={number: None}))
    assert refusal(marvell(private={number: b"\x02\x02"}))


def test_two_objects_of_different_keys_are_refused() -> None:
    assert "different keys" in refusal(marvell(public={0x0120: b"\x04" + bytes(64)}))
    other = b"\x00" * 32
    assert "digest" in refusal(marvell(private={0x1003: other}))


def test_two_public_or_two_private_objects_are_refused() -> None:
    assert "public and a private" in refusal(marvell(private={0x0000: b"\x02"}))
    assert "public and a private" in refusal(marvell(public={0x0000: b"\x03"}))


def test_a_symmetric_key_is_refused() -> None:
    made = marvell(change=lambda signed: signed[:38] + b"\x00\x00" + signed[40:])
    assert "symmetric" in refusal(made)


def test_lengths_that_contradict_each_other_are_refused() -> None:
    def set_at(at: int, value: int) -> Made:
        return marvell(
            change=lambda signed: signed[:at] + struct.pack(">I", value) + signed[at + 4 :]
        )

    for at, value in ((8, 100), (12, 8), (12, 0xFFFFFFFF), (44, 10_000), (48, 5), (44, 3)):
        with pytest.raises(AttestationError):
            set_at(at, value).verify()
    with pytest.raises(AttestationError):
        marvell(change=lambda signed: signed + b"\0\0\0\0").verify()


def test_an_attribute_stands_once() -> None:
    """The later one would say that the key was never extractable."""
    made = marvell(private={_EXTRACTABLE: b"\x01"}, again={_EXTRACTABLE: b"\x00"})
    assert "repeated" in refusal(made)


def test_objects_end_with_their_attributes_and_stand_side_by_side() -> None:
    def longer(signed: bytes, by: int) -> bytes:
        """The public object's length, and that of the whole with it."""
        size = int.from_bytes(signed[48:52], "big") + by
        return signed[:48] + size.to_bytes(4, "big") + signed[52:]

    for by in (-1, 1, 8):
        assert "are cut" in refusal(marvell(change=partial(longer, by=by)))

    def behind(signed: bytes) -> bytes:
        total, size = struct.unpack_from(">II", signed, 8)
        return signed[:8] + struct.pack(">II", total + 4, size + 4) + signed[16:] + b"more"

    assert "one behind the other" in refusal(marvell(change=behind))

    def twice(signed: bytes) -> bytes:
        """Both offsets lead to the private object, which then stands for the public one too."""
        return signed[:36] + signed[38:40] + signed[38:]

    assert "one behind the other" in refusal(marvell(change=twice))


def test_owner_and_manufacturer_certify_one_key() -> None:
    """A bundle in which the owner has certified another partition, or nobody has."""
    made = marvell({"owned": with_key(rsa_key("another partition"))})
    assert "different partition keys" in refusal(made)
    made = marvell({"partition": with_key(rsa_key("another partition"))})
    assert "different partition keys" in refusal(made)


def test_the_signature_holds_under_the_key_that_both_certify() -> None:
    other = rsa_key("another partition")
    made = marvell({"owned": with_key(other), "partition": with_key(other)})
    assert "not by the partition's key" in refusal(made)


def test_one_root_cannot_stand_for_both() -> None:
    made = marvell({"owned": to(issuer=ROOT)})
    assert "no trusted key" in refusal(made, anchors=(trusted(ROOT, owner=False),))
    assert "one anchor stands for both" in refusal(made, anchors=(trusted(ROOT),))
    both = (trusted(ROOT, owner=False), trusted(OWNER_ROOT, owner=True))
    assert "no trusted key" in refusal(made, anchors=both)


def test_roles_of_anchors_are_kept() -> None:
    swapped = (trusted(ROOT, owner=True), trusted(OWNER_ROOT, owner=False))
    assert "no card stands above" in refusal(marvell(), anchors=swapped)
    assert marvell().verify(anchors=(trusted(ROOT), trusted(OWNER_ROOT))).spki == spki(KEY)


def test_a_partition_of_another_card_is_refused() -> None:
    card = Holder("HSM:2.0-OTHER, for FIPS mode", ec_key("card"))
    assert "not that of the card" in refusal(marvell({"card": to(subject=card)}))
    nobody = Holder("somebody", rsa_key("partition"))
    made = marvell({"partition": to(subject=nobody), "owned": to(subject=nobody)})
    assert "0 certificates of partitions" in refusal(made)


def test_many_certificates_of_partitions_are_refused() -> None:
    made = marvell()
    partition = Holder("HSM:1.0-TEST:PARTN:7", ec_key("many"))
    many = [
        certificate(Settings(partition, ROOT, start=START + timedelta(each))) for each in range(8)
    ]
    statement = replace(made.statement, certificates=(*made.statement.certificates, *many))
    assert "10 certificates of partitions" in refusal(replace(made, statement=statement))


def test_a_card_right_under_the_owner_is_not_made_by_marvell() -> None:
    assert refusal(marvell({"card": to(issuer=OWNER_ROOT)}))
    direct = marvell({"partition": to(issuer=ROOT)})
    assert "no card stands above" in refusal(direct)


def test_mode_of_fips_is_unknown_where_the_card_is_not_said_to_be_in_it() -> None:
    card = Holder("HSM:1.0-TEST", ec_key("card"))
    assert marvell({"card": to(subject=card)}).verify().fips_mode is None


@pytest.mark.parametrize("cut", [0, 1, 255, 256, 257, 300])
def test_cut_content_is_refused(cut: int) -> None:
    made = marvell(packed=False)
    for content in (made.statement.content[:cut], made.statement.content[cut + 1 :]):
        with pytest.raises(AttestationError):
            replace(made, statement=replace(made.statement, content=content)).verify()


def test_a_gzip_that_unpacks_to_much_is_refused() -> None:
    made = marvell()
    bomb = gzip.compress(bytes(100_000_000))
    assert len(bomb) < 262_144
    statement = replace(made.statement, content=bomb)
    assert "longer than 65536" in refusal(replace(made, statement=statement))
    statement = replace(made.statement, content=made.statement.content + b"more")
    with pytest.raises(AttestationError):
        replace(made, statement=statement).verify()
