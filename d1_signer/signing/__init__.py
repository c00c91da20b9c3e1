# SPDX-License-Identifier: Apache-2.0
"""Signers, and what a place that holds keys must offer."""
