"""What all pages share: the document and its style, text made safe, tables whose cells may be bars or shades.

There is no script and nothing is fetched: a policy in the page itself forbids both. Colours are variables that follow
the reader's choice of light or dark, and what is wider than a phone scrolls by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--dim:#59636e;--line:#d1d9e0;--card:#f6f8fa;--hot:#d9480f;
--bar:#b6d4fb;--a:#0969da;--b:#9a6700;--c:#1a7f37;--mark:#fff3bf}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--line:#3d444d;--card:#151b23;
--hot:#b34a12;--bar:#1f4b82;--a:#58a6ff;--b:#d9a93a;--c:#4ac26b;--mark:#4d3d00}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 .25rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}
.dim{color:var(--dim);font-size:.875rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.5rem;margin:1rem 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.5rem .75rem}
.facts b{display:block;font-size:1.15rem;font-weight:600}
.facts span{color:var(--dim);font-size:.8rem}
.wide{overflow-x:auto;margin:.5rem 0;scrollbar-width:thin;background:
linear-gradient(90deg,var(--bg) 40%,transparent) 0 0/2rem 100% no-repeat local,
linear-gradient(270deg,var(--bg) 40%,transparent) 100% 0/2rem 100% no-repeat local,
linear-gradient(90deg,var(--line),transparent) 0 0/.7rem 100% no-repeat scroll,
linear-gradient(270deg,var(--line),transparent) 100% 0/.7rem 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600}
tbody th{min-width:8rem}
.short tbody th{min-width:0}
thead th{vertical-align:bottom}
.n{text-align:right;white-space:nowrap}
.bar{background:linear-gradient(90deg,var(--bar) var(--v),transparent var(--v)) no-repeat 0/calc(100% - .4rem)}
td:not(.n){min-width:7rem}
.hash{overflow-wrap:anywhere}
.heat td[style]{background:color-mix(in srgb,var(--hot) var(--v),transparent)}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem;overflow-x:auto;
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.folds{white-space:pre-wrap;overflow-wrap:anywhere}
.said{white-space:pre-wrap;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.5rem .75rem}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.75rem;margin:.5rem 0 1.25rem}
.side h3{margin:0 0 .25rem;font-size:.875rem;color:var(--dim);font-weight:600}
mark{background:var(--mark);color:inherit}
summary{cursor:pointer;margin:.5rem 0}
ul{padding-left:1.25rem}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:13px}
svg .axis{stroke:var(--line);stroke-width:1}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:40rem){body{padding:.75rem}table{font-size:.8rem}th,td{padding:.2rem .35rem}svg text{font-size:24px}
tbody th{min-width:6.5rem}td:not(.n){min-width:5.5rem}
table:not(.whole) :is(tbody th,th:first-child){position:sticky;left:0;background:var(--bg)}
.heat{font-size:.68rem;letter-spacing:-.02em}.heat th,.heat td{padding:.15rem .2rem}
.heat:not(.short) tbody th{min-width:6rem}}
@media print{details{display:block}}
"""


LONG = 10  # letters of a word that may not fit where it stands


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Cell:
    """A cell with a shade: `share` from 0 to 1 is the length of its bar, or in a heat table the depth of its colour."""

    text: str
    share: float


def safe(value: object) -> Html:
    """Text for a page; what is HTML stays so."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def broken(text: object) -> Html:
    """Text in which a long name may end a line after a dot, a dash and the like, and not inside a word."""
    if isinstance(text, Html):
        return text

    def word(part: str) -> str:
        pieces = re.split(r"(?<=[./+\-:=,])(?=\w)", part) if len(part) >= LONG else [part]
        return "<wbr>".join(map(escape, pieces))

    return Html("".join(map(word, re.split(r"(\s+)", str(text)))))


def page(title: str, below: str, parts: Iterable[str]) -> str:
    """A whole document.

    Args:
        below: a line under the title.
        parts: HTML, in order.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,">\n<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>',
        f'<h1>{broken(title)}</h1>\n<p class="dim">{broken(below)}</p>',
        *parts,
        "</body>\n</html>\n",
    ])  # fmt: skip


def section(name: str, *parts: str) -> Html:
    """A heading and what is under it; an anchor by its name."""
    anchor = name.lower().replace(" ", "-")
    return Html(
        f'<section id="{safe(anchor)}">\n<h2>{safe(name)}</h2>\n' + "\n".join(map(safe, parts)) + "\n</section>"
    )


def paragraph(text: str, *, dim: bool = False) -> Html:
    """Text; what stands in `backquotes` is code."""
    inside = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe(text))
    return Html(f'<p class="dim">{inside}</p>' if dim else f"<p>{inside}</p>")


def facts(values: dict[str, str]) -> Html:
    """Figures with their names, as cards."""
    cards = "".join(f"<div><b>{safe(value)}</b><span>{safe(name)}</span></div>" for name, value in values.items())
    return Html(f'<div class="facts">{cards}</div>')


def table(
    head: Sequence[str], rows: Iterable[Sequence[str | Cell]], *, words: Collection[str] = (), heat: bool = False,
    whole: bool = False,
) -> Html:  # fmt: skip
    """A table that scrolls by itself.

    Args:
        words: names of the columns that are text, as the first is; the others are figures, set to the right.
        heat: cells with a share are shaded, not barred.
        whole: names stay on one line.
    """

    figures = [i > 0 and name not in words for i, name in enumerate(head)]

    def cell(i: int, value: str | Cell) -> str:
        tag = "td" if i else "th"
        kind = ["n"] if figures[i] else []
        style = ""
        if isinstance(value, Cell):
            kind += [] if heat else ["bar"]
            share = max(0.0, min(1.0, value.share)) * (0.75 if heat else 1)
            style, value = f' style="--v:{100 * share:.1f}%"', value.text
        name = f' class="{" ".join(kind)}"' if kind else ""
        scope = "" if i else ' scope="row"'
        return f"<{tag}{scope}{name}{style}>{safe(value) if figures[i] or whole else broken(value)}</{tag}>"

    titles = "".join(f'<th scope="col"{" class=n" if figures[i] else ""}>{broken(t)}</th>' for i, t in enumerate(head))
    body = "\n".join("<tr>" + "".join(cell(i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    kinds = [*(["heat"] if heat else []), *(["whole"] if whole else [])]
    kinds += ["short"] if head[0] in ("block", "phase") else []
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return Html(
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{titles}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def code(text: str, *, folds: bool = False) -> Html:
    """Text as it is written; with `folds` long lines are folded, and paste as they are."""
    return Html(f'<pre tabindex="0"{" class=folds" if folds else ""}>{safe(text)}</pre>')


def bullets(items: Iterable[str]) -> Html:
    return Html("<ul>" + "".join(f"<li>{broken(item)}</li>" for item in items) + "</ul>")


def folded(name: str, *parts: str) -> Html:
    """What is shown when its name is clicked."""
    return Html(f"<details><summary>{safe(name)}</summary>\n" + "\n".join(map(safe, parts)) + "\n</details>")


def answers(prompt: str, said: dict[str, str]) -> Html:
    """Answers to a prompt side by side; where one leaves the first, the rest is marked."""
    first = next(iter(said.values()))

    def marked(text: str) -> Html:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, text, strict=False)))
        rest = f"<mark>{safe(text[same:])}</mark>" if same < len(text) else ""
        return Html(f"{safe(text[:same])}{rest}")

    columns = "".join(
        f'<div><h3>{broken(name)}</h3><div class="said">{marked(text) if text else "(nothing)"}</div></div>'
        for name, text in said.items()
    )
    return Html(f'<p><b>{safe(prompt)}</b></p><div class="side">{columns}</div>')


def versions(found: dict[str, str]) -> Html:
    """A section of the versions that a result depends on."""
    return section("Versions", table(("package", "version"), found.items(), words=("version",)))
