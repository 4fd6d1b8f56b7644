"""The gate: verdicts on drops, the rows that they need, the rate of wrong verdicts, and `trace-bench check`."""

import json
import math
import re
import shlex
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import yaml
from made_runs import ICL, JOINT, TASKS, write_cell
from test_docs import ROOT, helped, unknown

from trace_bench import cli
from trace_bench.measures.gate import UNKNOWN, WITHIN, WORSE, p_worse, rows_needed, verdicts
from trace_bench.metrics import Estimate, difference_interval, mean_of, net_interval
from trace_bench.report.results import Results
from trace_bench.run import read_json
from trace_tasks.data.files import write_json

Z = NormalDist().inv_cdf(0.975)


def with_error(value, error):
    return Estimate(value, value - Z * error, value + Z * error)


# ------------------------------------------------------------------------------------------------- the pure functions


def test_a_drop_is_within_the_limit_or_worse_or_cannot_be_told():
    """Limit 0.02, standard error 0.01, so an end is 0.0196 away: at 0.0004 and 0.0396 the verdict changes."""
    values = {-0.03: WITHIN, 0.0004: WITHIN, 0.0005: UNKNOWN, 0.02: UNKNOWN, 0.0395: UNKNOWN, 0.0397: WORSE}
    for value, verdict in values.items():
        assert verdicts([with_error(value, 0.01)], [0.02], [400], [1]) == [verdict], value
    for none in (Estimate(0.5), Estimate(0.0), Estimate(0.0, 0.0, 0.0)):  # without an interval, or without a width
        assert verdicts([none], [0.02], [400], [1]) == [UNKNOWN]
    assert p_worse(with_error(0.05, 0.01), 0.02, 10**6) == pytest.approx(NormalDist().cdf(-3), rel=1e-4)
    assert p_worse(with_error(0.05, 0.01), 0.02, 3) == pytest.approx((1 - 3 / math.sqrt(11)) / 2), "t of 2 degrees"


def test_one_of_several_drops_must_be_certain_after_holms_correction():
    """Two standard errors beyond the limit (p = 0.023) are enough alone, and not as one of three of equal weight."""
    drop, still = with_error(0.04, 0.01), with_error(0.0, 0.001)
    assert verdicts([drop], [0.02], [400], [1]) == [WORSE]
    assert verdicts([drop, still, still], [0.02] * 3, [400] * 3, [1, 1, 1]) == [UNKNOWN, WITHIN, WITHIN]
    assert verdicts([drop, still, still], [0.02] * 3, [400] * 3, [2, 1, 1])[0] == WORSE, "half of 0.05 is its share"
    # Once the first is certain the second is held against half of the level, and no longer a third (Holm).
    assert verdicts([with_error(0.06, 0.01), drop, still], [0.02] * 3, [400] * 3, [1, 1, 1])[:2] == [WORSE, WORSE]


def test_the_needed_rows_follow_from_variance_and_distance_to_the_limit():
    """With s = 0.2 on 100 rows; 0.01 from the limit: ((1.96 + 0.84) * 0.2 / 0.01)^2 = 3139.6 rows."""
    assert rows_needed(with_error(0.01, 0.02), 0.02, 100) == 3140
    assert rows_needed(with_error(0.03, 0.02), 0.02, 100) == 3140
    # A tenth of 0.05 is 2.576 standard errors: (2.576 + 0.842)^2 * 400.
    assert rows_needed(with_error(0.03, 0.02), 0.02, 100, share=0.1) == 4672
    assert rows_needed(with_error(0.01, 0.02), 0.02, 100, share=0.1) == 3140, "being within is not corrected"
    for drop in (with_error(0.02, 0.02), with_error(0.0199, 0.02), Estimate(0.01), Estimate(0.01, 0.01, 0.01)):
        assert rows_needed(drop, 0.02, 100) is None


def test_the_needed_rows_give_a_verdict_in_four_of_five_cases():
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, -1.0, 0.0], [20, 20, 360])[:, None]  # a drop of zero, 10 % of the rows changed
    needed = rows_needed(Estimate(0.0, *(float(b[0]) for b in difference_interval(x))), 0.02, len(x))
    found = rng.choice([1.0, 0.0, -1.0], p=[0.05, 0.9, 0.05], size=(needed, 500))
    drops = [Estimate(*e) for e in zip(found.mean(0), *difference_interval(found), strict=True)]
    told = sum(verdicts([drop], [0.02], [400], [1]) == [WITHIN] for drop in drops)
    assert 370 <= told <= 430, told


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("tasks", [1, 7])
def test_a_drop_at_its_limit_is_called_worse_in_at_most_one_of_twenty_checks(n, tasks):
    """All tasks lose exactly the limit, so "cannot be told" is the only right verdict on each task and the mean."""
    limit, checks = 0.02, 600
    rng = np.random.default_rng(n + tasks)
    lost = rng.uniform(0.05, 0.2, tasks)
    won = lost - limit
    found = [
        rng.choice([1.0, -1.0, 0.0], p=[a, b, 1 - a - b], size=(n, checks)) for a, b in zip(lost, won, strict=True)
    ]
    intervals = [(x.mean(0), *difference_interval(x)) for x in found]
    alarms = passes = 0
    for k in range(checks):
        drops = [Estimate(*(float(part[k]) for part in parts)) for parts in intervals]
        lines = drops if tasks == 1 else [mean_of(drops), *drops]
        weights = [tasks, *[1] * tasks][: len(lines)]
        mean, *rest = verdicts(lines, [limit] * len(lines), [n * weight for weight in weights], weights)
        alarms += WORSE in (mean, *rest)
        passes += mean == WITHIN
    most = checks * 0.05 + 2 * math.sqrt(checks * 0.05 * 0.95)
    assert alarms <= most and passes <= most, (alarms, passes)


# ------------------------------------------------------------------------------------------------- trace-bench check


def column(ones, n=400):
    return np.repeat([1.0, 0.0], [ones, n - ones])


def scores(*stages):
    """Rows of a task. At each stage the first ones are right, this many."""
    return {"accuracy": np.stack([column(ones) for ones in stages], axis=1)}


#: After their own stages (1 and 2) the first task loses 40 of 400 rows, and the second none.
LOST = {TASKS[0]: scores(100, 300, 280, 260), TASKS[1]: scores(100, 100, 300, 300), TASKS[2]: scores(90, 90, 90, 300)}
SUITE = {"settings": {"data": "hub", "general_rows": None}, "version": 1}


def measure_suites(run, **right):
    """Writes general suites at some stages: name -> {stage: number of right rows}."""
    for suite, stages in right.items():
        for index, ones in stages.items():
            write_cell(run.stages[index], f"general_{suite}", {"acc": column(ones)}, **SUITE)


def checked(capsys, run, *argv):
    """The exit code, and the printed text (standard output, standard error)."""
    capsys.readouterr()
    try:
        cli.main(["check", str(run.path), *map(str, argv)])
    except SystemExit as e:
        code = e.code
    else:
        code = 0
    return code, *capsys.readouterr()


def as_json(capsys, run, *argv):
    code, out, err = checked(capsys, run, *argv, "--json")
    assert out, err
    found = json.loads(out)
    assert found["exit_code"] == code
    return found


def test_forgetting_is_checked_for_the_mean_and_each_task(make, capsys):
    run = make(rows=LOST)
    found = as_json(capsys, run, "--max-forgetting", 2)
    assert [(line["name"], line["verdict"], line["decides"]) for line in found["lines"]] == [
        (None, WORSE, True),
        (TASKS[0], WORSE, False),
        (TASKS[1], WITHIN, False),
    ]
    mean, first, second = found["lines"]
    low, high = net_interval(40, 0, 400)
    assert [first[key] for key in ("drop", "low", "high", "rows")] == pytest.approx([10, 100 * low, 100 * high, 400])
    assert second["drop"] == 0 and second["high"] == pytest.approx(100 * net_interval(0, 0, 400)[1])
    bwt = Results(run).sequence["BWT"][-1]
    assert [-mean[key] / 100 for key in ("drop", "high", "low")] == pytest.approx(bwt), "as in the report"
    assert mean["rows"] == 800 and found["exit_code"] == 1

    code, out, err = checked(capsys, run, "--max-forgetting", 20)
    assert code == 0 and not err and out.splitlines()[-1] == f"{run.path}, 3_{TASKS[2]}: within"
    assert re.search(rf"forgetting +{TASKS[0]} +since its own stage +\+10\.0 \[\+[\d., +]+\] +limit 20 +within", out)


def test_a_check_that_cannot_tell_says_how_many_rows_are_needed(make, capsys):
    run = make(rows={**LOST, TASKS[0]: scores(100, 300, 280, 280), TASKS[1]: scores(100, 100, 300, 280)})
    found = as_json(capsys, run, "--max-forgetting", 5.5)
    assert found["exit_code"] == 3 and {line["verdict"] for line in found["lines"]} == {UNKNOWN}
    mean = found["lines"][0]
    half = mean["high"] - mean["drop"]
    ends, power = (NormalDist().inv_cdf(p) for p in (0.975, 0.8))
    assert mean["drop"] == pytest.approx(5)
    assert mean["rows_needed"] == math.ceil(800 * ((ends + power) / ends * half / 0.5) ** 2) > 800
    out = checked(capsys, run, "--max-forgetting", 5.5)[1]
    assert f"cannot be told (needs about {mean['rows_needed']:,} rows; there are 800)" in out


def test_equal_drops_of_all_rows_of_an_unbounded_score_prove_nothing(make, capsys):
    same = np.tile([[0.0, 100.0, 100.0, 100.0]], (3, 1))  # right or wrong as 100 and 0, which is no fraction
    run = make(rows={**LOST, TASKS[0]: {"points": same}})
    for stage in run.stages:
        content = read_json(stage.eval_file(TASKS[0]))
        write_json(stage.eval_file(TASKS[0]), content | {"scale": {"points": None}})
    found = as_json(capsys, run, "--max-forgetting", 20, "--each")
    assert {line["name"]: line["verdict"] for line in found["lines"]}[TASKS[0]] == UNKNOWN and found["exit_code"] == 3
    graded = {
        "points": np.tile([[0.0, 0.3, 0.3, 0.2]], (3, 1))
    }  # of a mean with other tasks they are no certain part either
    mean = as_json(capsys, make(name="graded", rows={**LOST, TASKS[0]: graded}), "--max-forgetting", 20)["lines"][0]
    assert mean["name"] is None and mean["verdict"] == UNKNOWN and mean["low"] is None
    out = checked(capsys, run, "--max-forgetting", 20, "--each")[1]
    assert "or all rows have the same drop, which says nothing about other rows)" in out


def test_a_single_task_needs_no_certain_verdict_unless_each_is_asked_for(make, capsys):
    run = make(rows={**LOST, TASKS[0]: scores(100, 300, 300, 296)})
    found = as_json(capsys, run, "--max-forgetting", 1.5)
    assert [line["verdict"] for line in found["lines"]] == [WITHIN, UNKNOWN, WITHIN] and found["exit_code"] == 0
    assert as_json(capsys, run, "--max-forgetting", 1.5, "--each")["exit_code"] == 3


def test_general_ability_is_checked_against_the_base_model(make, capsys):
    run = make(rows=LOST)
    measure_suites(run, piqa={0: 300, 3: 298}, boolq={0: 300, 3: 299}, ifeval={0: 300, 3: 200})
    found = as_json(capsys, run, "--max-general-drop", 2)
    lines = {line["name"]: line for line in found["lines"]}
    delta = Results(run).general[3]
    assert [-lines[None][key] / 100 for key in ("drop", "high", "low")] == pytest.approx(delta)
    assert lines["general_piqa"]["drop"] == pytest.approx(0.5) and lines[None]["rows"] == 800
    assert lines["general_ifeval"]["verdict"] == WORSE and found["exit_code"] == 1, "it is not in the mean"
    both = as_json(capsys, run, "--max-general-drop", 30, "--max-forgetting", 30)
    assert [line["what"] for line in both["lines"]] == ["forgetting"] * 3 + ["general drop"] * 4
    assert both["verdict"] == WITHIN


def test_the_last_checkpoint_is_compared_with_the_base_model_and_the_previous_one(make, capsys):
    rows = {TASKS[0]: scores(300, 380, 300), TASKS[1]: scores(200, 200, 200)}
    run = make(checkpoints={"v1": "a", "v2": "b"}, tasks=TASKS[:2], rows=rows)
    lines = as_json(capsys, run, "--max-forgetting", 5)["lines"]
    assert [(x["since"], x["name"], round(x["drop"], 6), x["verdict"]) for x in lines] == [
        ("the base model", None, 0, WITHIN),
        ("the base model", TASKS[0], 0, WITHIN),
        ("the base model", TASKS[1], 0, WITHIN),
        ("1_v1", None, 10, WORSE),
        ("1_v1", TASKS[0], 20, WORSE),
        ("1_v1", TASKS[1], 0, WITHIN),
    ]
    alone = make(name="alone", checkpoints={"v1": "a"}, tasks=TASKS[:1], rows={TASKS[0]: scores(300, 298)})
    (line,) = as_json(capsys, alone, "--max-forgetting", 5)["lines"]
    assert line["since"] == "the base model" and line["decides"], "one task is its own mean"


def test_a_run_is_compared_with_another_run_on_the_same_rows(make, capsys):
    one, two = make(rows=LOST), make(name="other", rows={**LOST, TASKS[0]: scores(100, 300, 300, 300)}, seed=2)
    for run, ones in ((one, 280), (two, 300)):
        measure_suites(run, piqa={3: ones})
    lines = as_json(capsys, one, "--max-forgetting", 2, "--max-general-drop", 2, "--against", two.path)["lines"]
    drops = {line["name"]: (round(line["drop"], 6), line["verdict"]) for line in lines}
    assert drops[TASKS[0]] == (10, WORSE) and drops[TASKS[2]] == (0, WITHIN)
    assert drops["general_piqa"] == (5, WORSE) and {line["since"] for line in lines} == {str(two.path)}
    backwards = as_json(capsys, two, "--max-forgetting", 2, "--against", one.path)
    assert backwards["exit_code"] == 0 and backwards["lines"][0]["drop"] == pytest.approx(-10 / 3)


def test_a_run_is_not_compared_with_itself(make, capsys):
    run = make(rows=LOST)
    code, out, err = checked(capsys, run, "--max-forgetting", 2, "--against", run.path / ".." / run.path.name)
    assert code == 2 and not out and "is the run itself" in err


def test_runs_that_do_not_share_rows_settings_or_tasks_are_refused(make, capsys):
    one = make(rows=LOST)

    def refused(other, *limits):
        code, out, err = checked(capsys, one, "--against", other.path, *(limits or ("--max-forgetting", 2)))
        assert code == 2 and not out
        return err

    assert "tasks: " in refused(make(name="tasks", tasks=TASKS[:2], rows={t: LOST[t] for t in TASKS[:2]}))
    other = make(name="settings", rows=LOST)
    file = other.stages[3].eval_file(TASKS[1])
    write_json(file, read_json(file) | {"settings": {"backend": "vllm"}})
    assert "backend: 'hf' -> 'vllm'" in refused(other)
    data = {"path": "x", "demo": False, "fingerprint": {**dict.fromkeys(TASKS, "f00"), TASKS[0]: "f01"}}
    assert f"rows of {TASKS[0]}: fingerprint f00 -> f01" in refused(make(name="data", rows=LOST, data=data))
    fewer = {task: {"accuracy": x["accuracy"][:300]} for task, x in LOST.items()}
    assert f"rows of {TASKS[2]}: 400 -> 300" in refused(make(name="fewer", rows=fewer))
    measure_suites(one, piqa={3: 280})
    assert "has no score of any general suite at 3_" in refused(other, "--max-general-drop", 1)
    measure_suites(other, piqa={3: 280}, boolq={3: 280})
    assert "general suites: general_piqa -> general_boolq, general_piqa" in refused(other, "--max-general-drop", 1)


def test_missing_measurements_are_an_error_with_the_command_that_makes_them(make, capsys):
    run = make(rows=LOST, name="my run")
    quoted = f"'{run.path}'"
    assert checked(capsys, run, "--max-general-drop", 1)[0::2] == (
        2,
        f"error: --max-general-drop: {run.path} has no score of any general suite at the base model. Measure it: "
        f"trace-bench evaluate {quoted} --general general\n",
    )
    measure_suites(run, piqa={0: 300}, boolq={0: 300, 3: 300})
    code, _, err = checked(capsys, run, "--max-general-drop", 1)
    assert code == 2 and f"evaluate {quoted} --general general_boolq general_piqa" in err
    assert "general_piqa at 3_" in err
    run.stages[3].eval_file(TASKS[1]).unlink()
    code, _, err = checked(capsys, run, "--max-forgetting", 1)
    assert code == 2 and f"{TASKS[1]} at 3_{TASKS[2]}. Measure it: trace-bench evaluate {quoted}\n" in err
    run.stages[3].train_file.unlink()
    assert "is not trained" in checked(capsys, run, "--max-forgetting", 1)[2]
    joint = make(JOINT, name="joint", method="joint", stages=["joint"])
    assert "a different run (--against)" in checked(capsys, joint, "--max-forgetting", 1)[2]
    icl = make(ICL, name="icl", method="icl", stages=[])
    measure_suites(icl, piqa={0: 300})
    assert "no stage or task comes after it" in checked(capsys, icl, "--max-general-drop", 1)[2]
    first = make(name="first", checkpoints={"v1": "a"}, tasks=TASKS[:1], rows={TASKS[0]: scores(300, 280)})
    cli.main(["evaluate", str(first.path), "--drop", "v1"])  # as the workflow of the docs does after a failure
    code, _, err = checked(capsys, first, "--max-forgetting", 1)
    assert (
        code == 2
        and f"has no checkpoint, so nothing can be forgotten. Add one: trace-bench evaluate {first.path} " in err
    )
    theirs = make(
        name="theirs",
        rows={**LOST, TASKS[0]: {"accuracy": np.full((400, 4), np.nan)}},
        answers_only="imported from lm-eval",
    )
    code, _, err = checked(capsys, theirs, "--max-forgetting", 1)
    assert code == 2 and "import this score with the others" in err and "trace-bench evaluate" not in err
    assert checked(capsys, run)[0] == 2, "no limit"
    for text in ("-1", "nan", "inf", "two"):
        assert checked(capsys, run, "--max-forgetting", text)[0] == 2


def test_an_unexpected_error_has_a_different_exit_code_than_a_drop(make, capsys, monkeypatch):
    monkeypatch.setattr("trace_bench.report.gate.check", lambda *a, **k: 1 / 0)
    code, _, err = checked(capsys, make(rows=LOST), "--max-forgetting", 1)
    assert code == 2 and "ZeroDivisionError" in err


def test_a_check_is_quick_and_needs_no_torch(make):
    run = make(rows=LOST)
    code = f"from trace_bench import cli; cli.main(['check', {str(run.path)!r}, '--max-forgetting', '20'])"
    code += "\nimport sys; assert not {'torch', 'transformers', 'vllm', 'matplotlib', 'lm_eval'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_workflow_of_the_docs_has_commands_that_parse():
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "gate.md").read_text(), re.DOTALL)[1]
    steps = [step["run"] for step in yaml.safe_load(block)["jobs"]["gate"]["steps"] if "run" in step]
    words = [shlex.split(line.partition(" || ")[0]) for line in "\n".join(steps).replace("\\\n", "").splitlines()]
    found = [w[w.index("trace-bench") + 1 :] for w in words if "trace-bench" in w]
    assert [w[0] for w in found] == ["evaluate", "check", "evaluate"]
    for command, *rest in found:
        assert not unknown([w.rstrip(";") for w in rest], helped(command))
