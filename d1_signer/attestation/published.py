# SPDX-License-Identifier: Apache-2.0
"""The vendors' keys. Compare them with the vendors' pages: docs/custody/attestation.md."""

from __future__ import annotations

import base64

from d1_signer.attestation.anchors import Anchor


def _key(
    name: str, formats: set[str], spki_sha256: str, spki: str, *, owner: bool | None = None
) -> Anchor:
    return Anchor(
        spki_sha256,
        name=name,
        formats=frozenset(formats),
        hardware=True,
        owner=owner,
        spki=base64.b64decode(spki),
    )


PUBLISHED: frozenset[Anchor] = frozenset(
    {
        # Marvell's page "Software Key Attestation", liquid_security_certificate.zip; the key of
        # the certificates of 2015 to 2025 and 2024 to 2034 alike. Read in smallstep/crypto @
        # 4f954b32a130, kms/cloudkms.
        _key(
            "Marvell LiquidSecurity root",
            {"marvell"},
            "78adcba1f38bee304bc44d6a086503f2940037d4b3d58a1bf66a3282ef58cd41",
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA3JL6kDOHL2Y3cqjixjE4yicL38SToVas"
            "OqaI4FDM9dFVO89wrSa8B3BEsBA1MVJDMc6H+eZBaK1ES2lVQo3nWGrhIrJ2cMElpAHpqfRkRJvI"
            "l+gV7aGfFQ1qDth9ACYhwjOtqiXmVV4ZvAP81htD8i6wiDR9Ms/WoegXMHbGRi70L5KVDSYcFTK2"
            "/ZyPQZUZk1oaKLdWEk3+434mxJHP6TftBM99ERWi9zIciGjSUttvtdLZ8uLDlE7DxLVymoeZj5R6"
            "Z6xnAdfM+WMYK9LwzWMfhQjxqPeVxq6vTWHzTJcLEnhUq/A9VUOx2ZoqXkwdYUE1EMPyv0ZrcOTY"
            "pY5GEwIDAQAB",
            owner=False,
        ),
        # Google's certificate of the owner of Cloud HSM's partitions, in every bundle that Cloud
        # KMS gives, and in smallstep/crypto @ 4f954b32a130, kms/cloudkms.
        _key(
            "Google Hawksbill Root v1 prod",
            {"marvell"},
            "11fa0c80423f28ee497a189bed4f7043629be7a7642d20eee9347a73c1ff46e8",
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEArC6oYokhoHCS37COw5NNJjjbpaJfax5t"
            "qGwsg9ZbmvgCoPiwFvtc2rmbuYtNvBUm4A5PL7UgQxwxfl7BZ6k2yBlewrWotpZ2kHtVFU1TFhDw"
            "YtXYmBnHng6yaSaj89ml03CIIaxiEnsqviAuM9ubkKexvw/AEXrCmKmMTTanH2ZTCJNLOhIeGj8r"
            "wl2LS5fUFw9Bgyep8+DZgvhcN9QeXeSoPVl8Q2TmAtc1OfSV23ccc3gvxCaNZNQB4IbaPyfHnb0y"
            "JeTUNGoThyqFGc4YQ0bFQYqBZsplbsGhznF01LB3tzU5DcniyH6BabEEOF3B/ZIzuu2F05HQlnjW"
            "MPxWGQIDAQAB",
            owner=True,
        ),
        # Thales' page "Confirm the HSM's Authenticity"; ThalesGroup/luna-pkc-validator @
        # 4718eb04a850, tests/, and the chain in its sample.
        _key(
            "Chrysalis-ITS Root (Thales Luna, RSA)",
            {"luna-pkc"},
            "5d31fc462ae8a1a5327b149ff43aa6d867a28d7e17ca1cca7e7d514cf8cdc132",
            "MIICIDANBgkqhkiG9w0BAQEFAAOCAg0AMIICCAKCAgEAumAZOCcEhuMbWkao2zkD9Qud/JwNsFme"
            "obZeOlcRVP1WxknrabsFadaYQwy7lntDPaiVWwzXXsBm+CemB6AlFZxcIRVy7tIydQGHCY5mOeHT"
            "RTO/HS1JEbwZaNXc7U6dhtnjjWrJlzNDHQO/QAxMGvRs0rXJerwm13iQ5uJHolMjA6DSQH6dM2gA"
            "3KF8Zkd+K3okfGZS6z7J9ZmbCE98av7hfoZIY/xKl5GK4qqgJLaArEpqsjyZ5m6SAG0HrIWfWnpN"
            "fb/vLJxusWGTKi99f69NO4goHC7toGHDNeax+Wdtogfupk+WHSWDswFOzmK8uEFWXjbcRpolAapw"
            "ZJBbNviDCdXflOo4Ad43t4gGLkMuTeG/9zIHV9wcM66oabZGSAvOrrpDGQR8OB+zZVsssfxsGloE"
            "VuO+qLTEq+6cgo656MKEwCcw9yffeJEWdpL+aQbI5HNkHeo6n5WnySKd8MHWLzRfj2hoIdEAXhyi"
            "F3zz4kSfYsRJPVdC5ulRZ89nWKYTRs6DrwF14XMfMayL9r+eRXjk/yeyklwsfznFiLOVnoXsKXJU"
            "Y8apfIpxCZL6bLJD4IXgQ2ghkwje/5hotMP35QAPgBX64sLy/EuuU4+mLjZQztiaaDoB3tPW3cA3"
            "KyPX9wUl1ysDUALTZJEicI4jUptorrcUmoAFLHUbCWkCAQM=",
        ),
        # As above.
        _key(
            "SafeNet ECC Manufacturer Integrity Module (Thales Luna, ECC)",
            {"luna-pkc"},
            "9ce6c272050d813428e7b7a6754143690128b823151671efc5e29ca1321c6804",
            "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEY4hhhatC4xJx8QCpcx/uC7TmcGDM7fdXdEQicWmlOG7S"
            "UKc8djjLgRShUa4WLqfZJf/C92AjtY8UXp5+PEQmr5GzdVw+mg5JYo94xaLxBubzg8KQaT8Pew/n"
            "EH7XnXvm",
        ),
        # Yubico's page "YubiHSM 2 Attestation"; read in blechschmidt/secsy-pki @ 56361f864785,
        # server/internal/hsmattest/roots/.
        _key(
            "Yubico YubiHSM Root CA",
            {"yubihsm"},
            "734a10b6b58ea57f63e5b9f6673a5ef6a075269d276a087e49f2756c2ea2582b",
            "MIICIjANBgkqhkiG9w0BAQEFAAOCAg8AMIICCgKCAgEA4WqC8Krz1pXqgD4Bj3g/dosh/soydDCb"
            "NQ1uePeONXO5u4Kswi+jXPmcU9uqxIrNC6+t7Mwc+yyBAZBvIl6w+h5qwT7zE7VTjeWBTP/4w0NX"
            "zgkPZgXWl6XIZNCJQfSSUxfh/NW7KCQySpDUGkR8hFHYwZTIUD90/chv7lc1zcpaIgJDQ7m3IbPK"
            "KbaRrrc7ZUSB1cCFM7P6ESuJiTMKITNTMyW2qoa8YTaAxHXIiiqmnff2ObtsPKtjfh8aHDdBdpZ8"
            "TqBCu8ht+3tpZpe2lnfqJBUGN9wqIp+h1JLaKXN4NTr+VlUNEEGwMEJNKMtt3p1qxHmyHV4vSd5m"
            "OT4SY81MNL0Cv3HAHgR1lT7o8rMDTjB1PZP9v8Np2rpuvlog34eMsIBApP78zSjQrImQiHAYcADc"
            "RZX6nSTOFyNdfjWtKxybdiFZpTpuLtGPwF7i3ISYQXambmaEqw83jCqIMMF4jFMkKjA8UZnJRW+5"
            "3pM5Gy6hQzhlJpwhE9d/L87VeR2ei0sidO1rDB9pQOdy9z41EBw4pH5Aa99CPcOn16Eg4TS5838a"
            "s2pG3xFgWBiVxipMW72pejBD5G5kk/hpbOW5QO6vaXBLmngq4o3IySmM9J9IPRXuZrhmu2uafIvp"
            "3o67/lUcuqGEnxjG+Sj5q51g12E6sVXauoxqhGOhllcCAwEAAQ==",
        ),
        # Yubico's page "Attestation PKI", for devices since firmware 5.7.4 and 2.4.1; read as
        # above.
        _key(
            "Yubico Attestation Root 1",
            {"yubihsm", "yubikey-piv"},
            "1f43e2b88e964a5d03b8058bbaaced68199c9256200f1bb28eaab2f82a1e06f2",
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAxnr9PEzyshP4Rqg+8bzWie0w6j/aZDZE"
            "HAkdLRBlzFVo1e+XXYtSEFnkuaIFJwhl3VGfHWh3nzmH792EruESbskAAuQoq2zV87ncoY0tm6PP"
            "mHfAadyviHIoXQbvhv9Tcr2ETmYY0PrOphyEJEAd+tgxhEMXhgvRfgPmcZ3G+mkDLqeQSa1aYyfA"
            "7eLRMC5yytsTjzke8YzivRWmBV0mm+BCOJMkJMir4PfmHC1PxAMi/6ca+lzKLnBwh8KTPIKKYm6S"
            "FjLoqio0wpAR2k2JI69bIMxMy3VvAK8TOnD3W76axS3iuPR5+c72zRk7B3AxEOcfjGBSXlkvCus+"
            "R8LX/QIDAQAB",
        ),
        # Yubico's page "PIV attestation"; read in go-piv/piv-go @ 5a76b44bb2ea, piv/key.go.
        _key(
            "Yubico PIV Root CA Serial 263751",
            {"yubikey-piv"},
            "4b185b7783d792f902cd960cd1c9417977d88d3077b16bc9ebdcef7313f2e29e",
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAw3ZwxM1HpgJ1xMVHG4/LfU9ptGfmbqkn"
            "6dITQdFamhozx9zzAcL5OZv3yOY2+FY0TYSKVTzm5gp8QU/13pDYabK2oGfFmwBrcqpmIILHYvBD"
            "iJgQ5vWWWCi1Wv/CESl1U6qOhTQ/l7WPXLs5/A6+TL/4Bcg3/1enRUWVhGTa1D0Zx1goOapT51v2"
            "IrCkDOJ3igcFUsiGYPem+RZpEDYfcMD23sf8c2rm/c6I7WPItl4qpmgxs85uvGoOD71851KHOB/A"
            "KqBPddWZN6LC8FJNy3KL2YdB9h3YPCRqrFGcts1XIr3OX4PONIan0iFU+JW0Z61fTZ3GFCcZLsro"
            "E7RB7wIDAQAB",
        ),
        # As above; the first YubiKeys with attestation have their PIV certificates from it.
        _key(
            "Yubico U2F Root CA Serial 457200631",
            {"yubikey-piv"},
            "29412da192720e5f4f22a408559c057e4ff25347eafb20cfb15a047a07601935",
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAv48GLoQVZamomFhDLK1hYrICfj7TPdXk"
            "q6SOEyu1Od5sAiGsEgx8vL1JpOTdigI/Wm70/TT+UjEtYUIt7rMaGBqJ10IHzumV8lAPWvigJKnR"
            "ZwZ5croEngjnqfBHWRX7GkRbTI5MM+RnM9j8uLyGLwnTBz7cGs9G1bs53rniBM+k50IxOt0Xbds2"
            "8J3m8ExuWcm3lksG88vgSd+GR3FITwGPPciUF7hNCMzGRXBAWzzUW1hAkSoI6v/6k/Z5gzhVZUkQ"
            "rdsIqj0s5bsJ/r/rLkBAbFI0xjBHdubSl105DVttcCFm8XkslKE18C7xkusZcEEoDaZNql2MH/Il"
            "4O1VmQIDAQAB",
        ),
        # Read in niklasgillstrom/hsm @ 0b5a8e51cde8, SecurosysVerifier.java; Securosys gives it
        # to customers.
        _key(
            "Securosys PRIMUS_HSM_ROOTKEY",
            {"securosys"},
            "a22f3406121ed57c1d4a2b94fb0553b5f80f1f48e46d9f954e3e7cb0ee99903a",
            "MIICIjANBgkqhkiG9w0BAQEFAAOCAg8AMIICCgKCAgEAtOsW9Oki47ppAmHuQSOHP2OqPAg7fj18"
            "pflb0RGK7yPKP3i42w84JRS9jApc3q8K4cTL1skq6rnGzBOUIsSb6hUJiJDyTcwv4f7DffDP9ovV"
            "Wg3YgJx7GdImAMXJtZ4w1TCDNFYvbVpvvh9ZAGUEFgOmY2CkjyYKfPCT5QrEBGZaL3Y025yttsPm"
            "GiwEujbohV8BqnUrrxPnLJ0XY1t/tcDcg0+sn+Y0DVphTtvy2PLkPoCoH+bSBYbobCtqd00Yo7A6"
            "/+n+dVnFJAAMhvUJyQ84YJi8lTTaUUJTYE/LetVKjH3wb5Sl5v8285HCq1ApMPGCHswdMtKMs0zW"
            "kuSLBmeQSJrJQonYEOms0LeAsyr/KE11kYPtYgXUioH/vQCSCQpwKJPRH0XYf3ZLzthhcntZp+DH"
            "CAqpbcg75yEOHBupd9LIy7xjtFpzLG8vIrAdQt/fvNDcBDItXXqUDrmPvHgmrGDZHMmgqzwHGqPo"
            "7Wbe4PxljsHD4Wesihvqw9zdQP7KbYBeExGyWsfcIknkV2QBXPa5t3+sH+NnrtvyWzUdUpXqptOq"
            "fJJbkg1fN43vABA7xxQ5C2rfXk6iZOplOSwx32yUo1V8YBsOJzPMUAhsjWI4I7/79UqkiWdHjCMg"
            "fT1dkFZ9RBLE+3hy3S0j59YsCVFax91Gr/eof7W+pqECAwEAAQ==",
        ),
    }
)
"""Keys of vendors that are trusted where nothing else is said; each for its formats only."""
