# SPDX-License-Identifier: Apache-2.0
"""The watch over the whole suite: no secret gets into an error, a log line or a file."""
