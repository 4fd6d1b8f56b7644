"""What grows with the number of rows and tasks besides generation: scoring, the numbers of a matrix, intervals.

- scoring: 5000 rows of each task, every one against the answer of another row.
- matrix: OP, BWT, forgetting, FWT and mean OP of 100 runs of 100 tasks each.
- intervals: the bootstrap of mean OP over 100 tasks of 500 rows at 100 stages.

That a stage costs the same at T = 30 as at the start, and a report of 100 tasks takes seconds, is tested
(`tests/test_scale.py`).
"""

from __future__ import annotations

import time

import numpy as np

from bench.common import save
from trace_bench.report import Table, markdown
from trace_bench.tasks import load_tasks

ROWS = 5000


def main() -> None:
    """Times each part and saves the seconds."""
    from trace_bench import metrics
    from trace_tasks import data

    seconds: dict[str, float] = {}
    for name, task in load_tasks(list(data.FOLDERS)).items():
        docs = list(task.test_docs())
        rows = [docs[i % len(docs)] for i in range(ROWS)]
        answers = [docs[(i + 1) % len(docs)]["answer"] for i in range(ROWS)]
        seconds[f"scoring {name}"] = _time(
            lambda task=task, rows=rows, answers=answers: [
                task.process_results(doc, [answer]) for doc, answer in zip(rows, answers, strict=True)
            ]
        )
    rng = np.random.default_rng(0)
    runs = rng.random((100, 101, 100))
    numbers = ("overall_performance", "backward_transfer", "forgetting", "forward_transfer", "average_accuracy")
    seconds["matrix of 100 runs"] = _time(lambda: [getattr(metrics, name)(runs) for name in numbers])
    groups = [rng.integers(0, 2, (500, 101)) for _ in range(100)]
    seconds["intervals"] = _time(lambda: metrics.bootstrap_interval(groups, metrics.average_accuracy))
    seconds = {name: round(value, 2) for name, value in seconds.items()}
    save("scale", {"rows": ROWS, "demo": data.is_demo(data.find_data()), "seconds": seconds})
    print(markdown(Table([f"scale ({ROWS} rows)", "seconds"], [[name, value] for name, value in seconds.items()])))


def _time(what) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
