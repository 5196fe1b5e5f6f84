"""The guide: pages of Markdown in ``distsampler/guide``, shipped with the package."""

import sys
from importlib.resources import files

from distsampler.errors import ConfigError, unknown_name


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its name."""
    folder = (files("distsampler") / "guide").iterdir()
    texts = {file.name[:-3]: file.read_text("utf-8") for file in folder if file.name[-3:] == ".md"}
    return dict(sorted(texts.items()))


def contents() -> str:
    """Return a line for each page: its name and title."""
    titles = {name: text.partition("\n")[0].lstrip("# ") for name, text in pages().items()}
    width = max(map(len, titles))
    return "\n".join(f"{name:{width}}  {title}" for name, title in titles.items())


def show(page: str) -> None:
    """Print a page: rendered on a terminal, as it is elsewhere.

    Raises:
        ConfigError: if there is no such page.
    """
    text = pages().get(page)
    if text is None:
        raise ConfigError(unknown_name("page", page, pages()))
    if not sys.stdout.isatty():
        sys.stdout.write(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
