"""Measures which faults the tests find: changes the code at one small place at a time and runs the tests that reach it.

    python -m bench.mutants [FILE ...] [--sample 12] [--tests-seconds 60] [--tests NAME ...] [--again]

A seeded sample of places is changed in each file: comparisons and arithmetic are swapped, constants are moved by one,
conditions are negated, statements are removed, functions return None. Texts, annotations, logging and error messages
stay. A change is killed if a test fails or does not end. It survives if all tests pass: either the tests have a gap, or
the change makes no difference.

The tests run in a copy of the repository. Tests that fail without a change are left out. A first run records which
lines each test reaches; it is repeated for test files that changed. Verdicts are kept, so a stopped run can go on.
`--again` repeats the changes that survived so far, with the present tests.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.changes import Mutant, changed, sample
from bench.house import ROOT
from trace_tasks.data.files import write_json

#: Metrics, scoring, the checks before expensive work, and the methods with their base.
FILES = (
    *("trace_bench/metrics.py", "trace_bench/measures/*.py", "trace_bench/checks.py"),
    *("trace_tasks/scoring.py", "trace_tasks/answers.py", "trace_tasks/written_numbers.py", "trace_tasks/utils.py"),
    *("trace_tasks/reasoning.py", "trace_tasks/general.py", "trainers/*.py", "trainers/base/*.py"),
)
#: Code for the command line of a method, which does not affect what the method computes.
LEFT_OUT = ("trainers/help.py",)
FOLDER = ROOT / "runs" / "bench" / "mutants"
#: Tests are stopped after this many times their CPU seconds, plus some more; or if they wait this many times as long.
TIMES, MORE_SECONDS, WAIT = 5, 60, 5


# --------------------------------------------------------------------------------------------------------- the tests


def cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children: other work on the machine does not count."""
    return sum(os.times()[:4])


class Recorder:
    """A plugin of pytest that records which lines of the files each test reaches, and its CPU seconds.

    The lines that a shared fixture reaches count for each test that uses it.
    """

    def __init__(self, root: Path, files: list[str]) -> None:
        self.files = {str(root / file): i for i, file in enumerate(files)}
        self.now: set[tuple[int, int]] = set()
        self.fixtures: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.tests: dict[str, Any] = {}

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """Called by Python at each function call; traces the functions of the files."""
        number = self.files.get(frame.f_code.co_filename)
        if number is None:
            return None

        def local(frame: Any, event: str, arg: Any) -> Any:
            self.now.add((number, frame.f_lineno))
            return local

        return local(frame, event, arg)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        """Records the lines of a shared fixture separately."""
        before = self.now
        if fixturedef.scope != "function":
            self.now = self.fixtures[fixturedef.argname]
        try:
            return (yield)
        finally:
            self.now = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Traces a test with its fixtures."""
        self.now = set()
        started = cpu_seconds()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            lines = self.now.union(*(self.fixtures[name] for name in item.fixturenames))
            test = self.tests.setdefault(item.nodeid, {"passed": True})
            test |= {"seconds": round(cpu_seconds() - started, 3), "lines": sorted(lines)}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes tests that fail or are skipped."""
        if not report.passed:
            self.tests.setdefault(report.nodeid, {})["passed"] = False


class Chosen:
    """A plugin of pytest that runs only some tests, in a given order, and remembers the first that fails."""

    def __init__(self, names: list[str]) -> None:
        self.order, self.failed = {name: i for i, name in enumerate(names)}, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keeps only the chosen tests, in their order."""
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remembers the first failure."""
        if report.failed:
            self.failed = self.failed or report.nodeid


def copy_tree(to: Path) -> Path:
    """Copies the files that git tracks or would track."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def pytest_alone(tree: Path, arguments: list[str], plugin: Any, told: Callable[[], Any], seconds: float) -> Any:
    """Runs pytest in a process that has imported the libraries but none of our packages, and then calls `told`.

    Returns:
        (pytest's exit code, the result of `told`), or None if the tests did not end in time.
    """
    answer, log = tree.parent / "answer.json", tree.parent / "log"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code: Any = 99
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(tree)
            for name in [n for n in sys.modules if n.partition(".")[0] in ("bench", "trace_tasks")]:
                del sys.modules[name]
            sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
            os.environ["PYTHONPATH"] = str(tree)
            common = [f"--basetemp={tree.parent / 'tests'}", "-q", "-m", "not slow", "--hypothesis-seed=0"]
            code = pytest.main([*arguments, *common, "-p", "no:cacheprovider"], plugins=[plugin])
            write_json(answer, [int(code), told()])
        finally:
            os._exit(0)
    ends = time.monotonic() + WAIT * seconds
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < ends:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that the tests left
    if not ended[0]:
        os.waitpid(child, 0)
    if not ended[0] or (os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) in (signal.SIGKILL, signal.SIGXCPU)):
        return None
    return json.loads(answer.read_text()) if answer.exists() else (99, None)


def reach(tree: Path, files: list[str], patterns: list[str]) -> dict[str, Any]:
    """Test -> whether it passes without a change, its seconds, and each (file, line) that it reaches."""
    folder = tree / "tests"
    helpers = sorted(f for f in folder.glob("*.py") if not f.name.startswith("test_"))
    shared = b"".join(f.read_bytes() for f in [*helpers, *(tree / file for file in files)])
    tests: dict[str, Any] = {}
    for path in sorted({path for pattern in patterns for path in folder.glob(f"{pattern}.py")}):
        key = hashlib.sha256(shared + path.read_bytes()).hexdigest()[:16]
        kept = FOLDER / "reach" / f"{path.stem}-{key}.json"
        if not kept.exists():
            recorder = Recorder(tree, files)
            started = time.perf_counter()
            done = pytest_alone(tree, [f"tests/{path.name}"], recorder, lambda r=recorder: r.tests, 3600)
            if done is None or done[1] is None:
                sys.exit(f"{path.name} does not run without a change:\n{(tree.parent / 'log').read_text()[-2000:]}")
            write_json(kept, done[1])
            print(f"  {path.name}: {len(done[1])} tests, {time.perf_counter() - started:.0f} s", flush=True)
        tests |= json.loads(kept.read_text())
    return tests


def choose(mutant: Mutant, number: int, tests: dict[str, Any], most: float) -> tuple[list[str], float, int]:
    """The tests that reach a change and pass without it: the quickest ones for `most` seconds, sorted by file.

    Returns:
        Their names, their seconds without a change, and the number of tests that are left out.
    """
    first, last = mutant.lines
    reaching = sorted(
        (facts["seconds"], test)
        for test, facts in tests.items()
        if facts["passed"] and any(n == number and (not first or first <= k <= last) for n, k in facts["lines"])
    )
    taken: dict[str, list[str]] = defaultdict(list)
    total = 0.0
    for seconds, test in reaching:
        if total and total + seconds > most:
            break
        taken[test.partition("::")[0]].append(test)
        total += seconds
    names = [test for group in taken.values() for test in group]
    return names, total, len(reaching) - len(names)


# ---------------------------------------------------------------------------------------------------------- the run


def judge(tree: Path, mutant: Mutant, number: int, tests: dict[str, Any], most: float) -> dict[str, Any]:
    """The verdict on a change ("killed", "timed out", "survived" or "not reached"), and the test that decided."""
    names, seconds, more = choose(mutant, number, tests, most)
    verdict: dict[str, Any] = {"tests": len(names), "left_out": more}
    if not names:
        return {"verdict": "not reached", **verdict}
    source = (tree / mutant.file).read_bytes()
    try:
        (tree / mutant.file).write_bytes(changed(mutant, source))
        chosen = Chosen(names)
        files = list(dict.fromkeys(test.partition("::")[0] for test in names))
        done = pytest_alone(tree, [*files, "-x"], chosen, lambda: chosen.failed, TIMES * seconds + MORE_SECONDS)
    finally:
        (tree / mutant.file).write_bytes(source)
    if done is None:
        return {"verdict": "timed out", **verdict}
    code, failed = done
    return {"verdict": "survived" if code == 0 else "killed", **verdict, "by": failed}


def load_libraries() -> None:
    """Imports the libraries of the tests, once for all their processes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("TRACE_DATA", None)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import torch

    torch.set_num_threads(1)
    for name in (
        *("hypothesis", "peft", "trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama"),
        *("lm_eval.evaluator", "lm_eval.models.huggingface"),
    ):
        importlib.import_module(name)


def table(verdicts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """File -> number of its changes with each verdict; in addition the totals."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for facts in verdicts.values():
        counts[facts["file"]][facts["verdict"]] += 1
        counts["all"][facts["verdict"]] += 1
    return {file: dict(c) for file, c in sorted(counts.items(), key=lambda item: item[0] == "all")}


def show(verdicts: dict[str, Any]) -> None:
    """Prints the changes that no test found, and the shares of changes that tests found."""
    for name, facts in sorted(verdicts.items()):
        if facts["verdict"] in ("survived", "not reached"):
            more = f", {facts['left_out']} more reach it" if facts["left_out"] else ""
            print(f"{facts['verdict']} ({facts['tests']} tests{more}) {name}")
    for file, counts in table(verdicts).items():
        found, n = counts.get("killed", 0) + counts.get("timed out", 0), sum(counts.values())
        print(f"{file:40} {found:4} of {n:4} = {100 * found / n:3.0f} %")


def main() -> None:
    """Changes the files, runs the tests and saves the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files to change, from the root of the repository; default: all")
    parser.add_argument("--sample", type=int, default=12, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--tests-seconds", type=float, default=60, help="seconds of tests for each change")
    parser.add_argument("--tests", nargs="+", default=["test_*"], help="names of test files; fewer find fewer changes")
    parser.add_argument("--again", action="store_true", help="repeat the changes that no test found")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where verdicts are kept")
    args = parser.parse_args()
    known = [str(p.relative_to(ROOT)) for pattern in FILES for p in sorted(ROOT.glob(pattern))]
    known = [f for f in known if f not in LEFT_OUT and not f.endswith("__init__.py")]
    if unknown := set(args.files) - set(known):
        sys.exit(f"{', '.join(sorted(unknown))}: not one of the files that are changed: {', '.join(known)}.")
    load_libraries()
    kept = args.folder / "verdicts.json"
    verdicts = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        if (real := ROOT.parent / "shared").is_dir():  # some tests need the data there
            (tree.parent / "shared").symlink_to(real.resolve())
        tests = reach(tree, known, args.tests)
        chosen = {}
        for file in args.files or known:
            drawn = sample(file, (tree / file).read_bytes(), args.sample, args.seed)
            chosen |= {str(mutant): mutant for mutant in drawn}
        for i, (name, mutant) in enumerate(chosen.items(), 1):
            done = verdicts.get(name, {}).get("verdict")
            if done in ("killed", "timed out") or (done and not args.again):
                continue
            started = time.perf_counter()
            verdict = judge(tree, mutant, known.index(mutant.file), tests, args.tests_seconds)
            verdicts[name] = {"file": mutant.file, **verdict, "seconds": round(time.perf_counter() - started, 1)}
            write_json(kept, verdicts)
            print(f"{i}/{len(chosen)} {verdict['verdict']} in {verdicts[name]['seconds']} s: {name}", flush=True)
    verdicts = {name: facts for name, facts in verdicts.items() if name in chosen}
    show(verdicts)
    if not args.files and args.tests == parser.get_default("tests"):
        from bench.common import save

        counts = table(verdicts)
        save("mutants", {"sample": args.sample, "seed": args.seed, "files": counts})


if __name__ == "__main__":
    main()
