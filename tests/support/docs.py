"""The documentation's fenced blocks, and what a comment in the line above says of each.

``<!-- run -->`` runs or checks the block, ``<!-- output -->`` is what the block before it prints,
``<!-- not run: reason -->`` is the only way to leave one out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<say>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_CHANGING = (
    (re.compile(r"(?<![\w-])[A-Za-z0-9_-]{22}(?![\w-])"), "JOB"),
    (re.compile(r"\b\d{13}-(\d+)"), r"EPOCH-\1"),
    (re.compile(r"expires=\d+&sig=[\w-]+"), "SIGNED"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)"), "TIME"),
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    say: str
    """``run``, ``output``, ``not run: …``, or empty."""
    output: str | None = None
    """What the page says that it prints."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """All of a page's blocks, in order; outputs stand with the block that prints them."""
    text = read(page)
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        block = Block(page, line, match["language"], match["text"], match["say"] or "")
        if block.say == "output":
            before = found.pop()
            assert before.say.startswith("run"), f"{block.place} is the output of nothing"
            block = Block(before.page, before.line, before.language, before.text, before.say, block.text)
        found.append(block)
    return found


def steady(text: str) -> str:
    """``text`` with names for what differs from run to run: ids, times, signatures."""
    for pattern, name in _CHANGING:
        text = pattern.sub(name, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def table(page: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table behind a heading (without its #), by column; code marks are taken off."""
    return tables(page, heading)[0]


def tables(page: str, heading: str) -> list[list[dict[str, str]]]:
    """All tables of the section under a heading."""
    lines = read(page).splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line))
    found: list[list[dict[str, str]]] = []
    columns: list[str] = []
    for line in lines[start + 1 :]:
        if line.startswith("#"):
            break
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        if not columns:
            columns = cells
            found.append([])
        elif not set(line) <= set("|- "):
            found[-1].append(dict(zip(columns, cells, strict=False)))
    return found


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
