"""Table: what a table says, made once; printed as text, or put into a page by the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Marked(NamedTuple):
    """A cell that a page shows in colour."""

    text: str  # what the cell says
    mark: Literal["good", "bad"]  # whether that is good or bad


Content = str | Marked


class Column(NamedTuple):
    """A column of a table."""

    heading: str  # what stands above it; empty: nothing
    # labels are on the left, numbers on the right; a sentence may break in a page, and is
    # cut to its first line in text
    kind: Literal["label", "number", "sentence"] = "number"


@dataclass(frozen=True)
class Table:
    """Columns, and rows with as many cells."""

    columns: Sequence[Column]  # from left to right
    rows: Sequence[Sequence[Content]]  # from top to bottom

    def text(self) -> str:
        """Return the table in aligned columns, one line per row."""
        lines = [[column.heading for column in self.columns]]
        lines += [[plain_text(content).partition("\n")[0] for content in row] for row in self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        sides = [">" if column.kind == "number" else "<" for column in self.columns]
        layout = "  ".join(f"{{:{s}{w}}}" for s, w in zip(sides, widths, strict=True))
        return "\n".join(layout.format(*cells).rstrip() for cells in lines)


def failing(text: str, fails: bool) -> Content:
    """Return a cell, marked if what it says is bad."""
    return Marked(text, "bad") if fails else text


def plain_text(content: Content) -> str:
    """Return what a cell says."""
    return content.text if isinstance(content, Marked) else content
