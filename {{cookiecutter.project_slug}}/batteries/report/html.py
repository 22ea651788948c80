"""A self-contained HTML report: no scripts, no fonts, no other files. Text from outside is escaped."""

import base64
import html
import struct
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import write_output
from batteries.report.plots import MARK, Plot

# The browser loads nothing and runs no script, whatever the text contains: developer.mozilla.org/docs/Web/HTTP/CSP
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# Characters that are not valid in XML in any form.
CONTROL = {code: None for code in [*range(0x20), 0x7F, 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)] if code not in (9, 10)}

# In dark mode plots are inverted and their hues are rotated back: white becomes the colour of `--card` in dark mode.
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1d1d1f; --soft: #66666b; --line: #e2e2df;
  --mark: #fff3cf; --link: #0060a0; }
@media (prefers-color-scheme: dark) { :root { --page: #111112; --card: #1a1a1a; --ink: #e7e7e5; --soft: #a0a0a6;
  --line: #333336; --mark: #423712; --link: #7fc1f5; } .plot img { filter: invert(0.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.75rem; } h3 { font-size: 1rem; margin: 1.75rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; } a { color: var(--link); }
.soft, figcaption, small { color: var(--soft); }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
.note { background: var(--mark); border-radius: 0.5rem; padding: 0.6rem 0.9rem; max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 1.5rem 0; }
.tiles div, .plot, .table, .samples li { background: var(--card); border: 1px solid var(--line);
  border-radius: 0.6rem; }
.tiles div { padding: 0.8rem 1rem; } .tiles b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 600; }
.tiles span, .tiles small { display: block; font-size: 0.85rem; } .tiles span { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 0.75rem;
  align-items: start; }
.plot { margin: 0; padding: 0.6rem; } .plot img { display: block; width: 100%; height: auto; }
.wide { grid-column: 1 / -1; overflow-x: auto; } .wide img { min-width: 38rem; max-width: 52rem; margin: 0 auto; }
.table { overflow: auto; max-height: 44rem; margin: 0.75rem 0; }
.plots .table, .plots h3, .plots p { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; max-width: 30rem; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } tr.differs td { background: var(--mark); }
.n { text-align: right; white-space: nowrap; } .words td { overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1.25rem 0.9rem 3rem; } table { font-size: 0.8rem; }
  th, td { padding: 0.3rem 0.5rem; } th { white-space: normal; } .words td { min-width: 6rem; } }
.samples { list-style: none; margin: 0.75rem 0; padding: 0; display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.samples li { padding: 0.6rem; font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere; }
.samples img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; margin-bottom: 0.4rem;
  image-rendering: pixelated; } .samples .large { image-rendering: auto; }
.samples b, .samples span, .samples small { display: block; }
details { margin: 0.75rem 0; } summary { cursor: pointer; color: var(--link); }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.85rem; }
"""


class Html(str):
    """Text that is HTML; all other text is escaped when it is put into a report."""


class Aside(Html):
    """HTML that is placed next to plots if the window is wide enough."""


class Section(NamedTuple):
    """A section of a report, with its title and content."""

    title: str
    content: Sequence[Html | Plot]

    @property
    def anchor(self) -> str:
        """The target of links to the section."""
        return self.title.lower().replace(" ", "-")


def escape(value: object) -> Html:
    """Convert a value to HTML that displays it; HTML is returned unchanged."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).translate(CONTROL)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Build an element.

    Args:
        name: The name of the element.
        children: Its content; what is not HTML is escaped.
        attributes: Its attributes; None omits one. A name that Python reserves ends in an underscore, such as `class_`.
    """
    written = [f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value is not None]
    opening = name + "".join(written)
    if name in ("img", "meta"):
        return Html(f"<{opening} />")
    content = "".join(escape(child) for child in children)
    return Html(f"<{opening}>{content}</{name}>")


def make_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    text_columns: int = 1,
    highlighted: bool = False,
) -> Html:
    """Build a table.

    Args:
        header: The names of the columns.
        rows: The cells.
        text_columns: The number of columns, from the left, that hold text; the others hold numbers, aligned right.
        highlighted: Whether all rows are highlighted.
    """
    classes = [None if column < text_columns else "n" for column in range(len(header))]
    names = [tag("th", name, class_=class_) for name, class_ in zip(header, classes, strict=True)]
    lines = []
    for row in rows:
        cells = [tag("td", cell, class_=class_) for cell, class_ in zip(row, classes, strict=True)]
        lines.append(tag("tr", *cells, class_="differs" if highlighted else None))
    table = tag("table", tag("thead", tag("tr", *names)), tag("tbody", *lines))
    return tag("div", table, class_="table words" if text_columns >= len(header) else "table")


class Tile(NamedTuple):
    """A key number, with its name and a comment."""

    name: str
    number: str
    comment: str


def make_tiles(tiles: Sequence[Tile]) -> Html:
    """Build a row of key numbers."""
    made = [tag("div", tag("span", name), tag("b", number), tag("small", comment)) for name, number, comment in tiles]
    return tag("div", *made, class_="tiles")


def make_image(png: bytes, alt: str, class_: str | None = None) -> Html:
    """Embed a PNG file, with an alternative text."""
    width, height = png_size(png)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return tag("img", src=source, alt=alt, width=width, height=height, class_=class_)


def png_size(png: bytes) -> tuple[int, int]:
    """Return the width and height of a PNG file, in pixels."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def collapsible(summary: str, *children: object) -> Html:
    """Build a block that is collapsed until its summary is clicked."""
    return tag("details", tag("summary", summary), *children)


def make_report(title: str, subtitle: str, lead: Sequence[Html], sections: Sequence[Section], footer: str) -> str:
    """Build the complete report.

    Args:
        title: The heading.
        subtitle: The line below the heading.
        lead: What comes before the first section.
        sections: The sections, each with a link at the top.
        footer: The last line.
    """
    links = tag("nav", *(tag("a", section.title, href=f"#{section.anchor}") for section in sections))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=MARK),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}" />'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    top = tag("header", tag("h1", title), tag("p", subtitle, class_="soft"), links)
    blocks = [_render_section(section) for section in sections]
    body = tag("body", tag("main", top, *lead, *blocks, tag("footer", footer)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _render_section(section: Section) -> Html:
    """Build a section in which adjacent plots are side by side."""
    blocks = []
    for are_narrow, group in groupby(section.content, _is_narrow):
        rendered = [_render_item(item) for item in group]
        if are_narrow:
            blocks.append(tag("div", *rendered, class_="plots"))
        else:
            blocks += rendered
    return tag("section", tag("h2", section.title), *blocks, id=section.anchor)


def _is_narrow(item: Html | Plot) -> bool:
    return isinstance(item, Plot | Aside)


def _render_item(item: Html | Plot) -> Html:
    if not isinstance(item, Plot):
        return item
    return tag("figure", make_image(item.png, item.alt), class_="plot wide" if item.is_wide else "plot")


def plots_of(sections: Sequence[Section]) -> list[Plot]:
    """List all plots of a report."""
    return [item for section in sections for item in section.content if isinstance(item, Plot)]


def write_report(path: Path, report: str, plots: Sequence[Plot]) -> None:
    """Write the report, and its plots as files in the directory plots/ next to it.

    Raises:
        UserError: If one of the files exists and is not part of an earlier report. Nothing is written.
    """
    directory = path.with_name("plots" if path.name == "report.html" else f"{path.stem}_plots")
    files = {directory / f"{plot.name}.png": plot.png for plot in plots}
    files[path] = report.encode()
    for file in files:
        check_replaceable(file)
    for file, content in files.items():
        write_output(file, lambda target, content=content: target.write(content), "--output")


def check_replaceable(path: Path) -> None:
    """Raise UserError if `path` exists and is not part of an earlier report, so that no user file is overwritten."""
    if path.is_file():
        with path.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    if path.exists():
        raise UserError(f"{path} exists and was not written by tools/report.py; move it, or use another --output.")
