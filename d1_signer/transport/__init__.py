# SPDX-License-Identifier: Apache-2.0
"""The one way to speak HTTP and TLS."""
