"""Evaluates as the official code does: loads the model, then runs transformers' generate in padded batches per task.

    python -m bench.official BASE ADAPTER BATCH OUT.json ROWS PROMPT_TOKENS ANSWER_TOKENS TASK...

It evaluates one stage. As in the official code, prompts are padded and cut on the left, the adapter is merged, batches
have the order of the file, and all tasks have the same length limit. Decoding is greedy, not sampled at temperature
0.1, so that answers can be compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trace_bench.tasks import load_tasks


def main() -> None:
    """Generates the answers and writes task -> answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter, batch, out, rows, prompt_tokens, answer_tokens, *names = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left", truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.eval()
    answers = {}
    for name, task in load_tasks(names).items():
        prompts = [task.doc_to_text(doc) for doc in list(task.test_docs())[: int(rows)]]
        limit = min(int(answer_tokens), task.config.generation_kwargs["max_gen_toks"])
        texts: list[str] = []
        for i in range(0, len(prompts), int(batch)):
            inputs = tokenizer(
                prompts[i : i + int(batch)],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=int(prompt_tokens),
                add_special_tokens=False,
            )
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
            texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[name] = texts
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
