"""Tests of report.html and its figures: escaping, loaded files, and how it looks and works in a browser."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import leave_undrawn
from made_runs import EIGHT, NAN, TASKS, make_rich_run, make_run, without, write_cell
from PIL import Image

from trace_bench import judgements
from trace_bench.report import Results, compare, figures, html, samples, write_comparison, write_report, write_reports
from trace_bench.report.tables import DASH
from trace_bench.run import Run, read_json, read_jsonl
from trace_tasks.data import JUDGED
from trace_tasks.data.files import write_json, write_jsonl

HOSTILE = '</script><img src=x onerror="window.hacked = 1"><!--<script>\'&\u2028$x_1$ {{1}} **b** `c`'


def _file(run):
    """The page of a run, or of several: a file."""
    return run if isinstance(run, Path) else run.path / "report.html"


class Page(HTMLParser):
    """The parts of a page: elements with their attributes, and texts by element."""

    def __init__(self, run):
        super().__init__()
        self.source = _file(run).read_text(encoding="utf-8")
        self.elements, self.open, self.texts, self.cells = [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))
        if {"td", "th"} & set(self.open):
            self.cells[-1] += text

    @property
    def data(self):
        """The embedded samples."""
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        return json.loads(found[1])


@pytest.fixture
def drawn():
    """Renders figures, for a test that looks at those of its own run."""


@pytest.fixture(autouse=True)
def _undrawn_runs(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        leave_undrawn(monkeypatch)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A run with all kinds of results, and its report."""
    run = make_rich_run(partial(make_run, tmp_path_factory.mktemp("runs"), name="rich", demo=True), n=20)
    write_report(run)
    return run


@pytest.fixture(scope="module")
def several(rich, hostile, tmp_path_factory):
    """The page of several runs: one is hostile, one has all kinds of results."""
    make = partial(make_run, tmp_path_factory.mktemp("more"), demo=True)
    other = make_rich_run(make, n=20, seed=1, name="other & <b>more", method="olora")
    file = other.path.parent / "all of them.html"
    write_comparison([rich, other, hostile], file)
    return file


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose names and texts try to break out of their places."""
    tasks = ["trace_<script>window.hacked=1", "trace_fomc", '"><svg onload="window.hacked = 1">']
    make = partial(make_run, tmp_path_factory.mktemp("runs"), name="<i>hostile", model={"name": HOSTILE})
    rows = {task.replace("/", "_"): {"accuracy": np.tile([[0.0, 1.0, 0.0, 0.0]], (20, 1))} for task in tasks}
    run = make(tasks=tasks, rows=rows, task_versions={HOSTILE: HOSTILE}, config={HOSTILE: HOSTILE})
    for stage in run.stages:
        for task in tasks:
            samples = read_jsonl(stage.samples_file(task))
            texts = {"prompt": f"prompt {HOSTILE}", "target": HOSTILE, "response": f"{stage.index} {HOSTILE}"}
            write_jsonl(stage.samples_file(task), [sample | texts for sample in samples])
    write_report(run)
    return run


def test_the_page_has_the_tables_of_the_report(rich):
    page = Page(rich)
    words = " ".join(text for _, text in page.texts)
    for text in ("Demo data.", "Limited rows", "Method", "Form or knowledge", "Instruction following", "Provenance"):
        assert text in words
    markdown = (rich.path / "report.md").read_text(encoding="utf-8")
    numbers = [
        c.strip() for line in markdown.splitlines() if line.startswith("| ") for c in line.strip("| ").split("|")
    ]
    shown = {cell.strip() for cell in page.cells}
    assert {n for n in numbers if re.match(r"[+-]?\d+\.\d", n)} <= shown
    assert "C-STANCEaccuracy" in shown and not any("<" in cell for cell in shown), "what is markup is not shown"
    op = re.search(r"\| OP_8 \| (\S+) ", markdown)[1]
    assert f"<b>{op}</b>" in page.source


def test_bars_of_judged_pairs_equal_the_shares_in_the_table(make, monkeypatch):
    results = Results(make_rich_run(make, tasks=EIGHT[:2], n=8))
    counts = {"n": 100, "win": 10, "tie": 20, "lose": 30, "unscored": 0, "broken": 40}
    lost = {**counts, "win": 0, "tie": 0, "lose": 0, "broken": 100}
    monkeypatch.setattr(judgements, "pooled", lambda judged, stage: {1: counts, 2: lost}.get(stage.index))
    figure, _ = figures._judged(results)
    for panel in figure.axes:
        assert [bar.get_height() for bar in panel.patches] == pytest.approx([100 / 6, 200 / 6, 300 / 6])


def test_pages_of_several_runs_are_made_again_only_after_a_change(make):
    run = make_rich_run(make, tasks=EIGHT[:2], n=8)
    page, figure = run.path / "report.html", run.path / "figures" / "tasks.svg"
    write_report(run)
    made = page.read_bytes()

    def is_made_again():
        figure.write_text("as it was")
        [_] = write_reports([run])
        return figure.read_text(encoding="utf-8") != "as it was"

    assert not is_made_again()
    figure.with_suffix(".png").unlink()
    assert is_made_again() and page.read_bytes() == made
    samples = run.stages[1].samples_file(EIGHT[0])
    samples.write_text(samples.read_text(encoding="utf-8").replace("because of", "in spite of"), encoding="utf-8")
    assert is_made_again() and page.read_bytes() != made
    trained = read_json(run.stages[1].train_file)
    trained["losses"][0]["loss"] += 1e-9
    write_json(run.stages[1].train_file, trained)
    assert is_made_again() and not is_made_again()
    write_report(run)
    assert figure.read_text(encoding="utf-8") != "as it was", "of one run it always is"


def test_figures_are_written_as_svg_and_png_in_the_colours_of_the_page(rich):
    names = ["cost", "flow", "form", "general", "judged", "losses", "matrix", "sequence", "tasks"]
    files = {f.name: f.read_bytes() for f in (rich.path / "figures").iterdir()}
    assert sorted(files) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(files[f"{name}.png"].startswith(b"\x89PNG") for name in names)
    assert all(b"<text" in files[f"{name}.svg"] and b"<dc:date>" not in files[f"{name}.svg"] for name in names)
    page = Page(rich)
    images = [attributes for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
    assert len(images) == 8  # the matrix is a table there
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    svg_ids = [i for i in ids if i.count("-") and "axes" in i]
    assert svg_ids and len(svg_ids) == len(set(svg_ids)), "figures share no ids"
    figures = "".join(re.findall("<svg.*?</svg>", page.source, re.DOTALL))
    assert 'fill="var(--blue)"' in figures and 'stroke="var(--rule)"' in figures
    assert "#0072b2" not in figures and "style=" not in figures and "#000000" not in figures


def test_the_policy_allows_only_the_pages_own_style_and_script(rich):
    page = Page(rich)
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    style, script = (re.search(f"<{t}>(.*?)</{t}>", page.source, re.DOTALL)[1] for t in ("style", "script"))
    assert html.sha256(style) in policy and html.sha256(script) in policy
    assert_nothing_is_loaded_from_elsewhere(page)
    assert "innerHTML" not in script and "eval" not in script


def assert_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        for key in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(http" not in page.source and "@import" not in page.source
    assert not [a for _, a in page.elements if "style" in a or any(key.startswith("on") for key in a)]


def test_names_and_texts_of_a_run_are_only_text_in_the_page(hostile):
    page = Page(hostile)
    assert_nothing_is_loaded_from_elsewhere(page)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 2
    assert next(text for tag, text in page.texts if tag == "title").startswith("<i>hostile")
    code = "".join(text for tag, text in page.texts if tag in ("code", "strong", "p"))
    assert 'onerror="window.hacked = 1"' in code and "$x_1$ {{1}}" in code
    data = page.data
    assert data["rows"][0][2] == f"prompt {HOSTILE}" and data["rows"][0][3] == HOSTILE
    embedded = page.source.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(embedded)


def test_missing_cells_are_dashes_and_outdated_figures_are_removed(make):
    def cells(run):
        write_report(run)
        matrix = re.search('<table class="matrix">(.*?)</table>', Page(run).source, re.DOTALL)[1]
        return [re.findall("<td.*?>(.*?)</td>", row) for row in matrix.split("<tr>")[2:]]

    run = make(without((3, 1), (0, 2)))
    assert cells(run) == [["10.0", "20.0", DASH], ["80.0", DASH, DASH], ["60.0", "90.0", DASH], ["70.0", DASH, "50.0"]]
    own, drawn = run.path / "figures" / "mine.svg", run.path / "figures" / "matrix.svg"
    own.write_text("of somebody else", encoding="utf-8")
    assert drawn.exists()
    for file in run.path.glob("stages/*/eval/*.json"):
        file.unlink()
    assert cells(run) == [[DASH] * 3] * 4
    page = Page(run)
    assert set(re.findall("<dd><b>(.*?)</b>", page.source)) == {DASH} and "not measured" in page.source
    assert own.exists() and not drawn.exists() and "<h2>Samples</h2>" not in page.source


def test_certain_changes_are_marked_and_a_run_without_a_sequence_has_a_page(make, bounds):
    lost = np.concatenate([np.tile([[0.0, 1.0, 0.0, 0.0]], (30, 1)), np.tile([[0.0, 1.0, 1.0, 1.0]], (10, 1))])
    run = make(rows={TASKS[0]: {"accuracy": lost}})
    write_report(run)
    source = Page(run).source
    assert re.search(r'<td class="q5" title="95 % interval \S+ to \S+">25.0 ↓</td>', source)
    assert re.search(r'<td class="q20 own"[^>]*>100.0</td>', source)
    # A text that is no Unicode does not stop a report, and leaked rows are not among the samples.
    file = run.stages[1].samples_file(TASKS[0])
    file.write_text(file.read_text(encoding="utf-8").replace('"a text', '"\\ud800 a text'), encoding="utf-8")
    write_report(replace(run, left_out={TASKS[0]: {1, 3}}))
    page = Page(run)
    assert sorted(int(row[1]) for row in page.data["rows"]) == [0, 2, *range(4, 40)]
    assert "Without leaked rows." in page.source and "? a text" in page.source
    for run in bounds().values():
        write_report(run)
        assert "<dt>Mean</dt>" in Page(run).source and "BWT_" not in Page(run).source


def test_two_reports_are_the_same_bytes(rich):
    def made():
        return {f: f.read_bytes() for f in [rich.path / "report.html", *(rich.path / "figures").iterdir()]}

    first = made()
    code = "import sys\nfrom trace_bench.cli import main\nmain(['report', sys.argv[1]])"
    before = os.times()
    # Another program, so that no order of a set or an id in memory is in the files.
    subprocess.run([sys.executable, "-c", code, str(rich.path)], check=True, capture_output=True)
    after = os.times()
    assert after.children_user - before.children_user < 6, "it takes 2 s on two idle cores"
    assert made() == first


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_are_embedded_with_their_scores_and_verdicts(rich):
    data = Page(rich).data
    assert data["tasks"][:2] == ["C-STANCE", "FOMC"] and "instruct_lima" in data["tasks"]
    assert data["own"][:3] == [1, 2, 3] and data["binary"][:3] == [True, True, False]
    assert len(data["rows"]) == 8 * 20 + 6 * 60 + 2 * 20
    row = next(r for r in data["rows"] if r[0] == 1 and r[1] == "7")
    texts, answers = row[4], {stage: rest for stage, *rest in row[5]}
    for stage, (place, score, verdict) in answers.items():
        sample = read_jsonl(rich.stages[stage].samples_file("trace_fomc"))[7]
        assert (texts[place], score, verdict) == (sample["response"], sample["accuracy"], None)
    judged = next(r for r in data["rows"] if data["tasks"][r[0]] == "instruct_lima")
    assert {verdict for stage, _, _, verdict in judged[5] if stage} <= {"win", "tie", "lose"}
    assert all(score is None for _, _, score, _ in judged[5]), "the length of an answer is no score"


def test_embedded_samples_are_capped_and_worsened_ones_kept(make, monkeypatch):
    scores = np.zeros((400, 4))
    scores[100:140, 1] = 1.0  # forgotten
    scores[300:320, 2:] = 1.0  # learned
    run = make(rows={TASKS[0]: {"accuracy": scores}})
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 8000)
    write_report(run)
    page = Page(run)
    ids = [int(row[1]) for row in page.data["rows"]]
    assert ids[:60] == [*range(100, 140), *range(300, 320)] and 60 < len(ids) < 100
    assert f"{len(ids)} of 400 prompts are in this page" in page.source and "changed most; all are" in page.source


def test_lengths_count_characters_and_empty_answers(make):
    run = make(rows={TASKS[0]: {"accuracy": np.array([[0.0, 1.0, 1.0, 0.0]] * 4)}})
    file = run.stages[1].samples_file(TASKS[0])
    answers = ["four", "", "four", "four"]
    write_jsonl(file, [row | {"response": a} for row, a in zip(read_jsonl(file), answers, strict=True)])
    write_report(run)
    assert samples._cut("a" * 800, 800) == "a" * 800
    text = samples._cut("a" * 700 + "b" * 700, 800)
    assert text.startswith("a" * 533 + " […601 characters left out…] ") and text.endswith(" " + "b" * 266)
    lengths = Page(run).source.split("<h2>Lengths</h2>")[1].split("</table>")[0]
    assert re.findall("<td.*?>(.*?)</td>", lengths) == [DASH, "33", "3 (25 %)", "33", "33"]


def test_many_tasks_are_one_image_with_some_curves(make, monkeypatch):
    monkeypatch.setattr(html, "TABLE_CELLS", 40)
    monkeypatch.setattr(figures, "MOST_CURVES", 4)
    names = [f"task_{i:03}" for i in range(6)]
    scores = np.random.default_rng(0).integers(11, size=(7, 6)) / 10
    scores[np.triu_indices(7, 0, 6)] = NAN
    run = make(scores, tasks=names, task_versions={}, data={"path": None, "demo": False, "fingerprint": {}})
    write_report(run)
    page = Page(run)
    assert "7 stages and 6 tasks are shown as an image" in page.source and '<table class="matrix">' not in page.source
    assert "Only the 4 of 6 tasks" in page.source


# ------------------------------------------------------------------------------------------------------- several runs


def test_the_page_of_several_runs_has_the_tables_of_the_comparison(rich, several):
    other = Run.open(several.parent / "other & <b>more")
    comparison, page = compare([rich, other]), Page(several)
    shown = {cell.strip() for cell in page.cells}
    for table in comparison.tables:
        assert {cell for row in table.rows for cell in row if re.match(r"[+-]?\d+\.\d", cell)} <= shown
    words = " ".join(text for _, text in page.texts)
    assert (
        "compared with rich" in words.replace("  ", " ") and "Not comparable" in words and "the numbers differ" in words
    )
    grey = re.findall(r'<tr class="apart">.*?</tr>', page.source)
    assert [re.search("paper: [A-Za-z-]+", row)[0] for row in grey] == ["paper: LoraSeqFT", "paper: O-LoRA"]
    assert "12.7" in grey[0] and len(re.findall('class="q[0-9]+"', page.source)) >= 16


def test_the_page_of_several_runs_links_to_their_pages(rich, several):
    page = Page(several)
    links = [unquote(a["href"]) for tag, a in page.elements if tag == "a"]
    reports = {(several.parent / link).resolve() for link in links}
    # The other one has no report.
    assert rich.path / "report.html" in reports and len(reports) == 2 and all(file.is_file() for file in reports)
    assert not any(link.startswith("/") for link in links), "a folder of runs can be moved"
    figures = several.parent / "all of them-figures"
    assert sorted(f.name for f in figures.iterdir()) == ["runs.png", "runs.svg", "stages.png", "stages.svg"]


def test_figures_of_several_runs_show_every_run_and_score(make, as_the_paper, drawn):
    make_rich = partial(make_rich_run, make, tasks=TASKS, n=5)
    runs = [make_rich(seed=k, name=f"a-sweep-of-many-learning-rates-{k}") for k in range(5)]
    write_comparison(runs, runs[0].path.parent / "sweep.html", runs[4])
    figures = runs[0].path.parent / "sweep-figures"
    texts = {f.stem: re.findall("<text.*?>(.*?)</text>", f.read_text(encoding="utf-8")) for f in figures.glob("*.svg")}
    names = [name for name in texts["runs"] if "…" in name]
    assert [name[-1] for name in names] == list("01234"), "names are cut in their middle"
    assert {"OP", "BWT", "general", "instruction", "safety", "paper: LoraSeqFT"} <= set(texts["runs"])
    assert len([t for t in texts["stages"] if t == "stage"]) == 4, "one for each column, also above a panel that is not"
    assert [t[-1] for t in texts["stages"] if "…" in t] == list("01234")
    svg = (figures / "runs.svg").read_text(encoding="utf-8")
    assert svg.count("<use") > 5 * 5

    # Where there is nothing to draw, nothing of an earlier page is left.
    write_comparison([make(np.full((4, 3), np.nan), name="nothing")], runs[0].path.parent / "sweep.html")
    assert not list(figures.iterdir()) and "sweep-figures" not in (runs[0].path.parent / "sweep.html").read_text()


def test_the_baseline_is_drawn_among_many_runs_and_tables_say_where_else_they_are(make, monkeypatch, drawn):
    monkeypatch.setattr(figures, "MOST_RUNS", 3)
    monkeypatch.setattr(html, "TABLE_CELLS", 12)
    runs = [make(name=f"r{k}") for k in range(5)]
    write_comparison(runs, runs[0].path.parent / "many.html", runs[4])
    page = Page(runs[0].path.parent / "many.html")
    drawn = re.findall("<text.*?>(.*?)</text>", re.search("<svg.*?</svg>", page.source, re.DOTALL)[0])
    assert [t for t in drawn if re.fullmatch("r[0-9]", t)] == ["r0", "r1", "r4"]
    words = " ".join(text for _, text in page.texts)
    assert "Only 3 of 5 runs are shown." in words and "is in the .md and .csv." in words and "report.md" not in words


def test_the_page_of_several_runs_has_no_script_and_escapes_every_name(several, make, drawn):
    page = Page(several)
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert "script-src 'none'" in policy and "default-src 'none'" in policy
    assert {"script", "img", "b"}.isdisjoint(tag for tag, _ in page.elements)
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert "other & <b>more" in "".join(text for _, text in page.texts)
    runs = [make(name=name) for name in ("a\x01b", "\x1b[0m", "\ufffe", "中文" * 20)]
    write_comparison(runs, runs[0].path.parent / "page.html")


# ------------------------------------------------------------------------------------------------------------ browser

FLAGS = ["--no-sandbox", "--no-first-run"]
FLAGS += [f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")]
#: The contrast of every text with its background, as WCAG defines it, the lowest first.
CONTRAST = """() => {
  const read = (c) => { const x = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    x.fillStyle = c; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data]; };
  const known = new Map();
  const rgb = (c) => { if (!known.has(c)) known.set(c, read(c)); return known.get(c); };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const muted = getComputedStyle(document.querySelector('figcaption')).color;
  const seen = new Map();
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || ['SCRIPT', 'NOSCRIPT', 'OPTION'].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = e instanceof SVGElement ? style.fill : style.color;
    let behind = e;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const paper = behind ? getComputedStyle(behind).backgroundColor : 'white';
    // A number on a bar, of which the style knows nothing.
    if (e.closest('#figure-judged') && /^[0-9]+$/.test(e.textContent) && ink !== muted) continue;
    seen.set(`${ink} ${paper}`, [ink, paper, e.tagName, e.textContent.trim().slice(0, 30)]);
  }
  return [...seen.values()].map(([ink, paper, ...what]) => {
    const [a, b] = [light(rgb(ink)), light(rgb(paper))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), ...what];
  }).sort((x, y) => x[0] - y[0]);
}"""


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a run; the test fails if the page loads anything, or complains."""
    problems, contexts = [], []

    def visit(run, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        address = _file(run).as_uri()
        page.on("request", lambda r: r.url in (address, "data:,") or problems.append(r.url[:100]))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_readable(visit, rich, scheme):
    page = visit(rich, 390, color_scheme=scheme)
    page.click("#fold summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    lowest = page.evaluate(CONTRAST)
    assert len(lowest) > 15 and lowest[0][0] >= 4.5, lowest[:4]
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.locator("article.sample").count() == 20


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_of_several_runs_fits_and_is_readable(visit, several, width, scheme):
    page = visit(several, width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure svg[role=img]").count() == 2 and page.evaluate("window.hacked === undefined")
    assert page.evaluate(CONTRAST)[0][0] >= 4.5
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 1040, "height": 900})  # A4 on its side, between its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 1040


def test_panels_are_stacked_on_a_phone(visit, rich):
    for width in (1280, 390):
        page = visit(rich, width)
        cut = page.locator("figure.cut")
        names = cut.evaluate_all("all => all.map((figure) => figure.id)")
        assert names == [f"figure-{name}" for name in ("sequence", "tasks", "flow", "general", "judged", "cost")]
        halves = cut.locator(".halves svg").all()
        assert len(halves) == 12 and all(half.is_visible() == (width < 640) for half in halves)
        wide = cut.locator(".whole").evaluate_all("all => all.map((e) => e.getBoundingClientRect().width)")
        assert all((w > 640) == (width > 640) for w in wide)
    # The halves have the curves and bars of the figure, in its colours.
    for half in halves:
        pixels = np.asarray(Image.open(io.BytesIO(half.screenshot())).convert("HSV"))
        assert (pixels[..., 1] > 150).sum() > 50


def test_hostile_texts_run_no_script(visit, hostile):
    page = visit(hostile, 390)
    page.click("#fold summary")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img, i svg, article img").count() == 0
    assert page.locator("article pre").first.text_content() == f"prompt {HOSTILE}"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_samples_can_be_searched_and_filtered(visit, rich):
    page = visit(rich)
    page.click("nav a[href='#samples']")
    page.locator("#browser").wait_for()  # a link to the folded samples opens them
    data = Page(rich).data

    def shown():
        return int(page.locator("#count").text_content().split(" of ")[0].replace(",", ""))

    assert shown() == len([r for r in data["rows"] if {0, 8} <= {a[0] for a in r[5]}])
    page.select_option("#task", label="FOMC")
    assert shown() == 20 and page.locator("#paging").is_hidden()
    page.select_option("#before", "own")
    page.select_option("#change", "lost")
    fomc = {row[1]: {a[0]: a[2] for a in row[5]} for row in data["rows"] if row[0] == 1}
    lost = [name for name, scores in fomc.items() if scores[2] == 1 and scores[8] == 0]
    assert shown() == len(lost) > 0
    heads = page.locator("article h3").all_text_contents()
    assert sorted(heads) == sorted(f"FOMC · {name}right to wrong" for name in lost)
    page.fill("#search", f"QUESTION {lost[0]}:")
    count = page.get_by_role("status")
    count.filter(has_text=re.compile("^1 of")).wait_for()
    page.fill("#search", "nothing has this")
    count.filter(has_text=re.compile("^0 of")).wait_for()
    assert page.locator("article").count() == 0
    page.fill("#search", "")
    count.filter(has_text=re.compile("^[1-9]")).wait_for()  # a search begins when typing has paused
    page.select_option("#task", "all")
    page.select_option("#before", "0")
    page.select_option("#change", "worse")
    page.locator("#paging").wait_for()
    first = page.locator("article h3").first.text_content()
    page.click("#next")
    assert page.locator("#page").text_content().startswith("page 2 of ")
    assert page.locator("article h3").first.text_content() != first


def test_a_number_of_lost_rows_links_to_these_rows(visit, rich):
    page = visit(rich)
    assert page.locator("#browser").is_hidden()

    def shown():
        return int(page.locator("#count").text_content().split(" of ")[0])

    for row, column in (("FOMC", 3), ("FOMC", "back"), ("Py150", 6)):  # with scores of 0 and 1, and graded ones
        cells = page.locator("#transitions table").nth(2).locator("tr", has_text=row).locator("td")
        cell = cells.last if column == "back" else cells.nth(column - 2)
        cell.locator("a").click()
        page.locator("#task").filter(has_text=row).wait_for()
        expect = int(cell.text_content().split()[0])
        page.wait_for_function(f"document.querySelector('#count').textContent.startsWith('{expect} of')")
        assert expect == shown() > 0 and page.locator("#browser").is_visible()
        assert {t.split(" ·")[0] for t in page.locator("article h3").all_text_contents()} == {row}


def test_thousands_of_samples_do_not_freeze_the_page(visit, make, drawn):
    rows = np.random.default_rng(0).integers(2, size=(2000, 4)).astype(float)
    run = make(rows={task: {"accuracy": rows} for task in TASKS})
    write_report(run)
    page = visit(run)
    assert len(Page(run).data["rows"]) > 5000
    took = page.evaluate(
        "() => { const start = performance.now(); const s = document.getElementById('change'); s.value = 'lost';"
        "s.dispatchEvent(new Event('change')); return performance.now() - start; }"
    )
    assert took < 500 and page.locator("article").count() == 20


def test_everything_except_the_samples_works_without_javascript(visit, rich):
    page = visit(rich, java_script_enabled=False)
    assert page.locator("figure svg[role=img]").count() == 8 and page.locator("table.matrix td").count() == 72
    assert page.locator("#browser").is_hidden()
    assert "need JavaScript" in page.locator("body").inner_text()


def test_a_printed_page_is_light_and_shows_folded_parts(visit, rich):
    page = visit(rich, 720, color_scheme="dark")  # A4 between its margins
    page.click("#fold summary")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden() and page.locator("#provenance").is_visible()
    boxes = "[...document.querySelectorAll('.scroll, pre')]"
    clipped = page.evaluate(f"{boxes}.filter((e) => getComputedStyle(e).overflowX !== 'visible').length")
    assert clipped == 0
    assert len(page.pdf()) > 50_000


def test_print_has_room_for_every_judged_set(visit, make, drawn):
    run = make()
    for stage in (run.stages[0], run.stages[3]):
        for k, name in enumerate(JUDGED):
            columns = {"characters": np.full(8, 400.0), "empty": np.arange(8) < k}
            write_cell(stage, name, columns, settings={"test_rows": 8, "backend": "hf"}, version=1)
    write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8").split("## Answers for the judges")[1]
    assert "| 3_trace_meetingbank | 400 | 400 (12 %) | 400 (25 %) |" in text
    page = visit(run, 720)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
