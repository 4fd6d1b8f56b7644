"""`trace-bench data`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trace_bench.cli import show
from trace_bench.text import word
from trace_tasks import data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("source", nargs="?", help="folder (also CL_Benchmark), archive, or demo (TRACE_DATA)")


def run(args: argparse.Namespace) -> None:
    """Shows the data sets of a source, and how to use them."""
    if args.source and data.is_cl_benchmark(Path(args.source)):
        _check_sets(Path(args.source).absolute())
        return
    found = [_check(root) for root in data.find_all_data(args.source)]
    good = [export for export, _ in found if export]
    if good:
        print("Complete. Use it with:" if len(good) == 1 else "Complete. Use one of them with:")
        show("\n".join(good))
    if problems := [problem for _, problem in found if problem]:
        raise data.DataError("\n".join(problems))


def _check_sets(root: Path) -> None:
    """Shows the sets of CL_Benchmark, and how to use them."""
    show(f"{root}\n{'task':<22}{'train':>8}{'dev':>8}{'test':>8}")
    good, problems = [], []
    there = {task: folder for task, folder in data.CL_BENCHMARK.items() if (root / folder).is_dir()}
    for task, folder in there.items():
        try:
            rows = data.read_set(folder, root)
        except data.DataError as e:
            problems.append(str(e))
            continue
        good.append(task)
        show(f"{task:<22}{''.join(f'{len(rows.get(split, ())) or chr(45):>8}' for split in data.SPLITS)}")
    if data.is_demo(root):
        print("Demo data made by this program: for trials, not comparable with other results.")
    if good:
        show(f"Use it with:\n  export TRACE_CL_BENCHMARK={word(root)}\n  --tasks {' '.join(good)}")
    if absent := [task for task in data.CL_BENCHMARK if task not in there]:
        print(f"Not there: {', '.join(absent)}.")
    if problems:
        raise data.DataError("\n".join(problems))


def _check(root: Path) -> tuple[str, str]:
    """Shows a data set: the line that makes it used if it is complete, and what is wrong if it cannot be used."""
    reasoning = data.is_reasoning(root)
    variable, names = ("TRACE_REASONING", data.REASONING) if reasoning else ("TRACE_DATA", data.FOLDERS)
    there = {task: root / folder for task, folder in names.items() if (root / folder).is_dir()}
    complete, problem = _usable(there, data.SPLITS)
    tested, _ = _usable(there, ["test"])
    show(f"{root}\n{'task':<22}{'train':>8}{'eval':>8}{'test':>8}  fingerprint")
    for task, rows in tested.items():
        sizes = "".join(f"{rows.get(split, '-'):>8}" for split in data.SPLITS)
        show(f"{task:<22}{sizes}  {data.folder_fingerprint(there[task])}")
    if data.is_demo(root):
        print("Demo data made by this program: for trials, not comparable with TRACE.")
    export = f"  export {variable}={word(root)}"
    part = [f"Complete: {len(complete)} of {len(names)} tasks."]
    if complete:
        part += [f"Train and evaluate them with:\n{export}\n  --tasks {' '.join(complete)}"]
    if len(tested) > len(complete):
        part += [f"With test rows, to evaluate checkpoints on:\n{export}\n  --tasks {','.join(tested)}"]
    if not complete or len(tested) < len(there):
        return "", "\n".join([f"{root} cannot be used as it is.", problem, *part])
    if len(complete) < len(names):
        absent = [task for task in names if task not in there]
        part += [f"Not there: {', '.join(absent)}."] if absent else []
        show("\n".join([*([problem] if problem else []), *part]))
    elif reasoning:
        show(f"The variant with reasoning, for the tasks reasoning_*, beside the plain rows. Use it with:\n{export}")
    else:
        return export, ""
    return "", ""


def _usable(folders: dict[str, Path], needed: Sequence[str]) -> tuple[dict[str, dict[str, int]], str]:
    """The rows of each task that has all that is needed of it, and what is wrong with the others."""
    try:
        return data.check_folders(folders, needed), ""
    except data.DataError as e:
        alone = [_usable({task: folder}, needed)[0] for task, folder in folders.items()] if len(folders) > 1 else []
        return {task: sizes for good in alone for task, sizes in good.items()}, str(e)
