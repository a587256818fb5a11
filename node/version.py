"""The version that adverts and `--version` state."""

from __future__ import annotations

from importlib.metadata import version

VERSION = version("sotto")
