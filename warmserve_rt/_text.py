"""Untrusted names and paths as plain text."""

from __future__ import annotations


def plain(text: object) -> str:
    """Return the text with control characters, line ends and lone surrogates escaped.

    A name then cannot move the cursor, recolour a terminal, add a line or fail to encode as UTF-8.
    """
    return "".join(c if c.isprintable() else escaped(c) for c in str(text))


def escaped(character: str) -> str:
    """Return a character as a Python string literal writes it, such as \\x1b."""
    return character.encode("unicode_escape").decode()
