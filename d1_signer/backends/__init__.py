# SPDX-License-Identifier: Apache-2.0
"""The places a key can live; each module speaks to one SDK and knows no JWT and no D1."""
