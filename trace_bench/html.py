"""The page of a run: report.html, one file that needs nothing else, and its figures as files.

It has the texts and tables of report.md, figures, how long answers are, and a browser of samples. Whatever comes from
a run is text: it is escaped here, and the script of the page writes with textContent only. The Content-Security-Policy
allows the page's own style and script, by their hashes, and images within it; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from judges.judging import KINDS
from judges.report import length_controlled, net_win_rate, verdicts
from trace_bench.figures import COLOURS, NAMES, Picture, pictures, stage_label
from trace_bench.metrics import Estimate
from trace_bench.results import Results
from trace_bench.run import read_jsonl
from trace_bench.tables import DASH, PERCENT, Block, Section, Table, Unit, arrow, length, shade, task_name
from trace_tasks.data import JUDGED, SUITES
from trace_tasks.data.files import write_bytes, write_text

#: Size of the samples in the page. Those that changed most come first, so what is left out changed least.
SAMPLE_BYTES = 2_500_000
#: Characters that are kept of a text.
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 1200, 800
#: With more stages than these only the base model's answer, that of the own stage and the last one are in the page.
SAMPLE_STAGES = 16
#: A larger table is in report.md only.
TABLE_CELLS = 2500

#: The parts of the page in their order: key of the section -> what the menu calls it, and its figures.
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scores": ("Scores", ("matrix", "sequence")),
    "learning": ("Learning", ("tasks",)),
    "form": ("", ("form",)),
    "tolerant": ("", ()),
    "extracted": ("", ()),
    "limits": ("", ()),
    "general": ("General ability", ("general",)),
    "judged": ("Against the base model", ("judged",)),
    "answers": ("Answers", ()),
    "bounds": ("Bounds", ()),
    "paper": ("The paper", ()),
    "cost": ("Cost", ("losses", "cost")),
    "lengths": ("Lengths", ()),
    "samples": ("Samples", ()),
    "provenance": ("Provenance", ()),
}


_KEY = "".join(f'<span class="key q{step}"></span>' for step in range(0, 21, 4))
#: What the colours of a table mean, in percent and in other units.
HEAT_KEY = f"Colour: 0 {_KEY} 100."
HEAT_KEY_OF_UNITS = (
    f"Colour: worst {_KEY} best, from 0 to 1 or 100, or where a score has no known end between those of its column."
)


def write_page(results: Results, sections: Iterable[Section]) -> None:
    """Writes report.html and figures/ of a run.

    Args:
        results: The numbers of the run.
        sections: The texts and tables of its report.
    """
    drawn = {picture.name: picture for picture in pictures(results)}
    write_pictures(results.run.path / "figures", drawn.values(), NAMES)
    write_text(results.run.path / "report.html", _page(results, {s.key: s.blocks for s in sections}, drawn))


def write_pictures(folder: Path, drawn: Collection[Picture], names: Iterable[str]) -> None:
    """Writes figures as SVG and PNG, and removes those of an earlier report for which there is nothing to draw now.

    Args:
        folder: Where.
        drawn: The figures.
        names: Of all that there may be.
    """
    for picture in drawn:
        write_text(folder / f"{picture.name}.svg", picture.svg)
        write_bytes(folder / f"{picture.name}.png", picture.png)
    for name in set(names) - {picture.name for picture in drawn}:
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)


def _page(results: Results, blocks: dict[str, list[Block]], drawn: dict[str, Picture]) -> str:
    answers = _read_answers(results)
    blocks = blocks | {"lengths": _lengths_blocks(results, answers)}
    embedded = _embed(results, answers)
    parts, links = [], []
    for key, (title, names) in _PARTS.items():
        if key == "samples":
            content = _samples_html(embedded)
        else:
            figures = [drawn[name] for name in names if name in drawn]
            content = _part_html(results, key, blocks.get(key, []), figures)
        if content:
            parts.append(f'<section id="{key}">\n{content}\n</section>')
            links += [f'<a href="#{key}">{title}</a>'] if title else []
    return document(
        results.run.path.name,
        ["\n".join(text_html(b) for b in blocks["run"] if isinstance(b, str)), _tiles_html(results)],
        [
            f'<nav aria-label="Parts of this page">{"".join(links)}</nav>',
            "<main>",
            _blocks_html(blocks["summary"]) if "summary" in blocks else "",
            *parts,
            "</main>",
        ],
        "Made by <code>trace-bench report</code> from the files of the run. The figures are in its folder "
        "<code>figures</code> as SVG and PNG, all scores in <code>scores.csv</code>.",
        data=embedded.json,
    )


def document(title: str, head: Sequence[str], body: Sequence[str], foot: str, data: str | None = None) -> str:
    """A page that loads nothing and runs no script but its own.

    Args:
        title: Of the window, a text.
        head: HTML of its head.
        body: HTML between head and foot.
        foot: HTML of its foot.
        data: JSON for the page's script, escaped for a script element; None = a page without a script.
    """
    style, script = ((Path(__file__).parent / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    allowed = "'none'" if data is None else f"'{_hash(script)}'"
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src {allowed}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    scripts = [f'<script type="application/json" id="data">{data}</script>', f"<script>{script}</script>"]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)} – TRACE-Bench</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            "<header>",
            *head,
            "</header>",
            *body,
            f"<footer>{foot}</footer>",
            *(scripts if data is not None else []),
            "</body>",
            "</html>\n",
        ]
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# ---------------------------------------------------------------------------------------------------- texts and tables


def _part_html(results: Results, key: str, blocks: Sequence[Block], figures: Sequence[Picture]) -> str:
    """The content of a part; its figures stand before its first table."""
    if not blocks and not figures:
        return ""
    shown = "\n".join(map(figure_html, figures))
    if key == "judged" and blocks:  # a section for each kind, and one figure for all
        return f"<h2>Answers against the base model</h2>\n{shown}\n{_blocks_html(blocks, demote=1)}"
    first = next((i for i, b in enumerate(blocks) if isinstance(b, Table)), len(blocks))
    before, after = _blocks_html(blocks[:first]), blocks[first:]
    if key == "scores" and after and isinstance(after[0], Table):
        images = [picture for picture in figures if picture.name == "matrix"]
        shown = "\n".join(figure_html(picture) for picture in figures if picture not in images)
        shown, after = f"{_matrix_html(results, after[0].header, images)}\n{shown}", after[1:]
    return "\n".join([before, shown, _blocks_html(after)])


def _blocks_html(blocks: Iterable[Block], demote: int = 0) -> str:
    return "\n".join(table_html(b) if isinstance(b, Table) else text_html(b, demote) for b in blocks)


def text_html(text: str, demote: int = 0) -> str:
    """The Markdown of a report's texts: headings, paragraphs, lists and quotes, which are warnings here."""
    parts = []
    for chunk in text.strip().split("\n\n"):
        lines = chunk.split("\n")
        if match := re.fullmatch("(#{1,3}) (.*)", chunk, re.DOTALL):
            level = len(match[1]) + demote
            parts.append(f"<h{level}>{_inline(match[2])}</h{level}>")
        elif chunk.startswith(">"):
            parts.append(f'<p class="warning">{_inline(" ".join(line.removeprefix("> ") for line in lines))}</p>')
        elif all(line.startswith("- ") for line in lines):
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{_inline(chunk)}</p>")
    return "\n".join(parts)


def _inline(text: str) -> str:
    """Escaped text, with the `code` and **bold** of Markdown."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", text)


def table_html(
    table: Table,
    links: Mapping[str, str] | None = None,
    *,
    heat: Sequence[tuple[float, float] | None] = (),
    elsewhere: str = "report.md",
) -> str:
    """A table, its rows for orientation in grey.

    Args:
        table: The table.
        links: First cell of a row -> where it leads.
        heat: If its numbers are coloured, the worst and the best one of each column but the first (`Unit.ends`), or
            None for a column without colours.
        elsewhere: What has the table if it is too large for the page.
    """
    if len(table.rows) * len(table.header) > TABLE_CELLS:
        return f"<p>A table of {len(table.rows)} rows and {len(table.header)} columns is in {elsewhere}.</p>"
    of_text = [i for i, column in enumerate(zip(*table.rows, strict=True)) if i and not heat and _is_text(column)]
    own, body = len(table.rows) - table.apart, ""
    for i, (first, *rest) in enumerate(table.rows):
        name = _inline(first)
        if links and first in links:
            name = f'<a href="{escape(links[first])}">{name}</a>'
        apart = ' class="apart"' if i >= own else ""
        cells = "".join(
            _heat_html(c, heat[k - 1]) if heat else _cell_html(c, k in of_text) for k, c in enumerate(rest, 1)
        )
        body += f'<tr{apart}><th scope="row">{name}</th>{cells}</tr>\n'
    kind, key = "", ""
    if heat:
        in_percent = set(heat) == {(0.0, 100.0)}
        kind, key = ' class="matrix"', f'<p class="caption">{HEAT_KEY if in_percent else HEAT_KEY_OF_UNITS}</p>'
    head = _head_html(table.header, of_text)
    return _scroll(f"<table{kind}>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n</table>") + key


def _head_html(header: Sequence[str], of_text: Sequence[int] = ()) -> str:
    kinds = [' class="text"' if i in of_text else "" for i in range(len(header))]
    cells = (f'<th scope="col"{kind}>{_lines(text)}</th>' for kind, text in zip(kinds, header, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _is_text(column: Iterable[str]) -> bool:
    known = [cell for cell in column if cell != DASH]
    return bool(known) and not any(_NUMBER.match(cell) for cell in known)


#: How a cell begins that is a number, or would be one.
_NUMBER = re.compile(r"[+-]?\d|–")


def _lines(text: str) -> str:
    """A head of a table: its first line, and smaller what follows `<br>`."""
    first, *rest = text.split("<br>")
    # A name such as C-STANCE stays on one line.
    whole = re.sub(r"(\S+-\S+)", r'<span class="word">\1</span>', escape(first))
    return whole + "".join(f"<br><small>{escape(line)}</small>" for line in rest)


def _cell_html(text: str, of_text: bool) -> str:
    """A cell, of a column of texts or of numbers, in which there may be texts, too."""
    kind = "number" if _NUMBER.match(text) and not of_text else "text"
    if text.endswith(("↓", "↑")):
        kind += " down" if text.endswith("↓") else " up"
    return f'<td class="{kind}">{_inline(text)}</td>'


def _heat_html(text: str, ends: tuple[float, float] | None) -> str:
    """A cell whose number has a colour, if it is one number."""
    if ends is None or not (number := re.fullmatch(r"(-?\d+\.\d+(?:e[+-]\d+)?)( [↓↑])?", text)):
        return f'<td class="none">{_inline(text)}</td>'
    return f'<td class="{_heat(shade(float(number[1]), ends))}">{escape(text)}</td>'


def _heat(value: float) -> str:
    """The class of the colour of a score, from 0 (worst) to 1 (best)."""
    return f"q{min(20, max(0, round(20 * value)))}"


def _scroll(content: str) -> str:
    """A box of its own for what may be wider than the page; it can be reached and scrolled with the keyboard."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def _matrix_html(results: Results, header: Sequence[str], images: Sequence[Picture]) -> str:
    """The scores as a coloured table; as an image where the table would be too large."""
    run = results.run
    if results.R.size > TABLE_CELLS:
        stages, tasks = results.R.shape
        return (
            f"<p>The scores of {stages} stages and {tasks} tasks are shown as an image. As numbers they are in "
            f"report.md and scores.csv.</p>{''.join(map(figure_html, images))}"
        )
    rows = []
    units = [results.units[task] for task in run.tasks]
    ends = [unit.ends(results.R[:, i]) for i, unit in enumerate(units)]
    for stage in run.stages:
        cells = []
        for i, (task, unit) in enumerate(zip(run.tasks, units, strict=True)):
            value, low, high = results.cell(stage.index, i)
            own = " own" if stage.task == task else ""
            if np.isnan(value):
                cells.append(f'<td class="none{own}">{DASH}</td>')
                continue
            title = "" if np.isnan(low) else f' title="95 % interval {unit.text(low)} to {unit.text(high)}"'
            kind = f"{_heat(shade(value, ends[i]))}{own}"
            cells.append(
                f'<td class="{kind}"{title}>{unit.text(value)}{arrow(results.matrix_mark(stage.index, i))}</td>'
            )
        rows.append(f'<tr><th scope="row">{stage.index} {escape(stage_label(stage))}</th>{"".join(cells)}</tr>\n')
    own = " Framed: the task's own stage." if any(s.task for s in run.stages) else ""
    key = HEAT_KEY_OF_UNITS if results.not_percent else HEAT_KEY
    return (
        _scroll(
            f'<table class="matrix">\n<thead>{_head_html(header)}</thead>\n<tbody>\n{"".join(rows)}</tbody>\n</table>'
        )
        + f'<p class="caption">{own} {DASH}: not evaluated. {key}</p>'
    )


def _tiles_html(results: Results) -> str:
    """The headline numbers."""
    last = results.run.stages[-1]
    tiles: list[tuple[str, str, Estimate, bool, Unit | None]] = []
    unit = results.unit
    if results.is_sequential:
        t = results.last_stage or len(results.run.tasks)
        what = (
            ("OP", "mean of the tasks seen", False),
            ("BWT", "change since the own stage", True),
            ("Forgetting", "drop from the best stage", False),
        )
        tiles += [(f"{n}_{t}", text, results.sequence[n][t - 1], sign, unit) for n, text, sign in what]
    elif results.has_mean:
        tiles.append(("Mean", "of the tasks", results.mean, False, unit))
    delta = results.general.get(last.index, _UNKNOWN)
    tiles.append(("Δ general", "ability, mean of the suites", delta, True, PERCENT))
    for kind in KINDS:
        net = net_win_rate(results.judged[kind.name], last)
        controlled = length_controlled(results.judged[kind.name], last)
        text = "wins minus losses against the base model"
        if not np.isnan(controlled.value):
            text += f"; at equal length {PERCENT.text(controlled.value, True)}"
        tiles.append((f"Δ {kind.name}", text, net, True, PERCENT))
    return '<dl class="tiles">' + "".join(_tile_html(*tile) for tile in tiles) + "</dl>"


_UNKNOWN = Estimate(float("nan"))


def _tile_html(name: str, text: str, value: Estimate, sign: bool, unit: Unit | None) -> str:
    unknown = "not measured" if unit else "the tasks have different units"
    unit = unit or PERCENT
    shown = unit.text(value.value, sign)
    interval = "" if np.isnan(value.low) else f"{unit.text(value.low, sign)} to {unit.text(value.high, sign)}"
    text += "" if unit.is_percent else f"; {unit.of_changes if sign else unit.name}"
    stem, _, index = name.partition("_")
    sub = f"<sub>{escape(index)}</sub>" if index else ""
    missing = "" if shown != DASH else ' class="missing"'
    return (
        f"<div{missing}><dt>{escape(stem)}{sub}</dt><dd><b>{shown}</b> <i>{interval}</i>"
        f"<small>{escape(text if shown != DASH else unknown)}</small></dd></div>"
    )


# ------------------------------------------------------------------------------------------------------------ figures


def figure_html(picture: Picture) -> str:
    """A figure with its caption; where the window is narrow its halves stand one below the other, if it has any."""
    root = inline_svg(picture)
    svg, caption = ElementTree.tostring(root, encoding="unicode"), escape(picture.caption)
    if picture.cut is None:
        return f'<figure id="figure-{picture.name}">{_scroll(svg)}<figcaption>{caption}</figcaption></figure>'
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    drawing = next(child.attrib["id"] for child in root if child.tag == "g")
    halves = "".join(
        f'<svg viewBox="{x:g} 0 {wide:g} {height:g}" aria-hidden="true"><use href="#{drawing}"/></svg>'
        for x, wide in ((0.0, picture.cut), (picture.cut, width - picture.cut))
    )
    return (
        f'<figure id="figure-{picture.name}" class="cut"><div class="whole">{svg}</div>'
        f'<div class="halves">{halves}</div><figcaption>{caption}</figcaption></figure>'
    )


def inline_svg(picture: Picture) -> ElementTree.Element:
    """An SVG of matplotlib as a part of the page.

    Its colours become variables of the page, which differ in dark and light. Its styles become attributes, since the
    policy allows no style but the page's own. Its ids begin with its name, since several share the page.
    """
    root = ElementTree.fromstring(picture.svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        attributes |= _presentation(attributes.pop("style", ""))
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{picture.name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{picture.name}-{value[1:]}"
            element.set(key, re.sub(r"url\(#", f"url(#{picture.name}-", value))
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


# ------------------------------------------------------------------------------------------------------------ samples


@dataclass
class _Answers:
    """What the stages answered to the prompts of a task, suite or set, cut to what a page can hold."""

    name: str
    unit: Unit
    """Of its headline score."""
    rows: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """(subtask, doc_id) -> prompt, target, and stage -> answer, score and verdict."""
    lengths: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Stage -> mean characters of an answer, share of empty ones; of answers that are texts."""
    prompt: float = float("nan")
    """Mean characters of a prompt."""
    values: set[float] = field(default_factory=set)
    """Scores of single rows."""

    @property
    def binary(self) -> bool:
        """Whether an answer is right or wrong, with nothing between."""
        return self.unit.is_percent and self.values <= {0.0, 1.0}


def _read_answers(results: Results) -> list[_Answers]:
    """The samples of all cells."""
    run, cells = results.run, results.cells | results.besides
    found = []
    for name in [*run.tasks, *SUITES, *JUDGED]:
        answers = _Answers(name, results.units.get(name, PERCENT))
        for stage in run.stages:
            file = stage.samples_file(name)
            if (stage.index, name) not in cells or not file.exists():
                continue
            left_out = run.left_out.get(name, ())
            metric = None if name in JUDGED else cells[stage.index, name]["headline"]
            judged = _verdicts(results, stage.index, name)
            samples = [row for row in read_jsonl(file) if row["doc_id"] not in left_out]
            texts = [row["response"] for row in samples if isinstance(row.get("response"), str)]
            if texts and len(texts) == len(samples):
                empty = sum(not text.strip() for text in texts) / len(texts)
                answers.lengths[stage.index] = sum(map(len, texts)) / len(texts), empty
            prompts = [len(row["prompt"]) for row in samples if isinstance(row.get("prompt"), str)]
            if prompts and np.isnan(answers.prompt):
                answers.prompt = sum(prompts) / len(prompts)
            for row in samples:
                _add_sample(answers, stage.index, row, metric, judged)
        if answers.rows:
            found.append(answers)
    return found


def _verdicts(results: Results, index: int, name: str) -> dict[Any, str]:
    """doc_id -> what judges say of a stage's answer against the base model's; empty if it was not judged."""
    current = any((index, name) in judged for judged in results.judged.values())
    return verdicts(results.run.stages[index], name) if index and current else {}


def _add_sample(
    answers: _Answers, index: int, sample: dict[str, Any], metric: str | None, verdicts: dict[Any, str]
) -> None:
    key = (sample.get("task", ""), sample["doc_id"])
    row = answers.rows.get(key)
    prompt = _cut(sample.get("prompt", ""), PROMPT_CHARACTERS)
    if row is None:
        row = answers.rows[key] = {"prompt": prompt, "target": _choice(sample, "target"), "answers": {}}
    elif row["prompt"] != prompt:
        return  # made from other data: not an answer to the same prompt
    score = sample.get(metric) if metric else None
    number = round(float(score), 4) if isinstance(score, int | float) and np.isfinite(score) else None
    if number is not None:
        answers.values.add(number)
    row["answers"][index] = (_choice(sample, "response"), number, verdicts.get(sample["doc_id"]))


def _choice(sample: dict[str, Any], key: str) -> str:
    """An answer or a target as text; of a multiple-choice question the chosen text."""
    value, choices = sample.get(key, ""), sample.get("choices")
    if isinstance(value, int) and isinstance(choices, list) and 0 <= value < len(choices):
        value = choices[value]
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return _cut(value, ANSWER_CHARACTERS)


def _cut(text: Any, most: int) -> str:
    """A text as UTF-8 can hold it, with its middle left out where it is long."""
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]} […{len(text) - head - tail} characters left out…] {text[-tail:]}"


def _lengths_blocks(results: Results, answers: Sequence[_Answers]) -> list[Block]:
    """How long prompts and answers are."""
    measured = [a for a in answers if a.lengths]
    if not measured:
        return []
    stages = [s for s in results.run.stages if any(s.index in a.lengths for a in measured)]

    def cell(a: _Answers, index: int) -> str:
        return length(*a.lengths[index]) if index in a.lengths else DASH

    return [
        "## Lengths\n\nCharacters of prompts and of answers, on average; in brackets the percentage of answers that "
        "are empty, where some are.",
        Table(
            ["", "prompt", *(f"{s.index}<br>{stage_label(s)}" for s in stages)],
            [
                [
                    task_name(a.name),
                    DASH if np.isnan(a.prompt) else f"{a.prompt:.0f}",
                    *(cell(a, s.index) for s in stages),
                ]
                for a in measured
            ],
        ),
    ]


@dataclass(frozen=True)
class _Embedded:
    """The samples of the page."""

    json: str
    """Escaped for a script element."""
    shown: int
    total: int
    few_stages: bool
    """Whether answers of some stages are left out."""


def _embed(results: Results, answers: Sequence[_Answers]) -> _Embedded:
    """As many samples as the page may hold, those that changed most first."""
    run = results.run
    few = len(run.stages) > SAMPLE_STAGES
    own = {stage.task: stage.index for stage in run.stages if stage.task}
    queue: list[tuple[int, int, int, str]] = []
    for number, a in enumerate(answers):
        # A tenth of the scale; of an unknown scale, of the scores there are.
        enough = 0.0 if a.binary else 0.1 * abs(float(np.subtract(*a.unit.ends(list(a.values)))))
        ranks: dict[int, int] = {}
        for (subtask, doc_id), row in a.rows.items():
            found = row["answers"]
            if few:
                kept = {0, own.get(a.name, 0), max(found)}
                found = {i: answer for i, answer in found.items() if i in kept}
            rank = _rank(found, own.get(a.name, 0), a.unit.sign, enough)
            ranks[rank] = ranks.get(rank, 0) + 1
            name = f"{subtask} {doc_id}".strip()
            value = [number, name, row["prompt"], row["target"], *_packed(found)]
            queue.append((rank, ranks[rank], number, _escaped_json(value)))
    queue.sort(key=lambda item: item[:3])  # of the same rank a sample of each task in turn
    rows, size = [], 0
    for *_, text in queue:
        size += len(text.encode("utf-8"))
        if size > SAMPLE_BYTES:
            break
        rows.append(text)
    head = {
        "tasks": [task_name(a.name) for a in answers],
        "binary": [a.binary and bool(a.values) for a in answers],
        # By which a score is multiplied to be shown, the sign of a gain, and the unit of a gain.
        "units": [[a.unit.factor, a.unit.sign, a.unit.of_changes] for a in answers],
        "own": [own.get(a.name, 0) if results.is_sequential else 0 for a in answers],
        "stages": [f"{s.index} {stage_label(s)}" for s in run.stages],
    }
    joined = _escaped_json(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}"
    return _Embedded(joined, len(rows), len(queue), few)


def _rank(found: dict[int, tuple[str, float | None, str | None]], own: int, sign: int, enough: float) -> int:
    """0 = got worse since the base model or the own stage, 1 = better, 2 = another answer, 3 = the same."""
    last = max(found)
    text, score, verdict = found[last]
    pairs = [found[i] for i in (0, own) if i in found and i != last]
    gains = [sign * (score - before[1]) for before in pairs if score is not None and before[1] is not None]
    if verdict == "lose" or any(gain < -enough for gain in gains):
        return 0
    if verdict == "win" or any(gain > enough for gain in gains):
        return 1
    return 2 if any(before[0] != text for before in pairs) else 3


def _packed(found: dict[int, tuple[str, float | None, str | None]]) -> tuple[list[str], list[list[Any]]]:
    """The different texts, and of each stage its number, its text's place, its score and its verdict."""
    texts = list(dict.fromkeys(text for text, _, _ in found.values()))
    places = {text: i for i, text in enumerate(texts)}
    return texts, [[i, places[text], score, verdict] for i, (text, score, verdict) in found.items()]


def _escaped_json(value: Any) -> str:
    """JSON within a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _samples_html(embedded: _Embedded) -> str:
    if not embedded.total:
        return ""
    notes = [f"{embedded.shown:,} of {embedded.total:,} prompts are in this page."]
    if embedded.shown < embedded.total:
        notes.append("Those whose answers changed most were taken first; all are in the run's folder.")
    if embedded.few_stages:
        notes.append("Of each prompt there are the answers of the base model, of the task's own stage and the last.")
    notes.append(
        f"Prompts are cut to {PROMPT_CHARACTERS} characters and answers to {ANSWER_CHARACTERS}, their middle left out."
    )
    return f"""<h2>Samples</h2>
<p>Answers of two stages to the same prompt. {" ".join(notes)}</p>
<noscript><p class="warning">The samples need JavaScript; all else on this page does not.</p></noscript>
<div id="browser" role="search" hidden>
<label>Task <select id="task"></select></label>
<label>Compare <select id="before"></select></label>
<label>with <select id="after"></select></label>
<label>Show <select id="change">
<option value="all">all</option>
<option value="lost">right to wrong</option>
<option value="won">wrong to right</option>
<option value="worse">got worse</option>
<option value="better">got better</option>
<option value="other">another answer</option>
</select></label>
<label class="wide">Search <input id="search" type="search" autocomplete="off" spellcheck="false"></label>
</div>
<p id="count" role="status"></p>
<div id="list"></div>
<p id="paging" hidden><button type="button" id="previous">Previous</button> <span id="page"></span>
<button type="button" id="next">Next</button></p>"""
