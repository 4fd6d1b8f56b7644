"""Finds out why ways of evaluating the same checkpoints give different answers, by switching one thing at a time.

The first way is the model as it was trained: adapter unmerged, transformers, one row at a time, our decoding. Each
further way changes one thing, and is compared with the way that it starts from:

- merged: the adapter is merged into the weights, either without a bias (ours) or rounded to the nearest value.
- batch: 16 rows at a time, padded.
- decoding: lm-eval's own generate_until: its prompts, stops and text.
- kernels: vLLM on the merged weights, one row at a time.
- vLLM's batch: all rows at once, as `trace-bench evaluate` does.

bf16 rounds sums, so the order of summation decides between two tokens that are nearly tied. In float32 all ways should
agree.

    make bench PART=differences
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import ROOT, WORK, save
from bench.evaluation import ANSWER, CONTEXT, PROMPT, score, trained
from trace_bench.report import Table, markdown
from trace_bench.tasks import load_tasks

ROWS = 3
STAGES = (5, 8)
#: The most tokens of an answer.
LONGEST = 32
#: Way -> the way that it starts from.
WAYS = {
    "as trained": None,
    "merged, without a bias": "as trained",
    "merged, to the nearest": "as trained",
    "batch of 16": "as trained",
    "lm-eval's decoding": "as trained",
    "vLLM's kernels": "merged, without a bias",
    "vLLM's batch": "vLLM's kernels",
}


def main() -> None:
    """Runs every way in bf16 and float32, each in a process of its own, and saves the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", nargs=3, metavar=("WAY", "DTYPE", "OUT"))
    one = parser.parse_args().way
    if one:
        Path(one[2]).write_text(json.dumps(answers(one[0], one[1])), encoding="utf-8")
        return
    run = trained()
    result: dict[str, Any] = {"stages": STAGES, "rows_per_cell": ROWS, "ways": {}}
    for dtype in ("bfloat16", "float32"):
        found: dict[str, Any] = {}
        for number, (way, before) in enumerate(WAYS.items()):
            out = WORK / "differences" / f"{dtype}-{number}.json"
            out.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [sys.executable, "-m", "bench.differences", "--way", way, dtype, str(out)], cwd=ROOT, check=True
            )
            found[way] = json.loads(out.read_text())
            result["answers"] = len(found[way]["texts"])
            pairs = zip(found[way]["texts"], found[before]["texts"], strict=True) if before else ()
            result["ways"].setdefault(way, {"changes": before})[dtype] = {
                "differ": sum(a != b for a, b in pairs),
                "mean_score": round(100 * found[way]["score"], 2),
            }
            print(way, dtype, result["ways"][way][dtype], flush=True)
    save("differences", result)
    print(f"{result['answers']} answers of {run.name}")
    head = ["switched", "from", "bf16: differ", "mean score", "float32: differ", "mean score"]
    print(
        markdown(
            Table(
                head,
                [
                    [way, w["changes"] or "", *(v for d in ("bfloat16", "float32") for v in w[d].values())]
                    for way, w in result["ways"].items()
                ],
            )
        )
    )


def answers(way: str, dtype: str) -> dict[str, Any]:
    """The answers of one way in all cells, and the mean of the cells' scores."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    from trace_bench.engine import models, open_engine
    from trace_bench.run import Run

    run = Run.open(WORK / "evaluation" / "run")
    base = models.resolve_model(run.manifest["model"]["name"])
    tasks = load_tasks(run.tasks)
    vllm = way.startswith("vLLM")
    args: dict[str, Any] = {"dtype": dtype, "max_model_len": CONTEXT, "batch_size": 16 if way == "batch of 16" else 1}
    if vllm:
        args = {"dtype": dtype, "max_model_len": CONTEXT}
        if way == "vLLM's kernels":
            args |= {"max_num_seqs": 1, "enable_prefix_caching": False, "enable_chunked_prefill": False}
    lm: Any = open_engine("vllm" if vllm else "hf", base, max_prompt_length=PROMPT, engine_args=args)
    texts, scores = [], []
    for index in STAGES:
        stage = run.stages[index]
        lm.load(stage.checkpoint)
        if way.startswith("merged"):
            model = models.load_model(base, None, dtype=getattr(torch, dtype))
            nearest = way.endswith("nearest")
            merged = (
                PeftModel.from_pretrained(model, stage.checkpoint).merge_and_unload()
                if nearest
                else models.merge(model, stage.checkpoint)[0]
            )
            lm._model = merged.to(lm.device).eval()
            lm.decode_greedily()
        for name in run.tasks[:index]:
            task, docs = tasks[name], list(tasks[name].test_docs())[:ROWS]
            limit = {"max_gen_toks": min(task.config.generation_kwargs["max_gen_toks"], LONGEST)}
            requests = [
                Instance("generate_until", doc, (task.doc_to_text(doc), {**task.config.generation_kwargs, **limit}), i)
                for i, doc in enumerate(docs)
            ]
            found = _lm_eval(HFLM, lm, requests) if way == "lm-eval's decoding" else lm.generate_until(requests)
            texts += found
            scores.append(score(task, docs, found))
    return {"texts": texts, "score": sum(scores) / len(scores)}


def _lm_eval(theirs: Any, lm: Any, requests: Any) -> list[str]:
    """The answers that lm-eval's own class generates with the loaded model."""
    plain = theirs(
        pretrained=lm._model.get_base_model(), tokenizer=lm.tokenizer, batch_size=1, max_length=PROMPT + ANSWER
    )
    return plain.generate_until(requests, disable_tqdm=True)


if __name__ == "__main__":
    main()
