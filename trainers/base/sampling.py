"""Samples answers from the model in training with its present weights, for methods that train on them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trace_bench.engine.padding import masks_padding
from trace_bench.engine.swap import to_end


def sampled(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    most: int,
    ends: frozenset[int],
    precision: AbstractContextManager[None],
) -> list[list[int]]:
    """Samples an answer to each prompt at temperature 1, without dropout.

    The model's settings and the global random state are the same afterwards. The answer to a prompt depends only on its
    seed and the weights, not on the other prompts of the batch: a model that ignores the attention mask gets prompts of
    one length at a time.

    Args:
        model: A model of transformers, or PEFT's LoRA model around one; without DDP's wrapper.
        prompts: Token ids.
        seeds: One for each prompt.
        most: The most tokens of an answer.
        ends: The tokens that end an answer.
        precision: The autocast context of the training.

    Returns:
        The token ids of each answer, including the token that ended it.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model  # its layers have the adapter
    settings, training, pad = inner.generation_config, model.training, min(ends)  # any token: it is masked
    # A model's own generation settings, such as penalties, would change the answers.
    inner.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    answers: dict[int, list[int]] = {}
    model.eval()
    try:
        with torch.no_grad(), precision:
            lengths = set(map(len, prompts))
            together = len(lengths) == 1 or masks_padding(inner, pad, max(prompts, key=len)[:8])
            for wanted in [lengths] if together else [{length} for length in lengths]:
                rows = [i for i, prompt in enumerate(prompts) if len(prompt) in wanted]
                width = max(wanted)
                ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in rows]
                mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows]
                draw = Drawn([torch.Generator(model.device).manual_seed(seeds[i]) for i in rows])
                outputs = inner.generate(
                    input_ids=torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    max_new_tokens=most,
                    do_sample=False,
                    logits_processor=LogitsProcessorList([draw]),
                )
                answers |= zip(rows, (to_end(row, ends) for row in outputs[:, width:].tolist()), strict=True)
    finally:
        inner.generation_config = settings
        model.train(training)
    return [answers[i] for i in range(len(prompts))]


class Drawn(LogitsProcessor):
    """Adds Gumbel noise to logits, so that the largest sum is a draw from their softmax. Each row has a generator."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See LogitsProcessor."""
        rows = zip(scores, self.generators, strict=True)
        return scores - torch.stack([torch.empty_like(row).exponential_(generator=g).log() for row, g in rows])
