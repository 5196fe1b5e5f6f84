"""Pages in a headless Chromium: how they look, and what is measured of their layout."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW = (
    "the browser tests need Chromium on the PATH, under one of the names "
    f"{', '.join(NAMES)}: on Debian or Ubuntu, apt-get install chromium"
)
WIDTHS = (390, 820, 1280)
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers for them
TALL = 12_000  # a window in which a whole page is seen

MEASURE = """
<script>
const luminance = colour => {
  const c = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow;
    const paper = view.getComputedStyle(page.body).backgroundColor;
    const pictures = [...page.querySelectorAll("svg, img")].map(each => {
      const box = each.getBoundingClientRect();
      const texts = [...each.querySelectorAll("text")];
      return {
        left: box.left, right: box.right, width: box.width, height: box.height,
        drawn: each.tagName == "IMG" ? each.naturalWidth
          : [...each.querySelectorAll("path, use")].filter(p => p.getBBox().width > 0).length,
        smallest: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
        contrast: Math.min(...texts.map(t => contrast(view.getComputedStyle(t).fill, paper))),
      };
    });
    const root = page.documentElement;
    return {
      width: view.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, pictures,
      contrast: contrast(view.getComputedStyle(page.body).color, paper),
    };
  });
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>
"""


def chromium(page: Path, scheme: str, *options: str) -> str:
    """What a Chromium of its own prints of a page; fails where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(HOW)
    words = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={page.parent}/profile"]
    words += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *options, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def frame(text: str, width: int, height: int) -> str:
    """A page as a frame of another: a window is never as narrow as a phone."""
    return (
        f'<iframe srcdoc="{html.escape(text)}" '
        f'style="width:{width}px;height:{height}px;border:0;display:block"></iframe>'
    )


def measured(text: str, scheme: str, folder: Path) -> list[dict[str, Any]]:
    """The layout of a page at each width."""
    page = folder / f"measure-{scheme}.html"
    frames = "".join(frame(text, width, 800) for width in WIDTHS)
    page.write_text(f"<!doctype html><body>{frames}{MEASURE}</body>")
    dom = chromium(page, scheme, "--window-size=1400,900", "--dump-dom")
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom)
    numbers: list[dict[str, Any]] = json.loads(html.unescape(found))
    return numbers


def pictured(text: str, scheme: str, width: int, height: int, picture: Path) -> Path:
    """A screenshot of the whole page at one width."""
    page = picture.with_suffix(".html")
    style = f"<meta name=color-scheme content={scheme}><style>body{{margin:0}}</style>"
    page.write_text(f"<!doctype html>{style}<body>{frame(text, width, height)}</body>")
    size = f"--window-size={max(width, 500)},{height}"
    chromium(page, scheme, size, f"--screenshot={picture}")
    return picture
