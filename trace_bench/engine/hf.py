"""The engine of transformers' generate: adapters stay unmerged, as they were trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from trace_bench.engine import models
from trace_bench.engine.ends import end_ids
from trace_bench.engine.padding import masks_padding, quiet_router
from trace_bench.engine.sharing import inner
from trace_bench.engine.swap import Example, Forced, SwapLM, TokenLogprobs, Wanted, to_end
from trace_tasks.tokens import text_of

log = logging.getLogger(__name__)


class SwapHF(SwapLM, HFLM):  # type: ignore[misc]
    """lm-eval's HFLM, whose model is loaded again for each stage."""

    def _create_model(self, pretrained: str, revision: str, dtype: Any, trust_remote_code: bool, **_: Any) -> None:
        """Loads the base model as checkpoints are loaded: lm-eval's way would leave missing tensors random."""
        options = {"dtype": get_dtype(dtype), "trust_remote_code": trust_remote_code}
        self._model: Any = models.load_model(pretrained, None, revision, **options).to(self.device)

    def load(self, checkpoint: Path | None, below: Sequence[Path] = ()) -> None:
        """See `SwapLM`."""
        self.soft_prompt = models.soft_prompt(checkpoint)
        dtype, device = self._model.dtype, self._model.device
        self._model = None  # one model at a time in memory
        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        model = models.load_model(self.base, checkpoint, self.revision, below=below, **options)
        self._model = model.to(device).eval()
        self.ends = end_ids(self.tokenizer, self.base, self.revision, checkpoint)
        self.decode_greedily()
        kind = "soft prompt" if self.soft_prompt is not None else "adapter"
        self.served = {"weights": "base" if checkpoint is None else kind if models.is_adapter(checkpoint) else "model"}

    def decode_greedily(self) -> None:
        """Drops all generation settings of the checkpoint but the special tokens."""
        self._inner.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=sorted(self.ends), pad_token_id=self.pad
        )

    @property
    def _inner(self) -> Any:
        """The model that generates: the one within PEFT's."""
        return self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model

    @property
    def pad(self) -> int:
        """The padding token. Any token will do: it is masked before a prompt, and cut off behind an answer."""
        known = range(inner(self._model.get_input_embeddings()).weight.shape[0])  # a tokenizer may have more tokens
        named = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in named if token in known), 0)

    def _answers(self, wanted: list[Wanted]) -> list[list[int]]:
        answers: dict[int, list[int]] = {}

        def settings(i: int) -> str:
            want = wanted[i]
            width = len(want.ids) if apart or len(want.ids) + want.most > self._short else 0
            return repr((want.most, want.stops, sorted(want.ends), want.sampling, want.rated, width))

        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        apart = size > 1 and len({len(want.ids) for want in wanted}) > 1 and not self._masks_padding
        order = sorted(range(len(wanted)), key=lambda i: (settings(i), -len(wanted[i].ids), wanted[i].ids))
        for _, group in groupby(order, key=settings):
            same = list(group)
            if (seed := dict(wanted[same[0]].sampling).get("seed")) is not None:
                torch.manual_seed(seed)
            for start in range(0, len(same), size):
                batch = same[start : start + size]
                answers |= zip(batch, self._generated([wanted[i] for i in batch]), strict=True)
        return [answers[i] for i in range(len(wanted))]

    @property
    def _short(self) -> float:
        """The length up to which a text's positions do not depend on the batch: longrope looks at the longest row."""
        rope = getattr(self._model.config.get_text_config(), "rope_parameters", None) or {}
        return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf

    @cached_property
    def _masks_padding(self) -> bool:
        ids = self.tokenizer("What stands in front of this?", add_special_tokens=False).input_ids[:8]
        with self._autocast():
            masks = masks_padding(self._model, self.pad, ids)
        if not masks:
            log.warning(
                "%s ignores the attention mask, so a batch holds only prompts of the same length.",
                self.base,
            )
        return masks

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.mixed_precision_dtype
        return torch.autocast(self.device.type, precision) if precision else nullcontext()

    def _generated(self, batch: list[Wanted]) -> list[list[int]]:
        """The answers to a batch of prompts that share all settings."""
        want, width = batch[0], max(len(w.ids) for w in batch)
        ids = torch.tensor([[self.pad] * (width - len(w.ids)) + list(w.ids) for w in batch], device=self.device)
        mask = torch.tensor([[0] * (width - len(w.ids)) + [1] * len(w.ids) for w in batch], device=self.device)
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        start = width
        if self.soft_prompt is not None:
            embeds = self._behind_prompt(ids)
            mask = torch.cat([mask.new_ones(len(mask), len(self.soft_prompt)), mask], dim=1)
            # As in training, the soft prompt is next to the text: padding goes before both.
            order = mask.argsort(dim=1, stable=True)
            kwargs = {
                "inputs_embeds": embeds.gather(1, order[:, :, None].expand_as(embeds)),
                "attention_mask": mask.gather(1, order),
            }
            start = 0  # generate then returns the new tokens alone
        if want.stops and not self.think_end_token:
            kwargs["stopping_criteria"] = StoppingCriteriaList([_Stops(self.tokenizer, want.stops, start)])
        kwargs |= {name: value for name, value in want.sampling if name != "seed"}
        kwargs |= quiet_router(self._model)
        rated = _Rated()
        if want.rated:
            kwargs["logits_processor"] = LogitsProcessorList([rated])
        began = time.perf_counter()
        with torch.no_grad(), self._autocast():
            outputs = self._model.generate(
                **kwargs,
                max_new_tokens=want.most,
                do_sample="temperature" in kwargs,
                eos_token_id=sorted(want.ends),
                pad_token_id=self.pad,
                use_cache=True,
            )
        self.work.seconds += time.perf_counter() - began
        self.work.prompt_tokens += int(mask.sum())
        answers = [to_end(row, want.ends) for row in outputs[:, start:].tolist()]
        if want.rated:
            lengths = [len(answer) for answer in answers]
            self.ratings |= zip(batch, rated.means(outputs[:, -1:], lengths), strict=True)
        self.work.generated_tokens += sum(map(len, answers))
        return answers

    def likelihoods_of(self, examples: list[Example]) -> list[float]:
        """See `SwapLM`."""
        found: dict[int, float] = {}
        for i, logits in self._read(examples):
            answer = torch.tensor(examples[i][1], device=logits.device)
            found[i] = float(logits.log_softmax(-1).gather(1, answer[:, None]).sum())
        return [found[i] for i in range(len(examples))]

    def token_logprobs(self, forced: Sequence[Forced]) -> list[TokenLogprobs]:
        """See `SwapLM`."""
        read = self._read([(one.prompt, one.answer) for one in forced])
        found = {i: _pick_logprobs(logits, forced[i].asked) for i, logits in read}
        return [found[i] for i in range(len(forced))]

    def _read(self, examples: list[Example]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the number of each example and the float32 logits at its answer's positions; one pass a batch."""
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        # Prompts of similar length together, so that the head computes few positions beyond the answers.
        long = [len(prompt) + len(answer) - 1 > self._short for prompt, answer in examples]
        order = sorted(range(len(examples)), key=lambda i: (long[i], -len(examples[i][0]), -len(examples[i][1])))
        parts = [list(part) for _, part in groupby(order, key=long.__getitem__)]
        for batch in (part[start : start + size] for part in parts for start in range(0, len(part), size)):
            rows = [[*examples[i][0], *examples[i][1]][:-1] for i in batch]
            width = max(map(len, rows))
            keep = width + 1 - min(len(examples[i][0]) for i in batch)
            # A causal model never reads the padding behind a row.
            ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device)
            plain = self.soft_prompt is None
            inputs: dict[str, Any] = {"input_ids": ids} if plain else {"inputs_embeds": self._behind_prompt(ids)}
            if self._model._supports_logits_to_keep():
                inputs["logits_to_keep"] = keep
            began = time.perf_counter()
            with torch.no_grad(), self._autocast():
                logits = self._model(**inputs).logits[:, -keep:]
            self.work.seconds += time.perf_counter() - began
            self.work.prompt_tokens += sum(map(len, rows))
            for i, of_row in zip(batch, logits, strict=True):
                first = len(examples[i][0]) - 1 - (width - keep)
                yield i, of_row[first : first + len(examples[i][1])].float()

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        began = time.perf_counter()
        if self.soft_prompt is None:
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            with torch.no_grad():
                logits = self._model(inputs_embeds=self._behind_prompt(inps)).logits[:, len(self.soft_prompt) :]
        self.work.seconds += time.perf_counter() - began
        self.work.prompt_tokens += inps.numel()
        return logits

    def _behind_prompt(self, ids: Any) -> Any:
        embeds = self._model.get_input_embeddings()(ids)
        return torch.cat([self.soft_prompt.to(embeds).expand(len(ids), -1, -1), embeds], dim=1)


def _pick_logprobs(logits: Any, asked: tuple[tuple[int, ...], ...] | int) -> TokenLogprobs:
    """The log-probabilities of the tokens asked for, from logits of shape (tokens of the answer, vocabulary)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    if isinstance(asked, int):
        tokens = logprobs.topk(min(asked, logprobs.shape[-1]), dim=-1).indices.tolist()
    else:
        tokens = [list(ids) for ids in asked]
    return [dict(zip(ids, row[ids].tolist(), strict=True)) for ids, row in zip(tokens, logprobs, strict=True)]


class _Rated(LogitsProcessor):
    """Keeps the log-probability of each generated token, before temperature and other settings change it."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.found: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._see(input_ids[:, -1:])  # the token that was drawn from the former scores
        self.last = scores.float().log_softmax(dim=-1)
        return scores

    def _see(self, tokens: torch.Tensor) -> None:
        if self.last is not None:
            self.found.append(self.last.gather(1, tokens))

    def means(self, tokens: torch.Tensor, lengths: Sequence[int]) -> list[float]:
        """The mean over the first `lengths[i]` tokens of each row i; `tokens` are the last generated ones."""
        self._see(tokens)
        logprobs = torch.cat(self.found, dim=1).tolist()
        return [sum(row[:n]) / n for row, n in zip(logprobs, lengths, strict=True)]


class _Stops(StoppingCriteria):
    """Ends a row once its text holds one of the stops."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        # A character takes up to four tokens (bytes), and some tokens have no text.
        self.tail = 4 * max(map(len, stops)) + 16

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = [text_of(self.tokenizer, row[-self.tail :]) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor([any(s in text for s in self.stops) for text in texts], device=input_ids.device)
