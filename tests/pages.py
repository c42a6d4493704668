"""The pages that users read, and the blocks of code in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block, with what the HTML comment above it says."""

    page: Path
    line: int
    language: str
    text: str
    comment: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that a newcomer writes it into: `<!-- file: NAME -->` above it, or `# NAME.py` in its first line."""
        named = re.match(r"file: (\S+)", self.comment) or re.match(r"# (my_\w+\.py)\n", self.text)
        return named[1] if named else None

    def __str__(self) -> str:
        return self.where


def blocks_of(page: Path, text: str) -> list[Block]:
    found, comment, start, language, lines = [], "", 0, None, []
    for number, line in enumerate(text.splitlines(), start=1):
        if language is not None:
            if line.strip() == "```":
                found.append(Block(page, start, language, "\n".join(lines) + "\n", comment))
                language, comment = None, ""
            else:
                lines.append(line)
        elif opening := re.match(r"```(\w*)$", line.strip()):
            start, language, lines = number, opening[1], []
        elif remark := re.match(r"<!-- (.*) -->$", line):
            comment = remark[1]
        elif line.strip():
            comment = ""
    assert language is None, f"{page}: the block of line {start} has no end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text("utf-8"))]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def command_lines(block: Block) -> list[str]:
    """Its commands, a line each, without remarks."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


def inline_commands(text: str) -> list[str]:
    """Whole commands of `lit-specrl` between backticks in a text."""
    return [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith("lit-specrl ")]


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.DOTALL | re.MULTILINE)
