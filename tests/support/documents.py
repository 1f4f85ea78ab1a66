"""The blocks of code of README.md and of the pages in docs/."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
_BLOCK = re.compile(r"(?:<!-- ([\w-]+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: its page, its first line there, and its marker, "" if it has none."""

    page: str
    line: int
    marker: str
    language: str
    code: str

    def run(self, names: dict[str, object], **replaced: object) -> None:
        """Execute the block in these names. Replace path/to/NAME by the path given for NAME."""
        code = self.code
        for name, path in replaced.items():
            assert f"path/to/{name}" in code
            code = code.replace(f"path/to/{name}", str(path))
        exec(compile("\n" * self.line + code, self.page, "exec"), names)


def blocks(language: str | None = None, *, page: str | None = None) -> list[Block]:
    """Return the blocks in a language (all by default) of one page (all by default), in order."""
    return [
        Block(name, text.count("\n", 0, found.start(3)), found[1] or "", found[2], found[3])
        for name, text in PAGES.items()
        for found in _BLOCK.finditer(text)
        if page in (None, name) and language in (None, found[2])
    ]
