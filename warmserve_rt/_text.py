"""Names and paths of others as plain text."""

from __future__ import annotations


def plain(text: object) -> str:
    """The text with control characters, line ends and lone surrogates as escapes, so that a name
    cannot move the cursor, recolour a terminal, add a line or fail to be encoded as UTF-8."""
    return "".join(c if c.isprintable() else escaped(c) for c in str(text))


def escaped(character: str) -> str:
    """As a Python string literal has it, such as \\\\x1b."""
    return character.encode("unicode_escape").decode()
