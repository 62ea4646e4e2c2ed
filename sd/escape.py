"""Escape names chosen by users for keys whose parts are joined by dots."""

from __future__ import annotations

from urllib.parse import quote, unquote


def escaped(name: str) -> str:
    """Percent-encode `name` as UTF-8, dots, slashes and spaces included; different names stay different."""
    return quote(name, safe="").replace(".", "%2E")


def unescaped(text: str) -> str:
    """Inverse of `escaped`."""
    return unquote(text)
