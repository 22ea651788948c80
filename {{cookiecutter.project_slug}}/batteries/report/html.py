"""One HTML page that needs nothing else: no script, no font, no file beside it. What comes from outside is escaped."""

import base64
import html
import struct
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import write_output
from batteries.report.plots import MARK, Plot

# Nothing is loaded, whatever a page says, and no script runs: developer.mozilla.org/docs/Web/HTTP/CSP
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# Characters that XML has no place for, in any form.
CONTROL = {code: None for code in [*range(0x20), 0x7F, 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)] if code not in (9, 10)}

# In the dark, plots are inverted, and their hues turned back: white becomes the colour of `--card` there.
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
    """A text that is HTML; every other text is escaped when it is put into a page."""


class Aside(Html):
    """HTML that stands beside the plots around it, where the page is wide enough."""


class Section(NamedTuple):
    """A part of a page, with a name for links to it."""

    title: str
    parts: Sequence[Html | Plot]

    @property
    def anchor(self) -> str:
        """Its name in the address."""
        return self.title.lower().replace(" ", "-")


def escape(value: object) -> Html:
    """Any value as HTML that shows it; what is HTML stays."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).translate(CONTROL)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; an attribute that python has a word of its own for ends in an underscore, such as `class_`."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value is not None)
    inner = "".join(escape(child) for child in children)
    return Html(f"<{name}{given} />" if name in ("img", "meta") else f"<{name}{given}>{inner}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other."""
    return Html("".join(escape(part) for part in parts))


def make_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1, marked: Iterable[int] = ()
) -> Html:
    """A table whose first `texts` columns are words and whose others are numbers; the rows in `marked` stand out."""
    kinds = [None if column < texts else "n" for column in range(len(header))]
    head = tag("tr", *(tag("th", name, class_=kind) for name, kind in zip(header, kinds, strict=True)))
    found = set(marked)
    lines = [
        tag(
            "tr",
            *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_="differs" if number in found else None,
        )
        for number, row in enumerate(rows)
    ]
    of_words = " words" * (texts >= len(header))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *lines)), class_=f"table{of_words}")


def make_tiles(tiles: Iterable[tuple[str, str, str]]) -> Html:
    """A row of numbers: what each is, the number, and a word on it."""
    return tag(
        "div",
        *(tag("div", tag("span", name), tag("b", number), tag("small", word)) for name, number, word in tiles),
        class_="tiles",
    )


def make_image(png: bytes, says: str, class_: str | None = None) -> Html:
    """A picture within the page."""
    width, height = size_of(png)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return tag("img", src=source, alt=says, width=width, height=height, class_=class_)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file, in pixels."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def fold(summary: str, *children: object) -> Html:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *children)


def make_page(title: str, beneath: str, lead: Sequence[Html], sections: Sequence[Section], foot: str) -> str:
    """The whole page: a title and a line beneath it, what leads, links to the sections, and those."""
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
    top = tag("header", tag("h1", title), tag("p", beneath, class_="soft"), links)
    body = tag("main", top, *lead, *map(_show, sections), tag("footer", foot))
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _show(section: Section) -> Html:
    """A section, neighbouring plots side by side."""
    parts = []
    for are_narrow, group in groupby(section.parts, _is_narrow):
        shown = [_show_part(part) for part in group]
        parts += [tag("div", *shown, class_="plots")] if are_narrow else shown
    return tag("section", tag("h2", section.title), *parts, id=section.anchor)


def _is_narrow(part: Html | Plot) -> bool:
    return isinstance(part, Plot | Aside)


def _show_part(part: Html | Plot) -> Html:
    if not isinstance(part, Plot):
        return part
    return tag("figure", make_image(part.png, part.says), class_=f"plot{' wide' * part.is_wide}")


def plots_of(sections: Sequence[Section]) -> list[Plot]:
    """All plots of a page."""
    return [part for section in sections for part in section.parts if isinstance(part, Plot)]


def write_page(path: Path, page: str, plots: Sequence[Plot]) -> None:
    """Write the page, and its plots as files into plots/ beside it.

    Raises BadInput, and writes nothing, where something else than a report is there already.
    """
    folder = path.with_name("plots" if path.name == "report.html" else f"{path.stem}_plots")
    files = {folder / f"{plot.name}.png": plot.png for plot in plots} | {path: page.encode()}
    for file in files:
        check_ours(file)
    for file, content in files.items():
        write_output(file, lambda target, content=content: target.write(content), "--output")


def check_ours(path: Path) -> None:
    """Raise BadInput where `path` is there and no report: nothing of the user's is overwritten."""
    if path.is_file():
        with path.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    if path.exists():
        raise UserError(f"{path} is there already and no report; move it away, or use another --output.")
