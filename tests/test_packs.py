"""CL_Benchmark, the sets of O-LoRA's paper: its prompts and exact match, orders, errors, audit, and a run."""

import json
import re
import string

import pytest
from conftest import quick_options, train
from hypothesis import given
from hypothesis import strategies as st

from trace_bench.cli import main
from trace_bench.report import Results, write_report
from trace_bench.report.leaks import without_leaked
from trace_bench.report.paper import name_of
from trace_bench.report.result_file import protocol
from trace_bench.run import Run
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks import data
from trace_tasks.answers import choice_tolerant, read_choice
from trace_tasks.data.audit import audit
from trace_tasks.data.audit_text import as_text
from trace_tasks.data.demo import write_demo
from trace_tasks.data.files import write_json
from trace_tasks.data.names import expand_orders
from trace_tasks.scoring import label_accuracy

TOPICS = ["World", "Sports", "Business", "Science or Technology"]


def write_set(root, folder, labels, splits):
    """Writes a set in O-LoRA's layout: split -> (sentence, label) pairs."""
    write_json(root / folder / "labels.json", labels)
    for split, rows in splits.items():
        write_json(root / folder / f"{split}.json", [{"sentence": s, "label": label} for s, label in rows])


def story(text):
    return f"Title: {text}\nText: The {text} were told at length by those who saw what it was about.\n"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    root = tmp_path / "CL_Benchmark"
    test = [(story("talks {in} braces"), "World"), (story("final of the cup"), "Sports")]
    train = [(story("shares"), "Business"), (story("chips and code"), "Science or Technology"), test[1]]
    write_set(root, "TC/agnews", TOPICS, {"train": train, "dev": test, "test": test})
    asked = 'Which sentence is the effect of "It rained."? Choose one between A and B.\nA: It got wet.\nB: It sang.'
    write_set(root, "COPA/COPA", ["A", "B"], {"test": [(asked, "A")]})
    monkeypatch.setenv("TRACE_CL_BENCHMARK", str(root))
    return root


# --------------------------------------------------------------------------------------------------- names and prompts


def test_the_orders_of_cl_benchmark_are_those_of_the_paper():
    printed = {  # arXiv 2310.14152, appendix: names as printed there
        "standard1": "dbpedia amazon yahoo ag",
        "standard2": "dbpedia amazon ag yahoo",
        "standard3": "yahoo amazon ag dbpedia",
        "long4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia ag multirc yahoo",
        "long5": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia ag yelp amazon yahoo",
        "long6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia ag yahoo multirc boolqa wic",
    }
    here = {"ag": "cl_agnews", "sst-2": "cl_sst2"}
    for name, order in printed.items():
        assert expand_orders([name]) == [here.get(task, f"cl_{task}") for task in order.split()]
    assert sorted(data.ORDERS["long5"]) == sorted(data.ORDERS["long6"]) == sorted(data.CL_BENCHMARK)
    with pytest.raises(data.DataError, match="Did you mean standard"):
        expand_orders(["standart1"])


def test_prompts_of_cl_benchmark_equal_those_of_o_loras_code(sets):
    first, second = load_tasks(["cl_agnews", "cl_copa"]).values()
    doc = first.eval_docs[0]
    assert first.fewshot_context(doc, 0) == (
        "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports, Business, Science or Technology \n"
        f"{story('talks {in} braces')}\nAnswer:"
    )
    assert second.fewshot_context(second.eval_docs[0], 0) == (
        'Task:COPA\nDataset:COPA\nWhich sentence is the effect of "It rained."? Choose one between A and B.\n'
        "A: It got wet.\nB: It sang.\nAnswer:"
    ), "no instruction, no options"
    assert [answer for _, answer in training_rows(first)] == ["Business", "Science or Technology", "Sports"]
    assert first.config.generation_kwargs["max_gen_toks"] == 50
    shown = [row["answer"] for row in first.sampler.sample(4)]
    assert sorted(shown) == ["Business", "Science or Technology"], "a training row that is tested demonstrates nothing"


# --------------------------------------------------------------------------------------------------------------- scores


def official(prediction, reference):
    """An independent version of exact_match_score and skip_instructions."""

    def bare(text):
        kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return re.sub(r"\s+", " ", kept).strip()

    return float(bare(("Answer:" + prediction).split("Answer:")[-1].strip()) == bare(reference))


@pytest.mark.parametrize(
    "prediction, reference, score",
    [
        ("World", "World", 1),
        (" world.\n", "World", 1),
        ("science  or technology", "Science or Technology", 1),
        ("Society Culture", "Society & Culture", 1),
        ("World.\nAnswer: Sports", "Sports", 1),
        ("Sports\nAnswer:", "Sports", 0),
        ("very-negative", "very negative", 0),
        ("negative", "very negative", 0),
        ("Sports news", "Sports", 0),
        ("", "World", 0),
        ("", "-", 1),
    ],
)
def test_exact_match_equals_that_of_o_loras_code(prediction, reference, score):
    assert label_accuracy(prediction, reference) == official(prediction, reference) == score


words = st.sampled_from(["World", "very", "negative", "Answer:", " ", "\n", "&", "-", ".", "İ", "\x1c", "“", *TOPICS])


@given(
    st.lists(words | st.sampled_from(string.printable)).map("".join), st.sampled_from([*TOPICS, "very negative", "-"])
)
def test_exact_match_equals_that_of_o_loras_code_for_random_texts(prediction, reference):
    assert label_accuracy(prediction, reference) == official(prediction, reference)


@pytest.mark.parametrize(
    "labels, answer, read",
    [
        (["very negative", "negative", "positive"], "The sentiment is very negative.", "very negative"),
        (["very negative", "negative", "positive"], "negative\n\nTask:SC", "negative"),
        (["very negative", "negative", "positive"], "Not positive.", None),
        (["Good", "Bad"], "The sentiment is bad.", "Bad"),
        (["Good", "Bad"], "B", None),  # nobody offered a letter
        (["True", "False"], "It could be True or False.", None),
        (TOPICS, "It is about science or technology", "Science or Technology"),
    ],
)
def test_the_tolerant_accuracy_reads_the_options_of_the_prompt(labels, answer, read):
    prompt = f"Task:SC\nDataset:x\nWhat? Choose one.\nOption: {', '.join(labels)} \nText: A. b, C. d\nAnswer:"
    letter = read_choice(answer, prompt)
    assert (labels[ord(letter) - ord("A")] if letter else None) == read
    assert [choice_tolerant(answer, label, prompt) for label in labels] == [float(label == read) for label in labels]


def test_a_task_of_cl_benchmark_has_both_accuracies(sets):
    task = load_tasks(["cl_agnews"])["cl_agnews"]
    doc = task.eval_docs[1]
    assert list(task.aggregation()) == ["accuracy", "accuracy_tolerant"]
    assert task.process_results(doc, ["sports!"]) == {"accuracy": 1, "accuracy_tolerant": 1}
    assert task.process_results(doc, ["The topic is Sports."]) == {"accuracy": 0, "accuracy_tolerant": 1}
    assert task.process_results(doc, ["World"]) == {"accuracy": 0, "accuracy_tolerant": 0}


# --------------------------------------------------------------------------------------------------------------- errors


def test_missing_rows_of_cl_benchmark_are_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    for name in ("TRACE_DATA", "TRACE_CL_BENCHMARK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.DataError, match=r"TRACE_CL_BENCHMARK is not set[^$]*cmnfriend/O-LoRA"):
        load_tasks(["cl_yelp"])
    monkeypatch.setenv("TRACE_CL_BENCHMARK", str(tmp_path))
    with pytest.raises(data.DataError, match="none of the folders NLI/MNLI"):
        load_tasks(["cl_yelp"])


@pytest.mark.parametrize(
    "file, content, problem",
    [
        (
            "test",
            [{"sentence": "s", "label": "World"}, {"sentence": " ", "label": "World"}],
            "row 1: 'sentence' is ' '",
        ),
        ("train", [{"prompt": "p", "answer": "World"}], "train.json, row 0: it lacks 'sentence'"),
        ("train", [{"sentence": "s", "label": 1}], "row 0: 'label' is 1"),
        ("dev", {"Definition": [], "Instances": []}, "has dict, not a list"),
        ("labels", ["World", ""], "must be a list of texts"),
        ("labels", None, "labels.json cannot be read"),
        ("test", None, "test.json cannot be read"),
    ],
)
def test_a_bad_file_of_cl_benchmark_is_named_with_the_row(sets, file, content, problem):
    path = sets / "TC/agnews" / f"{file}.json"
    path.unlink() if content is None else write_json(path, content)
    with pytest.raises(data.DataError, match=re.escape(problem)):
        load_tasks(["cl_agnews"])


def test_the_folder_may_be_o_loras_repository_and_evaluation_needs_only_test_rows(sets, monkeypatch):
    monkeypatch.setenv("TRACE_CL_BENCHMARK", str(sets.parent))
    task = load_tasks(["cl_copa"])["cl_copa"]
    assert task.eval_docs[0]["answer"] == "A"
    with pytest.raises(data.DataError, match="no training split"):
        training_rows(task)


# ---------------------------------------------------------------------------------------------------------------- audit


def test_the_audit_names_equal_dev_and_test_sets_and_leaks(sets, tiny_model, capsys):
    report = audit(sets)
    assert report["equal"] == ["cl_agnews"]
    assert "Eval equals test, so do not select models or settings on it: cl_agnews." in as_text(report)
    assert report["leaked"]["cl_agnews"]["exact"] == [1] and report["leaked"]["cl_agnews"]["near"] == []
    facts = report["tasks"]["cl_agnews"]["splits"]["test"]
    assert facts["not_offered"] == [] and not report["unreadable"]
    rows = json.loads((sets / "TC/agnews/test.json").read_text())
    write_json(sets / "TC/agnews/test.json", [*rows, {"sentence": "unsure", "label": "-"}])
    report = audit(sets)
    assert report["equal"] == [] and report["tasks"]["cl_agnews"]["splits"]["test"]["not_offered"] == [2]
    main(["data", "audit", str(sets), "--tokenizer", str(tiny_model)])
    assert "answers that are not one of the options: test 1" in capsys.readouterr().out


def test_data_shows_the_sets_of_cl_benchmark(sets, capsys):
    (sets / "TC/yahoo").mkdir()
    with pytest.raises(SystemExit, match=r"\Aerror: \S+/TC/yahoo/labels.json cannot be read[^\n]*\Z"):
        main(["data", str(sets)])
    shown = capsys.readouterr().out
    assert re.search(r"cl_agnews +3 +2 +2", shown) and re.search(r"cl_copa +- +- +1", shown)
    assert f"export TRACE_CL_BENCHMARK={sets}\n  --tasks cl_copa cl_agnews" in shown
    assert "Missing: cl_mnli, cl_cb, " in shown


# ---------------------------------------------------------------------------------------------------- demo data, a run


@pytest.mark.parametrize("variable", ["TRACE_DATA", "TRACE_CL_BENCHMARK"])
def test_demo_data_has_rows_for_every_set_of_cl_benchmark(variable, monkeypatch):
    for name in ("TRACE_DATA", "TRACE_CL_BENCHMARK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "demo")
    for name, task in load_tasks(list(data.CL_BENCHMARK)).items():
        docs, trained = list(task.eval_docs), training_rows(task)
        assert len(trained) == 64 and len(docs) == 24 and not {p for p, _ in trained} & {d["prompt"] for d in docs}
        assert all(task.process_results(d, [d["answer"]]) == {"accuracy": 1, "accuracy_tolerant": 1} for d in docs), (
            name
        )
        assert not any("{" in d["prompt"] for d in docs)
    assert data.is_demo(data.find_cl_benchmark())


def test_demo_data_does_not_replace_real_sets(sets):
    with pytest.raises(data.DataError, match="not demo data"):
        write_demo(sets.parent)


def test_a_run_records_the_folder_of_its_rows_and_refuses_different_rows(tmp_path, tiny_model, monkeypatch):
    for name in ("TRACE_DATA", "TRACE_CL_BENCHMARK"):
        monkeypatch.delenv(name, raising=False)
    write_demo(tmp_path / "demo")
    root = tmp_path / "demo" / "CL_Benchmark"
    monkeypatch.setenv("TRACE_CL_BENCHMARK", str(root))
    options = {**quick_options(tiny_model, tmp_path / "run"), "tasks": ["standard1"], "max_steps": 1}
    del options["data"]
    run = train(options)
    assert run.tasks == data.ORDERS["standard1"]
    assert run.manifest["data"]["demo"] and run.manifest["data"]["cl_benchmark"] == str(root)
    monkeypatch.delenv("TRACE_CL_BENCHMARK")
    main(["evaluate", str(run.path)])
    results = Results(Run.open(run.path))
    assert set(results.headlines.values()) == {"accuracy"}
    write_report(Run.open(run.path))
    report = (run.path / "report.md").read_text()
    assert "cl_dbpedia" in report and "later papers print" not in report, "those are of TRACE"
    assert name_of(run) is None and protocol(results)["data"] == "demo"
    write_json(tmp_path / "audit.json", audit(root))
    assert set(without_leaked(run, tmp_path / "audit.json").left_out) == set(run.tasks)
    file = root / "TC/yahoo/test.json"
    write_json(file, json.loads(file.read_text())[:-1])
    with pytest.raises(SystemExit, match="The rows of cl_yahoo are not those"):
        main(["evaluate", str(run.path), "--cells", "all"])


def test_demo_and_real_rows_cannot_be_in_one_run(sets, tmp_path, tiny_model):
    options = {**quick_options(tiny_model, tmp_path / "run"), "tasks": ["trace_fomc", "cl_agnews"]}
    with pytest.raises(data.DataError, match="only one of them is demo data"):
        train(options)
