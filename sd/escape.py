"""Escape names chosen by users for keys whose parts are joined by dots."""

from __future__ import annotations

from urllib.parse import quote, unquote


def escaped(name: str) -> str:
    """Percent-encode `name` as UTF-8, dots, slashes and spaces included; different names stay different."""
    return quote(name, safe="").replace(".", "%2E")


def unescaped(text: str) -> str:
    """Inverse of `escaped`."""
    return unquote(text)


def as_key(name: str, empty: object) -> str:
    """A key for `name` in a ModuleDict or ParameterDict. Keys may not contain dots, be empty, or equal an attribute of the
    container, such as `train` or `_apply`; `empty` is a container without keys."""
    text = escaped(name)
    if hasattr(empty, f"_{text}"):  # then it starts with a letter or an underscore
        text = f"%{ord(text[0]):02X}{text[1:]}"
    return f"_{text}"


def from_key(key: str) -> str:
    """Inverse of `as_key`."""
    return unescaped(key[1:])
