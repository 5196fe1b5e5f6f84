"""One HTML page that needs nothing else: text, tables, and figures as SVG that follow its colours.

No script and no network: it can be read offline, on a phone, in a light or a dark room.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from distsampler.store.integrity import printable
from distsampler.table import Column, Content, Marked, Table, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, PAPER = "#010203", "#010204"  # stand for the page's colours until a figure is in the page
SIZE = (5.2, 3.5)  # inches: so small that its text can still be read at a phone's width
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels may be any text
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.spines.top": False,
    "legend.facecolor": PAPER,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(
        ("axes.edgecolor", "xtick.color", "ytick.color", "legend.edgecolor"), "#888888"
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
STYLE = (files("distsampler.report") / "page.css").read_text("utf-8")


@dataclass(frozen=True)
class Html:
    """Text that is markup already, and is not escaped again."""

    text: str


@dataclass
class Page:
    """A page that is being written."""

    title: str
    header: Html  # what stands above the table of contents
    _sections: list[tuple[str, str]] = field(default_factory=list)

    def section(self, heading: str, *parts: Html) -> None:
        """Add a section; one without parts is left out."""
        if parts:
            self._sections.append((heading, "".join(part.text for part in parts)))

    def text(self) -> str:
        """Return the whole document."""
        links = "".join(f'<a href="#{_slug(h)}">{escape(h)}</a>' for h, _ in self._sections)
        body = "".join(
            f'<section id="{_slug(h)}"><h2>{escape(h)}</h2>{t}</section>' for h, t in self._sections
        )
        return printable(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{escape(self.title)}</h1>{self.header.text}"
            f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>'
        )


def paragraph(text: str | Html, style: str = "") -> Html:
    """Return a paragraph, in a class of the style sheet."""
    inner = text.text if isinstance(text, Html) else escape(text)
    return Html(f"<p{f' class={style!r}' if style else ''}>{inner}</p>")


def header(status: str, headline: str, *parts: Html) -> Html:
    """Return what stands on top of a page, in the colour of a verdict."""
    text = "".join(part.text for part in parts)
    return Html(f'<header class="{status}"><p class="big">{escape(headline)}</p>{text}</header>')


def code(text: str) -> Html:
    """Return lines to copy."""
    return Html(f'<pre tabindex="0">{escape(text)}</pre>')


def folded(summary: str, *parts: Html) -> Html:
    """Return a summary line that unfolds the parts."""
    text = "".join(part.text for part in parts)
    return Html(f"<details><summary>{escape(summary)}</summary>{text}</details>")


def table(made: Table) -> Html:
    """Return a table, which scrolls by itself where it is too wide."""
    headings = [column.heading for column in made.columns]
    kinds = ["" if each.kind == "number" else f" class={each.kind}" for each in made.columns]
    head = "".join(
        f"<th scope=col{kind}>{escape(heading)}</th>"
        for kind, heading in zip(kinds, headings, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(c)}</td>" for kind, c in zip(kinds, row, strict=True))
        for row in made.rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    return Html(f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</table></div>')


def pairs(rows: Iterable[tuple[str, str]]) -> Html:
    """Return a table of names and what belongs to each."""
    return table(Table((Column("", "label"), Column("", "sentence")), tuple(rows)))


def figures(*drawn: Html, wide: bool = False) -> Html:
    """Return figures side by side where there is room, or each as wide as the page."""
    kind = "figures wide" if wide else "figures"
    return Html(f'<div class="{kind}">{"".join(each.text for each in drawn)}</div>')


def figure(
    draw: Callable[[Axes], Axes], alt: str, caption: str, size: tuple[float, float] = SIZE
) -> Html:
    """Return a figure as SVG, its text as text, in the colours of the page.

    Args:
        draw: draws on the Axes it is given.
        alt: what there is to see, for those who do not see it.
        caption: how to read the figure.
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**RC, "svg.hashsalt": alt}):
        sheet = Figure(figsize=size, layout="constrained")
        draw(sheet.subplots())
        sheet.savefig(buffer, format="svg", metadata=nothing)
    svg = _inline(buffer.getvalue(), alt)
    return Html(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")


def _inline(svg: str, alt: str) -> str:
    """An SVG document as an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"#000000|" + INK, "currentColor", svg).replace(PAPER, "var(--paper)")
    svg = re.sub(r'(?<= d=")[^"]*', _rounded, svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _rounded(path: re.Match[str]) -> str:
    """A path with coordinates to a hundredth of a point."""
    return re.sub(r"\.\d{3,}", lambda digits: digits[0][:3], " ".join(path[0].split()))


def _cell(content: Content) -> str:
    text = escape(plain_text(content))
    return f'<b class="{content.mark}">{text}</b>' if isinstance(content, Marked) else text


def _slug(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")
