"""Texts, tables and figures of a report as HTML, and the page that they stand on: one file that needs nothing else.

Whatever comes from a run is text: jinja2 escapes all that is not Markup, and Markup is made here alone, of the report's
own Markdown (`markdown_text` leaves no markup of others in it) and of matplotlib's SVG. The Content-Security-Policy of
the page allows its own style and script, by their hashes, and nothing that is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from trace_bench.report.drawing import COLOURS, Drawing, Picture, draw
from trace_bench.report.tables import DASH, Table, shade
from trace_bench.text import markdown_text
from trace_tasks.data.files import write_bytes, write_text

#: A larger table is only in the other files.
TABLE_CELLS = 2500
_HERE = Path(__file__).parent


def sha256(text: str) -> str:
    """The hash of a style or script, as a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def document(**parts: Any) -> str:
    """Fills in page.html: `title`, `head` and `foot` as texts or Markup, and `parts` (id -> blocks).

    If the page has them: `tiles`, `menu` (id -> name), `wide`, `sortable` tables, and `data`, the JSON for its script.
    """
    page = Environment(loader=FileSystemLoader(_HERE), autoescape=True, keep_trailing_newline=True)
    page.filters["sha256"] = sha256
    style, script = (Markup((_HERE / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    return page.get_template("page.html").render(style=style, script=script, **parts)


# --------------------------------------------------------------------------------------------------------------- texts


#: Reads headings, paragraphs, lists, quotes, `code` and **bold**.
_READER = MarkdownIt("commonmark", {"html": False}).disable(
    ["link", "image", "autolink", "html_inline", "html_block", "reference", "entity"]
)


def text_html(text: str, demote: int = 0) -> Markup:
    """The Markdown of a report's texts; its headings so many levels lower."""
    tokens = _READER.parse(markdown_text(text))
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1:]) + demote}"
    return Markup(_READER.renderer.render(tokens, _READER.options, {}))


def _inline(text: str) -> Markup:
    return Markup(_READER.renderInline(markdown_text(text)))


# -------------------------------------------------------------------------------------------------------------- tables


class Cell(NamedTuple):
    """A cell of a table: its text, the class that it has, what is shown when it is pointed at, and where it leads."""

    text: str
    kind: str
    title: str = ""
    link: str = ""


class Row(NamedTuple):
    """A row of a table."""

    name: str
    cells: list[Cell]
    link: str = ""
    apart: bool = False


class TableView(NamedTuple):
    """A table as the page shows it."""

    header: list[Cell]
    rows: list[Row]
    matrix: bool = False
    """Whether its cells are coloured. Such a table has a caption, which ends with what the colours mean."""
    caption: str = ""
    ends: tuple[str, str] = ("0", "100")
    sortable: bool = False
    """Whether a click on a head sorts its rows."""


#: The ends of the colours of scores that are not all percent.
ENDS_OF_UNITS = ("worst", "best, from 0 to 1 or 100, or where a score has no known end between those of its column")


def table_view(
    table: Table,
    links: Mapping[str, str] | None = None,
    *,
    heat: Sequence[tuple[float, float] | None] = (),
    elsewhere: str = "report.md",
    most: int | None = None,
    sortable: bool = False,
) -> TableView | Markup:
    """A table for the page, or if it has more cells than `most` a sentence that says where it is: `elsewhere`.

    `most` is `TABLE_CELLS` where it is None. `links`: first cell of a row -> where it leads. `heat`: if its numbers are
    coloured, the worst and the best one of each column but the first (`Unit.ends`), or None for one without colours.
    """
    if len(table.rows) * len(table.header) > (most or TABLE_CELLS):
        size = f"{len(table.rows)} rows and {len(table.header)} columns"
        return text_html(f"A table of {size} is in {elsewhere}.")
    texts = {i for i, column in enumerate(zip(*table.rows, strict=True)) if i and not heat and _is_text(column)}
    rows = []
    for k, (first, *rest) in enumerate(table.rows):
        cells = [_heat_cell(c, heat[i - 1]) if heat else _cell(c, i in texts) for i, c in enumerate(rest, 1)]
        cells = [cell._replace(link=table.links.get((k, i), "")) for i, cell in enumerate(cells, 1)]
        rows.append(Row(_inline(first), cells, (links or {}).get(first, ""), k >= len(table.rows) - table.apart))
    header = [head_cell(text, "text" if i in texts else "") for i, text in enumerate(table.header)]
    if not heat:
        return TableView(header, rows, sortable=sortable)
    return TableView(header, rows, matrix=True, ends=("0", "100") if set(heat) == {(0.0, 100.0)} else ENDS_OF_UNITS)


def links(pages: Mapping[str, Path], folder: Path) -> dict[str, str]:
    """First cell of a row -> the way from a folder to its page, of the pages that there are."""
    return {name: quote(os.path.relpath(page, folder)) for name, page in pages.items() if page.exists()}


def head_cell(text: str, kind: str = "") -> Cell:
    """A head of a table: its first line, and smaller what follows `<br>`. A name such as C-STANCE stays on one line."""
    first, *rest = (str(escape(line)) for line in text.split("<br>"))
    words = ((word, "-" in word[1:-1]) for word in re.split(r"(\s+)", first))
    whole = "".join(f'<span class="word">{word}</span>' if hyphened else word for word, hyphened in words)
    return Cell(Markup(whole + "".join(f"<br><small>{line}</small>" for line in rest)), kind)


#: How a cell begins that is a number, or would be one.
_NUMBER = re.compile(r"[+-]?\d|–")


def _is_text(column: Iterable[str]) -> bool:
    known = [cell for cell in column if cell != DASH]
    return bool(known) and not any(_NUMBER.match(cell) for cell in known)


def _cell(text: str, of_text: bool) -> Cell:
    """A cell of a column of texts, or of a column of numbers in which there may be texts, too."""
    kind = "number" if _NUMBER.match(text) and not of_text else "text"
    return Cell(_inline(text), kind + {"↓": " down", "↑": " up"}.get(text[-1:], ""))


def _heat_cell(text: str, ends: tuple[float, float] | None) -> Cell:
    """A cell whose number has a colour, if it is one number."""
    number = re.fullmatch(r"(-?\d+\.\d+(?:e[+-]\d+)?)( [↓↑])?", text)
    return Cell(_inline(text), heat(shade(float(number[1]), ends)) if ends is not None and number else "none")


def heat(shade: float) -> str:
    """The class of the colour of a score between the worst (0) and the best one (1)."""
    return f"q{min(20, max(0, round(20 * shade)))}"


# ------------------------------------------------------------------------------------------------------------- figures


class FigureView(NamedTuple):
    """A figure as the page shows it."""

    name: str
    caption: str
    svg: Markup
    halves: list[str]
    """The boxes of its halves, which stand one below the other where the window is narrow; empty if it has none."""
    drawing: str
    """The id that the halves are cut from."""


def write_figures(folder: Path, drawings: Mapping[str, Drawing], of: Any) -> dict[str, FigureView]:
    """Writes figures as SVG and PNG, and removes those of an earlier report for which there is nothing to draw now.

    Returns name -> the figure for the page.
    """
    drawn = draw(drawings, of)
    for name in drawings.keys() - {picture.name for picture in drawn}:
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    found = {}
    for picture in drawn:
        write_text(folder / f"{picture.name}.svg", picture.svg)
        write_bytes(folder / f"{picture.name}.png", picture.png)
        root = _inline_svg(picture)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        parts = [(0.0, picture.cut), (picture.cut, width - picture.cut)] if picture.cut is not None else []
        halves = [f"{x:g} 0 {wide:g} {height:g}" for x, wide in parts]
        drawing = next(child.attrib["id"] for child in root if child.tag == "g")
        svg = Markup(ElementTree.tostring(root, encoding="unicode"))
        found[picture.name] = FigureView(picture.name, picture.caption, svg, halves, drawing)
    return found


def _inline_svg(picture: Picture) -> ElementTree.Element:
    """An SVG of matplotlib as a part of the page.

    Its colours become variables of the page, which differ in dark and light. Its styles become attributes, since the
    policy allows no style but the page's own. Its ids begin with its name, since several share the page.
    """
    root = ElementTree.fromstring(picture.svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        attributes |= _presentation(attributes.pop("style", ""))
        if "id" in attributes:
            attributes["id"] = f"{picture.name}-{attributes['id']}"
        element.attrib.clear()
        for key, value in attributes.items():
            value = re.sub("^#", f"#{picture.name}-", value) if key == "href" else value
            element.set(key, value.replace("url(#", f"url(#{picture.name}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", picture.caption)
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _presentation(style: str) -> dict[str, str]:
    """The properties of a style as attributes; of fonts, size and weight, since the family is the page's."""
    found: dict[str, str] = {}
    for declaration in filter(str.strip, style.split(";")):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            found |= {"font-size": size[1]} if size else {}
            found |= {"font-weight": "bold"} if re.match(r"(bold|[6-9]00)\b", value) else {}
        else:
            found[key] = f"var(--{COLOURS[value]})" if value in COLOURS else value
    return found
