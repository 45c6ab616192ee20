"""The parts that all pages share: the frame with its style sheet, and tables.

A page is one file. Nothing is fetched and no script runs, so it can be mailed, archived and opened anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Limit of a table cell that stays on one line; a phone is about 1.5 times as wide.
_MOST_CHARS_ON_A_LINE = 32


class Markup(str):
    """HTML that must not be escaped again."""

    __slots__ = ()


def escaped(text: object) -> str:
    """Return a text escaped for HTML."""
    return text if isinstance(text, Markup) else html.escape(str(text))


def document(kind: str, title: str, sections: Iterable[str], extra_style: str = "") -> str:
    """Return a whole page.

    Args:
        kind: the subject of the page, shown above the title.
        title: the title of the page, as text.
        sections: HTML of each section.
        extra_style: CSS rules after those of all pages.
    """
    title = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{extra_style}</style></head><body><main><header><p>{kind}</p>"
        f"<h1>{title}</h1></header>{''.join(sections)}</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls in its own container; cells are texts, or ``Markup``.

    Short cells stay on one line. Running text wraps in a column with a minimum width.
    """
    top = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: object) -> str:
    text = escaped(cell)
    is_running = not isinstance(cell, Markup) and len(str(cell)) > _MOST_CHARS_ON_A_LINE
    return f'<td class="text">{text}</td>' if is_running else f"<td>{text}</td>"


STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1f2328;--muted:#686e77;--rule:#e4e2dd;--a:#0072b2;--b:#d55e00;--c:#009e73;
--d:#aa4499;--right:#00734f;--shade:75%;color-scheme:light dark}@media(prefers-color-scheme:dark){
:root{--bg:#15171a;--card:#1e2125;--ink:#e8e6e3;--muted:#8b929b;--rule:#33373d;--a:#56b4e9;--b:#f0a04b;
--c:#35c79a;--d:#d98cc9;--right:#5fd3a6;--shade:45%}}*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
main{max-width:1160px;margin:0 auto;padding:2rem 1.25rem 4rem}h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}
main>header p{margin:0;color:var(--muted)}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
h3{font-size:.95rem;margin:0;line-height:1.3}p{margin:.25rem 0 .75rem;max-width:46rem}
.tiles{display:grid;gap:.75rem;margin:1.5rem 0 0;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr))}
.tiles div,figure,article{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:.75rem .9rem;min-width:0}dt{color:var(--muted);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-weight:600}
.charts{display:grid;gap:1rem;align-items:start;margin:.75rem 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}figure{margin:0}
figcaption{font-weight:600;font-size:.95rem}svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--muted)}
.legend svg{width:18px;display:inline-block;margin-right:.35rem;vertical-align:middle}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.25rem 0 0;padding:0;font-size:.82rem}
.grid{stroke:var(--rule)}polyline,.legend path{fill:none;stroke-width:2}.raw{stroke-width:1;opacity:.55}
.dashed{stroke-dasharray:5 4}.scroll{overflow-x:auto;margin:.5rem 0 1rem}pre{font-size:.72rem;line-height:1.45}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{vertical-align:bottom}td{white-space:nowrap}.text{white-space:normal;min-width:15rem;max-width:40rem;overflow-wrap:anywhere}
.cards{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
.cards.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
article header{display:flex;gap:.75rem;align-items:center}
h3 small{display:block;font-weight:400;color:var(--muted)}
img{image-rendering:auto;border-radius:4px;background:#fff;flex:none;object-fit:contain}
article ol{list-style:none;margin:.6rem 0 0;padding:0;font-size:.82rem}
.cards:not(.wide) li{display:grid;grid-template-columns:minmax(0,1fr) 3.5rem 2.4rem;gap:.5rem;align-items:center}
li span{overflow-wrap:anywhere}li i{font-style:normal;text-align:right;color:var(--muted)}
.right{color:var(--right);font-weight:600}meter{width:100%;height:.6rem}
.pair>div{display:flex;gap:.75rem;align-items:flex-start}
.pair>div+div{border-top:1px solid var(--rule);margin-top:.6rem;padding-top:.6rem;justify-content:space-between;
align-items:center}.pair ol{margin:0}.pair q{font-size:.85rem}.pair span{display:flex;gap:.3rem}
.matrix th,.matrix td{padding:.15rem .3rem;text-align:center;vertical-align:middle;border:0;font-size:.78rem}
.matrix th img{vertical-align:middle}.matrix tbody th{white-space:nowrap}
.matrix td{background:color-mix(in srgb,var(--a) calc(var(--v)*var(--shade)),transparent);min-width:2rem}
.matrix .own{outline:2px solid var(--b);outline-offset:-2px;font-weight:700}
.captions{columns:2 22rem;font-size:.82rem;color:var(--muted);padding-left:1.6rem}details{margin-top:1.5rem}
summary{cursor:pointer;font-size:1.25rem;font-weight:600}.warning{border-left:4px solid var(--b);padding-left:.9rem;
margin:1.25rem 0 0}.warning p{margin:0;font-weight:600}
"""
