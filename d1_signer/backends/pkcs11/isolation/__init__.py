# SPDX-License-Identifier: Apache-2.0
"""A PKCS#11 module in a child process, and both sides of the talk with it."""
