"""The report as one self-contained HTML file, without scripts and without external resources.

`modes.report` calls `render`. A new kind of item in `report_sections` needs a case in `_render_item`.
"""

import base64
import html
import re
from collections.abc import Sequence

from madformer_jax.reports import report_sections
from madformer_jax.reports.figures import INK, Panel
from madformer_jax.reports.formatting import Annotated, Cell, Table, format_interval, format_number
from madformer_jax.reports.report_sections import Figures, Item, Samples, Section, Text
from madformer_jax.reports.results import Results

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1c; --soft: #5c5c5c; --rule: #dcdcdc; --tint: #f5f6f8;
  --accent: #0b4f8a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e6e6; --soft: #a3a8ad; --rule: #353a40;
  --tint: #1e2227; --accent: #7cb7ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2, summary { font-size: 1.25rem; font-weight: 700; line-height: 1.3; }
h2 { margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 2px solid var(--ink); }
summary { margin: 1.4rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--rule); cursor: pointer; }
code { white-space: nowrap; font: .88em ui-monospace, "DejaVu Sans Mono", monospace; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.question { font-size: 1.1rem; color: var(--soft); }
.answer { font-size: 1.05rem; }
.note { font-size: .85rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; font-size: .9rem; }
a { color: var(--accent); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; white-space: nowrap; }
th { border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
td.words { white-space: normal; min-width: 9rem; max-width: 17rem; }
td small { display: block; color: var(--soft); font-size: .76rem; }
td b { color: var(--accent); }
td.label, th.label { position: sticky; left: 0; background: var(--paper); padding-right: 1.2rem; font-weight: 600; }
pre { background: var(--tint); padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60rem;
  font: .78rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre div { padding-left: 2em; text-indent: -2em; } pre span { display: inline-block; text-indent: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem; }
.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important; }
.strip { margin: 0 0 .5rem; max-width: 34rem; }
.strip figcaption { font-size: .85rem; font-weight: 600; }
.strip img { display: block; width: 100%; image-rendering: pixelated; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { td.label { white-space: normal; min-width: 6rem; max-width: 8rem; }
  body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.4rem; } th, td { padding-right: .7rem; } }
@media print { .scroll { overflow: visible; } }
"""


def render(results: Results, sections: Sequence[Section]) -> str:
    """Returns the page of a sweep."""
    links = "".join(
        f'<a href="#s{i}">{_escape(section.title)}</a>' for i, section in enumerate(sections) if not section.folded
    )
    legend = (
        "In tables of scores, each number is a mean over training seeds. Below it are its 95 % t-interval and the value of "
        "every seed. In tables of differences, its simultaneous interval is below it. The best mean of compared rows and "
        "clear differences are bold. ↓: lower is better. ↑: higher is better."
    )
    status = f"<p>{_escape(report_sections.status(results))}</p>"
    guide = f'<h2>How to read this page</h2>\n{status}\n<p class="note">{_escape(legend)}</p>\n<nav>{links}</nav>'
    return render_page(report_sections.heading(results), results.question, sections, guide)


def render_page(title: str, lead: str, sections: Sequence[Section], guide: str = "") -> str:
    """Returns a page with a title, a first paragraph and sections. `guide` is HTML after the first section."""
    parts = [_render_section(i, section) for i, section in enumerate(sections)]
    parts[1:1] = [guide] if guide else []
    question = f'<p class="question">{_escape(lead)}</p>\n' if lead else "\n"
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{_escape(title)}</h1>\n{question}{body}\n</body>\n</html>\n"
    )


def _render_section(i: int, section: Section) -> str:
    inside, title = "\n".join(map(_render_item, section.items)), _escape(section.title)
    if section.folded:
        return f'<details id="s{i}"><summary>{title}</summary>\n{inside}\n</details>'
    return f'<section id="s{i}"><h2>{title}</h2>\n{inside}\n</section>'


def _render_item(item: Item) -> str:
    if isinstance(item, Text):
        return "".join(f'<p class="answer">{_escape(paragraph)}</p>' for paragraph in item.paragraphs)
    if isinstance(item, Table):
        return _render_table(item)
    if isinstance(item, Figures):
        kind = "panels two" if len(item.panels) in (2, 4) else "panels"
        panels = "".join(f"<figure>{_inline_svg(panel)}</figure>" for panel in item.panels)
        title = f"<h3>{_escape(item.title)}</h3>\n" if item.title else ""
        caption = f'<p class="note">{_escape(item.caption)}</p>' if item.caption else ""
        return f'{title}<div class="{kind}">{panels}</div>{caption}'
    if isinstance(item, Samples):
        return _render_samples(item)
    rows = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in item.rows)
    return f"<h3>{_escape(item.title)}</h3>\n<dl>{rows}</dl>"


def _render_table(table: Table) -> str:
    head = "".join(f"<th{_label_class(j)}>{_escape(name)}</th>" for j, name in enumerate(table.header))
    rows = [
        "".join(_render_cell(x, j, (i, j) in table.best) for j, x in enumerate(row)) for i, row in enumerate(table.rows)
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    command = (
        f'<p class="note">{_escape(table.command_caption)}:</p><pre>{_render_command(table.command)}</pre>'
        if table.command
        else ""
    )
    return (
        f'<h3>{_escape(table.title)}</h3>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        f"</tbody></table></div>\n{note}{command}"
    )


def _render_command(lines: str) -> str:
    """Formats shell commands so that they wrap only between flags."""
    words = ([f"<span>{html.escape(word)}</span>" for word in line.split(" ")] for line in lines.split("\n"))
    return "".join(f"<div>{' '.join(line)}</div>" for line in words)


def _label_class(column: int) -> str:
    return "" if column else ' class="label"'


def _render_cell(x: Cell, column: int, best: bool) -> str:
    if isinstance(x, str):
        first, *others = x.split("\n")
        words = ' class="words"' if column and len(first) > 30 else _label_class(column)
        return f"<td{words}>{_escape(first)}{''.join(f'<small>{_escape(line)}</small>' for line in others)}</td>"
    if isinstance(x, Annotated):
        x, note = x
    else:
        note = " ".join(map(format_number, x.values)) if len(x.values) > 1 else ""
    mean = f"<b>{_escape(format_number(x.mean))}</b>" if best else _escape(format_number(x.mean))
    small = "".join(f"<small>{_escape(line)}</small>" for line in (format_interval(x), note) if line)
    return f"<td>{mean}{small}</td>"


def _render_samples(item: Samples) -> str:
    rows = "".join(
        f'<figure class="strip"><figcaption>{_escape(strip.label)}</figcaption><img alt="samples of {_escape(strip.label)}" '
        f'src="data:image/png;base64,{base64.b64encode(strip.png).decode()}"></figure>'
        for strip in item.strips
    )
    return f"<h3>{_escape(str(item.budget))}</h3>\n{rows}"


def _inline_svg(panel: Panel) -> str:
    """Returns the SVG of a panel for use within a page.

    Removes the XML header, the fixed size, and ids that would occur in several panels.
    """
    svg = panel.svg.decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|QuadMesh)_?\d+"', "", svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size[0] if size else ""} role="img" aria-label="{_escape(panel.alt)}">'
    svg = re.sub(rf"(fill|stroke): {INK}(?=[;\"])", r"\1: var(--soft)", svg)
    return opening + svg[svg.index(">") + 1 :].replace("\n", "")


def _escape(x: str) -> str:
    """Escapes text for HTML, with typographic minus signs and with code for text in backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", re.sub(r"(?<![\w.=-])-(?=\d)", "−", html.escape(x)))
