# SPDX-License-Identifier: Apache-2.0
"""A PKCS#11 module in this process: its life, its calls, and forks."""
