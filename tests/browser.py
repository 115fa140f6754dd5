"""Pages in a real browser, by Playwright and Debian's Chromium; tests that need them skip where they are not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@contextmanager
def browser() -> Iterator[Any]:
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


def check(opened: Any, file: Path, shots: Path | None = None) -> None:
    """A page is sound: no error on the console, nothing asked of a network, nothing wider than the screen, no word cut,
    readable.

    Args:
        shots: a folder for screenshots.
    """
    for size, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            wrong: list[str] = []
            page.on("console", lambda m, wrong=wrong: wrong.append(f"console: {m.text}"))
            page.on("pageerror", lambda e, wrong=wrong: wrong.append(f"error: {e}"))
            page.on(
                "request",
                lambda r, wrong=wrong: None if r.url.startswith(("file:", "data:")) else wrong.append(f"asks {r.url}"),
            )
            page.goto(file.resolve().as_uri())
            assert wrong == [], (size, scheme, wrong)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (size, scheme, f"{wide} pixels wide")
            cut = page.evaluate(CUT_WORDS)
            assert cut == [], (size, scheme, cut)
            worst = page.evaluate(CONTRAST)
            assert worst["ratio"] >= 4.5, (size, scheme, worst)
            if shots is not None:
                page.screenshot(path=shots / f"{file.stem}-{size}-{scheme}.png", full_page=True)
            page.close()


# words, and parts of names between their dots and dashes, that lie on two lines; a hash has no better place
CUT_WORDS = """
() => {
  const cut = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest('pre, svg') || !node.parentElement.checkVisibility()) continue;
    for (const word of node.textContent.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      const whole = !word[0].includes('-') && !/^[0-9a-f]{64}$/.test(word[0]);
      if (lines.size > 1 && whole) cut.push(word[0]);
    }
  }
  return cut;
}
"""

# the least contrast of a text to what is behind it, by WCAG's formula; shades over the page's own colour are blended
CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    if (!element) return rgba('white');
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  let worst = {ratio: 21, text: ''};
  for (const element of document.querySelectorAll('body *')) {
    const said = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!said || !element.checkVisibility()) continue;
    const svg = element.namespaceURI.endsWith('svg');
    const style = getComputedStyle(element), under = behind(element);
    const [a, b] = [light(over(rgba(svg ? style.fill : style.color), under)), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst.ratio) worst = {ratio, text: element.textContent.slice(0, 40)};
  }
  return worst;
}
"""
