"""Names that people choose, spelled so that they may stand in keys whose parts are joined by dots."""

from __future__ import annotations

from urllib.parse import quote, unquote


def escaped(name: str) -> str:
    """Any text without dots, slashes and spaces: percent-encoded UTF-8. Different names never meet."""
    return quote(name, safe="").replace(".", "%2E")


def unescaped(text: str) -> str:
    """Inverse of `escaped`."""
    return unquote(text)
