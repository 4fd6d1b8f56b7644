"""How far each stage is from the base model: KL(base || stage) along the base model's own answers.

The base model answers the first test prompts of each stage's task, and neutral questions that belong to no task. Its
answers and its likeliest tokens at each position are kept in its folder. Each stage is then asked for the probabilities
of the same tokens at the same positions. `measures.distance.forward_kl` computes the divergence from them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_bench import records
from trace_bench.engine.swap import Forced
from trace_bench.manifest import differences
from trace_bench.measures.distance import forward_kl
from trace_bench.records import NEUTRAL, distance_answers, distance_file
from trace_bench.run import Run, RunError, Stage, read_jsonl
from trace_tasks.data.files import digest, fingerprint, write_json, write_jsonl
from trace_tasks.tokens import prompt_ids, questions

QUESTIONS = Path(__file__).parent / "neutral.txt"
#: Prompts of a task, tokens of an answer, and likeliest tokens at each position. An answer has 8 x 16 = 128 tokens to
#: ask for, the most that vLLM returns for one request.
PROMPTS, TOKENS, LIKELIEST = 32, 8, 16


def sets_of(run: Run, stage: Stage) -> list[str]:
    """The sets of prompts of a stage: its own task and `NEUTRAL`; the base model has all sets."""
    own = [s.task for s in run.stages if s.task is not None and stage.index in (0, s.index)]
    return [*own, NEUTRAL]


def lacks_base(run: Run, extra: Mapping[str, Any] | None) -> bool:
    """Whether distances are asked for, but the base model's answers are missing."""
    asked, base = {**run.manifest["config"], **(extra or {})}.get("distance"), run.stages[0]
    return bool(asked) and not all(distance_file(base, name).exists() for name in sets_of(run, base))


def settings_of(chat: Mapping[str, Any], matrix: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that distances depend on; `chat` are those of the neutral questions."""
    return {
        **chat,
        **{key: matrix[key] for key in ("backend", "engine", "max_prompt_length", "chat_template")},
        "neutral_chat_template": chat["chat_template"],
        "neutral": digest(QUESTIONS.read_text(encoding="utf-8")),
        **{"prompts": PROMPTS, "tokens": TOKENS, "likeliest": LIKELIEST},
    }


def missing(run: Run, stage: Stage, settings: Mapping[str, Any]) -> list[str]:
    """The sets of prompts whose distance is missing, or was measured from other weights or on other answers.

    Empty if `settings` is empty, since then no distance is asked for.

    Raises:
        RunError: if one was measured with other settings.
    """
    todo = []
    for name in sets_of(run, stage) if settings else ():
        there, base = records.read_distance(stage, name), records.read_distance(run.stages[0], name)
        if there is not None and (lines := differences(there["settings"], settings)):
            raise RunError(
                f"{distance_file(stage, name)} was made with different settings (in the file -> asked for):\n"
                + "\n".join(lines)
                + f"\nUse the settings of the file, or delete {run.path}/stages/*/distance."
            )
        if not records.is_distance_valid(there, base, stage.fingerprint()):
            todo.append(name)
    return todo


def measure(plan: Any, lm: Any, stage: Stage, name: str, made: Mapping[str, Any]) -> None:
    """Measures the distance of a stage on a set of prompts. The engine holds the stage's weights."""
    began = time.perf_counter()
    numbers = _against_base(plan.run.stages[0], lm, name) if stage.index else _ask_base(plan, lm, stage, name)
    record = {"stage": stage.name, "set": name, **numbers, "settings": plan.distance, "served": lm.served, **made}
    write_json(distance_file(stage, name), record | {"seconds": round(time.perf_counter() - began, 3)})


def _ask_base(plan: Any, lm: Any, stage: Stage, name: str) -> dict[str, Any]:
    """Generates and writes the base model's answers with its likeliest tokens at each position."""
    asked = _prompts(plan, lm, stage, name)
    in_chat = plan.distance["neutral_chat_template" if name == NEUTRAL else "chat_template"]
    answers = lm.first_tokens(list(asked.values()), TOKENS, in_chat)
    told = lm.token_logprobs(
        [Forced(tuple(p), tuple(a), LIKELIEST) for p, a in zip(asked.values(), answers, strict=True)]
    )
    rows, unseen = [], []
    for (doc, prompt), answer, expected in zip(asked.items(), answers, told, strict=True):
        best = [sorted(here.items(), key=lambda item: (-item[1], item[0]))[:LIKELIEST] for here in expected]
        logprobs = [[round(value, 6) for _, value in here] for here in best]
        tokens = [[token for token, _ in here] for here in best]
        rows.append({"doc_id": doc, "prompt": prompt, "answer": answer, "tokens": tokens, "logprobs": logprobs})
        unseen.append([_rounded(forward_kl(here, here)[1]) for here in logprobs])
    write_jsonl(distance_answers(stage, name), rows)
    return {"answers": fingerprint(distance_answers(stage, name)), "n": len(rows), "unseen": unseen}


def _against_base(base: Stage, lm: Any, name: str) -> dict[str, Any]:
    """The divergences of the stage from the base model, along the base model's answers."""
    file = distance_answers(base, name)
    recorded, rows = records.read_distance(base, name), read_jsonl(file)
    if recorded is None or recorded["answers"] != fingerprint(file):
        raise RunError(f"{file} has changed since it was written. Delete {file.parent} and evaluate again.")
    forced = [Forced(tuple(r["prompt"]), tuple(r["answer"]), tuple(map(tuple, r["tokens"]))) for r in rows]
    if (longest := max((len(f.prompt) + len(f.answer) for f in forced), default=0)) > lm.max_length:
        raise RunError(
            f"{file} has a prompt and answer of {longest} tokens, but the engine's context has {lm.max_length} at this "
            "stage. In --engine-args, raise max_model_len (vllm) or max_length (hf)."
        )
    kl, unseen = [], []
    for row, expected in zip(rows, lm.token_logprobs(forced), strict=True):
        stage = [[here[token] for token in tokens] for tokens, here in zip(row["tokens"], expected, strict=True)]
        bounds = [forward_kl(p, q) for p, q in zip(row["logprobs"], stage, strict=True)]
        kl.append([_rounded(bound) for bound, _ in bounds])
        unseen.append([_rounded(rest) for _, rest in bounds])
    return {"answers": recorded["answers"], "n": len(rows), "kl": kl, "unseen": unseen}


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def _prompts(plan: Any, lm: Any, base: Stage, name: str) -> dict[Any, list[int]]:
    """Number of a row -> the token ids of its prompt, as it was asked."""
    limit = lm.max_length - TOKENS
    if name == NEUTRAL:
        texts = QUESTIONS.read_text(encoding="utf-8").splitlines()
        asked = questions(texts, lm.chat if plan.distance["neutral_chat_template"] else None)
        return dict(enumerate(prompt_ids(lm.tokenizer, asked, limit, lm.chat)))
    limit = min(limit, plan.matrix["max_prompt_length"] or limit)
    rows = read_jsonl(base.samples_file(name))
    records.check_samples(base, name, [row["doc_id"] for row in rows])
    texts = [row["prompt"] for row in rows]
    if plan.matrix["chat_template"]:  # rendered already; one that was cut cannot be cut in the same way again
        ids = lm.tokenizer(texts, add_special_tokens=False).input_ids
        pairs = [(row["doc_id"], one) for row, one in zip(rows, ids, strict=True) if len(one) <= limit]
        return dict(pairs[:PROMPTS])
    ids = prompt_ids(lm.tokenizer, texts[:PROMPTS], limit)
    return dict(zip([row["doc_id"] for row in rows[:PROMPTS]], ids, strict=True))
