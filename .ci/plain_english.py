"""Finds unclear English in what people read: documents, comments, docstrings and messages.

    python .ci/plain_english.py [FILE ...]    exits with 1 if a sentence has one of the PATTERNS

Without a file it reads all files of the repository: Markdown, and the comments and strings of
Python, C++ and shell scripts. A pattern is listed only if it is rarely right.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_BAD_SENTENCES = (".ci/plain_english.py", "tests/interface/test_plain_english.py")

NOT_A_QUESTION = r"(?!.*\?)"
THINGS = r"(byte|chunk|copy|copie|granule|layer|load|model|piece|request|tensor)s?"
PATTERNS = {
    rf"^What\b(?! (\w+ )?to\b){NOT_A_QUESTION}": "begin with a noun or a verb",
    r"^(All|Nobody|None|Nothing|That) (that|which|who)\b": "begin with a noun",
    r"^Of\b": "begin with the subject",
    r"^Where (a|an|it|no|one|the|they)\b[^,?]*, (?!and|for)": "write if or when",
    rf"\bwhere there (is|are|was|were)\b{NOT_A_QUESTION}": "write if or when",
    r"\b([Ww]hom?(so)?ever|([Aa]ny|[Ee]very|[Nn]o|[Ss]ome)body)\b": "name it: caller, owner",
    r", for (he|it|there|they|we|you)\b": "write because",
    r", for (a|an|its|no|that|the|their|this)( (?!that|wh)\w+){1,3}?"
    r" (are|can|cannot|does|has|have|is|may|must|was|were)\b": "write because",
    r"(?<!there )\b(are|be|is|was|were) none\b(?! (of|or)\b)": "write invalid, unknown or missing",
    rf"\b(are|is|was|were) there\b{NOT_A_QUESTION}": "write exists, is resident or has arrived",
    r"\bwhat there (is|are)\b|\bthat there (is|are) not\b": "name the thing",
    rf"\b{THINGS} (came|come|comes)\b(?! (after|before|first|from|last))": "write arrives",
    rf"\b{THINGS} (go|goes|gone|went)\b(?! (by|from|into|over|through|to))": "write is evicted",
    rf"\bso many {THINGS}\b(?!.* that\b)": "write this number, or at most",
    r"\b(lacked|lacking|lacks)\b": "write has no, without or is missing",
    r"\b(are|is|its) no more(?=[.,:;]|$)|\bno more than (so|that|this)\b": "write at most",
    r"\bsuch (as|that) (are|is)\b": "name the thing",
    r"\b(none|nothing) but\b|(?<!,) but for\b": "write except, or only",
    r"(^|, )(had|should|were) (each|it|one|there|they)\b": "write if",
    r"\bcall(ed|ing|s)? off\b": "write cancel",
    r"\b(albeit|lest|thereof|therein|whence|whereby|wherein|whereupon)\b": "use a common word",
}

EXCEPTIONS: dict[str, str] = {
    # The beginning of a sentence: why it is right.
}

CPP = re.compile(
    r"//(?P<comment>[^\n]*(?:\n[ \t]*//[^\n]*)*)|/\*(?P<block>.*?)\*/"
    r'|R"\((?P<raw>.*?)\)"|(?P<string>"(?:\\.|[^"\\\n])*"(?:\s*"(?:\\.|[^"\\\n])*")*)'
    r"|'(?:\\[^'\n]*|[^'\\\n])'",  # no comment begins in a character or a string
    re.DOTALL,
)


def comments(lines: Iterable[tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
    """Yield comments with their first lines; a comment alone on its line continues the last one."""
    first, text = 0, ""
    for number, comment, alone in lines:
        if text and alone and number == first + text.count("\n") + 1:
            text += f"\n{comment}"
            continue
        yield first, text
        first, text = number, comment
    yield first, text


def of_python(path: Path) -> Iterator[tuple[int, str]]:
    with tokenize.open(path) as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]
    yield from comments(
        (t.start[0], t.string.lstrip("#! "), t.line.lstrip().startswith("#")) for t in tokens
    )
    nodes = list(ast.walk(ast.parse(path.read_text())))
    formats = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(value) for node in formats for value in node.values}
    for node in formats:
        texts = (part.value if isinstance(part, ast.Constant) else "`x`" for part in node.values)
        yield node.lineno, "".join(map(str, texts))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def of_cpp(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text()
    for match in CPP.finditer(source):
        text = match["comment"] or match["block"] or match["raw"] or ""
        if match["string"]:
            text = re.sub(r'"\s*"', "", match["string"]).strip('"')
        yield source.count("\n", 0, match.start()) + 1, re.sub(r"(?m)^[ \t]*//+", "", text)


def of_shell(path: Path) -> Iterator[tuple[int, str]]:
    found = (
        (number, match[2], not match[1].strip())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := re.match(r"(|.*?\s)#\s(.*)", line))
    )
    yield from comments(found)


def of_markdown(path: Path) -> Iterator[tuple[int, str]]:
    yield 1, re.sub(r"^```.*?^```", blank, path.read_text(), flags=re.DOTALL | re.MULTILINE)


def blank(match: re.Match[str]) -> str:
    """Replace code, which is not English, by letters on as many lines."""
    return re.sub(r"[^\s`]", "x", match[0])


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what people read in a file, with the line where each text begins."""
    if path.suffix in (".py", ".pyi"):
        yield from of_python(path)
    elif path.suffix in (".cpp", ".cu", ".h", ".inl"):
        yield from of_cpp(path)
    elif path.suffix == ".md":
        yield from of_markdown(path)
    elif path.suffix in (".sh", ".toml") or path.name == "Makefile" or path.parent.name == ".ci":
        yield from of_shell(path)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a text, with the number of line ends before each."""
    text = re.sub(r"`[^`\n]+`", blank, text)
    begin = 0
    for match in re.finditer(r"(?<=[.!?:])\s+|\n\s*\n|\n\s*(?=[-*#] )|\|\s|\Z", text):
        sentence = text[begin : match.start()]
        lead = len(sentence) - len(sentence.lstrip(" \n\t-*|("))
        yield text.count("\n", 0, begin + lead), " ".join(sentence[lead:].split())
        begin = match.end()


def problems(path: Path) -> Iterator[str]:
    """Yield one message for each unclear sentence of a file."""
    for first, text in sorted(texts(path)):
        for offset, sentence in sentences(text):
            if sentence.count(" ") < 2 or sentence.startswith(tuple(EXCEPTIONS)):
                continue
            for pattern, instead in PATTERNS.items():
                if found := re.search(pattern, sentence):
                    yield f'{path}:{first + offset}: {sentence}\n    "{found[0]}": {instead}'


def main(names: list[str]) -> int:
    if not names:
        listed = ["git", "-C", str(ROOT), "ls-files"]
        done = subprocess.run(listed, capture_output=True, text=True, check=True)
        names = [str(ROOT / name) for name in done.stdout.splitlines()]
    paths = [Path(name) for name in names if not name.endswith(OF_BAD_SENTENCES)]
    found = [problem for path in paths if path.is_file() for problem in problems(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
