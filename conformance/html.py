"""Pieces of a page: elements, tables, badges, and how they look."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

from conformance.plots import PALETTE


def tag(name: str, *content: str, **attributes: str) -> str:
    """An element. Content is HTML already; attributes are escaped (`class_` stands for class)."""
    written = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{written}>{''.join(content)}</{name}>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already. On a narrow screen each row is a block of heads and cells."""
    head = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in heads)))
    lines = ("".join(tag("td", cell, data_head=h) for h, cell in zip(heads, row, strict=True)) for row in rows)
    return tag("table", head, tag("tbody", *(tag("tr", line) for line in lines)))


def folded(title: str, content: str, *, unfolded: bool = False) -> str:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", title), content, **({"open": ""} if unfolded else {}))


def prose(text: str) -> str:
    """Plain text as HTML, with `code` in backticks; no line ends inside a number such as 1e-12."""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\d[\d.]*e-\d+", r'<span class="n">\g<0></span>', marked)


def badge(passed: bool) -> str:
    return tag("span", "pass" if passed else "fail", class_="badge good" if passed else "badge bad")


def number(x: float) -> str:
    return f"{x:.1e}" if isfinite(x) else "not finite"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}%"


def each(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    """Values of all drivers in one line; one value where all show the same."""
    shown = {name: show(value) for name, value in values.items()}
    if len(shown) > 1 and len(set(shown.values())) == 1:
        return f"{next(iter(shown.values()))} in each of {', '.join(map(escape, shown))}"
    return ", ".join(f"{escape(name)} {value}" for name, value in shown.items()) or "–"


CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:70rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .5rem}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .25rem;overflow-wrap:anywhere}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
section>p{max-width:52rem}
a{color:inherit;text-decoration-color:var(--muted);text-underline-offset:.2em}
.lead{font-size:1.1rem;margin:0 0 1.5rem;max-width:52rem}
.muted{color:var(--muted)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:.8rem 1.5rem;margin:0 0 1.5rem;
background:var(--card);padding:1rem 1.25rem;border-radius:.6rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0;font-size:.95rem}
.wide{grid-column:1/-1}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.75rem 0}
th{font-weight:500;color:var(--muted);font-size:.8rem;text-align:left;vertical-align:bottom}
th,td{padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--rule)}
td{vertical-align:top}
.n,.badge{white-space:nowrap}
details{margin:0 0 1.5rem}
summary{cursor:pointer;color:var(--muted)}
@media(max-width:48rem){
main{padding-top:1.5rem}
thead{display:none}
tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--rule)}
td{display:block;position:relative;padding:.15rem 0 .15rem 8rem;border:0;min-height:1.8rem}
td::before{content:attr(data-head);position:absolute;left:0;color:var(--muted);font-size:.8rem;line-height:1.85}
}
code{font:.92em ui-monospace,Menlo,Consolas,monospace}
.badge{display:inline-block;font-size:.78rem;font-weight:600;line-height:1;padding:.25em .6em;border-radius:1em;
border:1px solid currentColor;vertical-align:.15em}
.good{color:var(--good)}
.bad{color:var(--bad)}
.plots{display:grid;margin:1rem 0 .5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem 1.5rem}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit!important}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
"""


def palette_css() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
