"""The guide: pages of Markdown in ``distsampler/guide``, shipped with the package."""

from __future__ import annotations

import sys
from importlib.resources import files

from distsampler.errors import ConfigError, unknown_name

FOLDER = files("distsampler") / "guide"


def names() -> list[str]:
    """Return the names of the pages."""
    return sorted(file.name[:-3] for file in FOLDER.iterdir() if file.name.endswith(".md"))


def text(page: str) -> str:
    """Return the Markdown of a page.

    Raises:
        ConfigError: if there is no such page.
    """
    if page not in names():
        raise ConfigError(unknown_name("page", page, names()))
    return (FOLDER / f"{page}.md").read_text("utf-8")


def show(page: str) -> None:
    """Print a page: rendered on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.write(text(page))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text(page)))


def contents() -> str:
    """Return a line for each page: its name and title."""
    width = max(map(len, names()))
    return "\n".join(f"{name:{width}}  {_title(name)}" for name in names())


def _title(page: str) -> str:
    return text(page).partition("\n")[0].lstrip("# ")
