"""The vLLM engine.

A full model is loaded over the weights in the engine. An adapter answers unmerged (vLLM's LoRA requests) on a GPU,
where the adapters of all stages share a batch; on a CPU that path is an order of magnitude slower, so the adapter is
merged. A checkpoint whose config differs from the base model's (such as rope_theta, or an untied head) gets an engine
of its own, and so do all checkpoints if the first swap shows that this engine cannot swap.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.vllm_causallms import VLLM
from tqdm import tqdm
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from trace_bench.engine import models
from trace_bench.engine.checkpoints import config_differences
from trace_bench.engine.ends import end_ids
from trace_bench.engine.gpu import has_gpu
from trace_bench.engine.merging import Merging
from trace_bench.engine.outputs import matching_logprobs, same_answers
from trace_bench.engine.start import bound_context, lora_args, starting_vllm
from trace_bench.engine.swap import EngineError, Example, Forced, SwapLM, TokenLogprobs, Wanted
from trace_tasks.data.files import digest
from trace_tasks.errors import brief

log = logging.getLogger(__name__)

#: The logits processor that makes a request generate known tokens (engine argument logits_processors).
FORCING = "trace_bench.engine.forcing:Forcing"


class SwapVLLM(SwapLM, VLLM):  # type: ignore[misc]
    """lm-eval's VLLM with one engine, into which the weights of each stage are put.

    Args:
        adapters: The adapters that vLLM can serve unmerged.
        **kwargs: The arguments of lm-eval's class.
    """

    def __init__(self, adapters: Sequence[Path] = (), **kwargs: Any) -> None:
        self.adapters: dict[Path, LoRARequest] = {}
        self.adapter: LoRARequest | None = None
        self._later: list[LoRARequest] = []
        self._requests = 0
        self._known: dict[tuple[LoRARequest | None, Wanted], list[int]] = {}
        #: The log-probabilities of a reference answer's first tokens, as far as the generated answer agrees with it.
        self._told: dict[tuple[LoRARequest | None, Example], list[float]] = {}
        #: Whether weights can be swapped; None = not known before the first swap.
        self.swaps: bool | None = None
        super().__init__(worker_extension_cls="trace_bench.engine.worker.SwapWorker", **kwargs)
        # The model that the engine was started with, and the model whose weights it holds now.
        self.started_on = self.holds = self.model_args["model"]
        # Some models start but lack a kernel for generation: fail now.
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        self.model.generate([{"prompt_token_ids": [0, 0]}], params, use_tqdm=False)
        self._serve(adapters)
        if adapters and not self.adapters:
            self._end()
            raise EngineError(f"vLLM takes no LoRA requests for {adapters[0]} and the other adapters.")

    # ----------------------------------------------------------------------------------------------------- weights

    @cached_property
    def _merging(self) -> Merging:
        dtype = str(self.model.llm_engine.model_config.dtype).removeprefix("torch.")
        return Merging(self.base, self.revision, self.trust_remote_code, dtype)

    def load(self, checkpoint: Path | None, below: Sequence[Path] = ()) -> None:
        """See `SwapLM`."""
        self.soft_prompt = models.soft_prompt(checkpoint)
        if self.soft_prompt is not None and not self.model_args.get("enable_prompt_embeds"):
            raise EngineError(
                f"{checkpoint} is a soft prompt, and vLLM was started without the engine argument "
                "enable_prompt_embeds: true. Add it to --engine-args, or use --backend hf."
            )
        former = self.adapter
        self.adapter = self.adapters.get(checkpoint) if checkpoint is not None and not below else None
        self._later = []
        self._known = {key: ids for key, ids in self._known.items() if key[0] != former}
        self._told = {key: nats for key, nats in self._told.items() if key[0] != former}
        with self._full_model(checkpoint, below) as (folder, served):
            if folder != self.holds:
                self._swap_or_restart(folder, served)
            self.served = served
        self.ends = end_ids(self.tokenizer, self.base, self.revision, checkpoint)
        self._reset_prefix_cache()

    def _swap_or_restart(self, folder: str, served: dict[str, Any]) -> None:
        """Puts the weights of a full model into the engine: by a swap if that is safe, else by a restart."""
        base = self.base, Path(folder), self.revision, self.trust_remote_code
        other = config_differences(*base) if folder != self.base else []
        if other:
            served["own_engine"] = f"its config differs from the base model's: {', '.join(other)}"
        elif self.swaps is not False and not self._copies_weights():
            if self.started_on != self.base:
                self._restart(self.base)
                if folder == self.base:
                    return
            try:
                if self._swap_tested(folder):
                    return
                why = "gives different answers after the same weights are swapped in again, so swaps are not safe"
            except Exception as e:  # of any kind: with LoRA, vLLM looks for other names in some models
                why = f"cannot swap weights ({brief(e)})"
            self.swaps = False
            log.warning(
                "vLLM %s with this model here. The engine starts again for each stage, which takes longer.", why
            )
        if not other:
            served["own_engine"] = "its weights cannot be swapped in this engine"
        self._restart(folder)

    def _swap_tested(self, folder: str) -> bool:
        """Swaps weights in, and tests the first swap: with its original weights the engine must answer as before."""
        before = self._probe() if self.swaps is None and self.holds == self.base != folder else None
        self._swap(folder)
        if before is None:
            return True
        self._swap(self.base)
        self.swaps = same_answers(self._probe(), before)
        if self.swaps:
            self._swap(folder)
        return self.swaps

    def _copies_weights(self) -> bool:
        """Whether the engine computes with copies of weights that no swap reaches: experts and sinks, without a GPU.

        The test of the first swap may miss this: it swaps in the same weights that the copies hold.
        """
        return not has_gpu() and self.model.llm_engine.model_config.get_num_experts() > 0

    def _swap(self, folder: str) -> None:
        self.model.collective_rpc("swap_weights", args=(folder,))
        self.holds = folder
        self._reset_prefix_cache()

    def _reset_prefix_cache(self) -> None:
        """Empties the prefix cache: its keys and values come from the former weights or soft prompt."""
        if not self.model.reset_prefix_cache(reset_connector=True):
            raise EngineError(f"vLLM keeps cached results from before {self.holds} was loaded. Run the command again.")

    def _end(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.model.llm_engine.engine_core.shutdown()
        self.model: Any = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _restart(self, folder: str) -> None:
        """Stops the engine and starts one with these weights. The tokenizer stays the base model's."""
        from vllm import LLM

        args = {**self.model_args, "model": folder, "tokenizer": self.base}
        if folder != self.base:
            args["revision"] = None
        config = models.load_config(folder, args.get("revision"), self.trust_remote_code)
        bound_context(folder, config.get_text_config(), args)
        self._end()
        with starting_vllm():
            self.model = LLM(**args)
        self.started_on = self.holds = folder

    def _probe(self) -> list[Any]:
        """The first tokens of a few answers, with their log-probabilities."""
        room = min(24, self.max_length - 8)
        (text,) = self._prompt_ids(["What changes when the weights of a model change? " * 3], None)
        prompts = [{"prompt_token_ids": text[:n]} for n in sorted({max(room // 2, 1), max(room, 1)})]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0, detokenize=False)
        outputs = self.model.generate(prompts, params, use_tqdm=False)
        return [
            (list(o.outputs[0].token_ids), [next(iter(p.values())).logprob for p in o.outputs[0].logprobs])
            for o in outputs
        ]

    @contextmanager
    def _full_model(self, checkpoint: Path | None, below: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The folder (or hub id) of the full weights to load for a checkpoint, and how the checkpoint is served."""
        if checkpoint is None:
            yield self.base, {"weights": "base"}
        elif not models.is_adapter(checkpoint):
            yield str(checkpoint), {"weights": "model"}
        elif self.soft_prompt is not None:
            yield self.base, {"weights": "soft prompt"}
        elif self.adapter is not None:
            yield self.base, {"weights": "adapter"}
        else:
            with self._merging.full_model(checkpoint, below) as (folder, lost):
                yield folder, {"weights": "merged adapter", "lost": lost}

    def reuse(self, checkpoints: Sequence[Path]) -> None:
        """See `SwapLM`. Restarts the engine if a checkpoint needs an argument that it was not started with."""
        super().reuse(checkpoints)
        self._merging.forget()
        needed: dict[str, Any] = {}
        if any(models.soft_prompt(path) is not None for path in checkpoints):
            needed["enable_prompt_embeds"] = True
        args = {key: value for key, value in self.model_args.items() if key == "enable_lora"}
        adapters = lora_args(args, checkpoints)
        if adapters and args["max_lora_rank"] > self.model_args.get("max_lora_rank", 0):
            needed |= args
        if needed.items() - self.model_args.items():
            self.model_args |= needed
            self._restart(self.base)
        self._serve(adapters)

    def _serve(self, adapters: Sequence[Path]) -> None:
        """Makes LoRA requests for adapters. One with layers for which vLLM has no LoRA is left to be merged."""
        for path in adapters:
            # New numbers: under an old one vLLM would keep using the weights it has loaded for it.
            self._requests += 1
            # vLLM tells adapters apart by their names, and the stages' folders share one name.
            request = LoRARequest(f"{self._requests}_{path.name}", self._requests, str(path))
            try:
                self.model.llm_engine.add_lora(request)
            except Exception as e:  # a worker may raise any kind
                log.warning("vLLM cannot serve %s unmerged, so it is merged: %s", path, brief(e))
                self.adapters.pop(path, None)
            else:
                self.adapters[path] = request

    def prepare(self, checkpoint: Path | None, below: Sequence[Path] = ()) -> None:
        """See `SwapLM`."""
        if checkpoint is None or not models.is_adapter(checkpoint) or models.soft_prompt(checkpoint) is not None:
            return
        if below or checkpoint not in self.adapters:
            self._merging.prepare(checkpoint, below)

    # ----------------------------------------------------------------------------------------------------- answers

    def answer_together(self, checkpoints: Sequence[Path]) -> None:
        """See `SwapLM`."""
        self._later = [self.adapters[path] for path in checkpoints if path in self.adapters]

    def _answers(self, wanted: list[Wanted]) -> list[list[int]]:
        asked = [self.adapter, *(self._later if self.adapter is not None else [])]
        new = dict.fromkeys((adapter, want) for adapter in asked for want in wanted)
        jobs = [job for job in new if job not in self._known]
        # Long prompts first, and those with the same beginning together, for the cache.
        jobs.sort(key=lambda job: (-len(job[1].ids), job[1].ids))
        if jobs:
            outputs = self._model_generate(
                [list(want.ids) for _, want in jobs],
                generate=True,
                sampling_params=[self._params(want) for _, want in jobs],
                adapters=[adapter for adapter, _ in jobs],
            )
            for (adapter, want), output in zip(jobs, outputs, strict=True):
                ids = list(output.outputs[0].token_ids)
                self._known[adapter, want] = ids
                if want.reference:
                    example = want.ids, want.reference
                    self._told[adapter, example] = matching_logprobs(want.reference, output.outputs[0])
                if want.rated and adapter is self.adapter:
                    logprobs = [
                        known[token].logprob for token, known in zip(ids, output.outputs[0].logprobs, strict=True)
                    ]
                    self.ratings[want] = sum(logprobs) / len(logprobs)
        answers = [self._known[self.adapter, want] for want in wanted]
        if self.adapter is None:
            self._known.clear()
        return answers

    def _params(self, want: Wanted) -> Any:
        stops = list(want.stops) if not self.think_end_token else []
        asked = list(dict.fromkeys(want.reference))[:MAX_LOGPROB_TOKEN_IDS]
        sampling = {"temperature": 0, **dict(want.sampling)}
        if "seed" in sampling:  # vLLM would draw with the same random numbers for every prompt
            sampling["seed"] = int(digest([sampling["seed"], want.ids])[:15], 16)
        return SamplingParams(
            **sampling,
            max_tokens=want.most,
            # Only our own ends: vLLM would add those of a generation_config.json.
            ignore_eos=True,
            stop_token_ids=sorted(want.ends),
            stop=stops or None,
            detokenize=bool(stops),
            skip_special_tokens=True,
            logprobs=0 if want.rated else None,  # of the generated token alone
            logprob_token_ids=sorted(asked) or None,
        )

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """One pass for all choices of a question where each is a single token, as in MMLU and BoolQ.

        lm-eval asks vLLM for the probabilities of the whole prompt once for every choice, and vLLM cannot use its cache
        for that. Here one token is generated and the probabilities of all choices are read at its position. The numbers
        are the same up to rounding. An engine with LoRA gives no probabilities of prompts, so there all choices are
        scored this way, token by token.
        """
        paths: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if self.soft_prompt is None and (len(continuation) == 1 or self.model_args.get("enable_lora")):
                ids = [*context, *continuation]
                cut = max(len(ids) - (self.max_length - 1), 0)  # on the left, as lm-eval does
                paths[i] = [(tuple(ids[cut : len(context) + n]), token) for n, token in enumerate(continuation)]
        logprobs = self._next_logprobs([step for path in paths.values() for step in path])
        answers: dict[int, tuple[float, bool]] = {}
        for i, path in paths.items():
            # The logprobs include the generated token, which is the likeliest one.
            greedy = all(logprobs[prompt][token] >= max(logprobs[prompt].values()) for prompt, token in path)
            answers[i] = (sum(logprobs[prompt][token] for prompt, token in path), greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        rest = [i for i in range(len(requests)) if i not in answers]
        if rest:
            answers |= zip(rest, super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm), strict=True)
        return [answers[i] for i in range(len(requests))]

    def likelihoods_of(self, examples: list[Example]) -> list[float]:
        """See `SwapLM`."""
        known = [self._told.get((self.adapter, example), []) for example in examples]
        found = {i: sum(nats) for i, nats in enumerate(known) if len(nats) == len(examples[i][1])}
        # The remaining tokens as if they were generated where vLLM gives no probabilities of prompts (adapters, soft
        # prompts), and where only one token remains, since that costs less than a pass over the prompt.
        apart = self.model_args.get("enable_lora") or self.soft_prompt is not None
        rest = {
            i: Forced((*prompt, *answer[: (n := len(known[i]))]), answer[n:], tuple((token,) for token in answer[n:]))
            for i, (prompt, answer) in enumerate(examples)
            if i not in found and (apart or len(answer) - len(known[i]) == 1)
        }
        order = sorted(rest, key=lambda i: rest[i].prompt)  # prompts with the same beginning one after the other
        for i, steps in zip(order, self.token_logprobs([rest[i] for i in order]), strict=True):
            found[i] = sum(known[i]) + sum(step[token] for token, step in zip(rest[i].answer, steps, strict=True))
        # Most prompts are in the cache, which drops the shortest first: they go first. The second round ignores it.
        order = sorted(set(range(len(examples))) - set(found), key=lambda i: (len(examples[i][0]), examples[i]))
        for cached in (True, False):
            order = [i for i in order if i not in found]
            read = self._read([examples[i] for i in order], cached) if order else []
            found |= {i: nats for i, nats in zip(order, read, strict=True) if nats is not None}
        return [found[i] for i in range(len(examples))]

    def _read(self, examples: list[Example], cached: bool) -> list[float | None]:
        """The log-likelihoods from one pass; None where the cache already holds tokens of the answer.

        vLLM computes no probabilities for cached tokens, so by default it ignores its cache when probabilities of a
        prompt are asked for. Here only those of the answer are needed, so the prompt may come from the cache.
        """
        params: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "detokenize": False, "prompt_logprobs": 0}
        params["skip_reading_prefix_cache"] = not cached
        outputs = self._model_generate(
            # The last token is predicted, not read, so a row needs no more context than in training.
            [[*prompt, *answer[:-1]] for prompt, answer in examples],
            generate=True,
            sampling_params=[SamplingParams(**params, logprob_token_ids=[answer[-1]]) for _, answer in examples],
        )
        found: list[float | None] = []
        for (prompt, answer), output in zip(examples, outputs, strict=True):
            steps = [*output.prompt_logprobs, output.outputs[0].logprobs[0]][-len(answer) :]
            whole = (output.num_cached_tokens or 0) < len(prompt)
            found.append(sum(s[token].logprob for token, s in zip(answer, steps, strict=True)) if whole else None)
        return found

    def _next_logprobs(self, steps: list[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], dict[int, float]]:
        """Prompt -> token -> log-probability of that token behind the prompt, for all steps (prompt, token)."""
        tokens: dict[tuple[int, ...], set[int]] = {}
        for prompt, token in steps:
            tokens.setdefault(prompt, set()).add(token)
        prompts = sorted(tokens)  # those with the same shots one after the other, for the cache
        found = self.token_logprobs([Forced(prompt, (0,), (tuple(tokens[prompt]),)) for prompt in prompts])
        return {prompt: here for prompt, (here,) in zip(prompts, found, strict=True)}

    def token_logprobs(self, forced: Sequence[Forced]) -> list[TokenLogprobs]:
        """See `SwapLM`."""
        places, prompts, params = [], [], []
        for i, one in enumerate(forced):
            for part in self._parts(one):
                which: dict[str, Any] = {"logprobs": one.asked}
                if isinstance(one.asked, tuple):
                    which = {"logprob_token_ids": sorted({token for n in part for token in one.asked[n]})}
                if self.forces and len(part) > 1:  # a single token need not be forced: nothing follows it
                    tokens = list(one.answer[part.start : part.stop])
                    replays = self.model_args.get("enable_trace_replay")
                    which |= {"trace_decode_token_ids": tokens} if replays else {"extra_args": {"forced": tokens}}
                places.append(i)
                prompts.append([*one.prompt, *one.answer[: part.start]])
                params.append(
                    SamplingParams(temperature=0, max_tokens=len(part), ignore_eos=True, detokenize=False, **which)
                )
        outputs = self._model_generate(prompts, generate=True, sampling_params=params) if prompts else []
        found: list[TokenLogprobs] = [[] for _ in forced]
        for i, output in zip(places, outputs, strict=True):
            found[i] += [{token: p.logprob for token, p in step.items()} for step in output.outputs[0].logprobs]
        return found

    @property
    def forces(self) -> bool:
        """Whether a request can be made to generate known tokens; otherwise each token is a request of its own."""
        args = self.model_args
        return bool(args.get("enable_trace_replay")) or FORCING in (args.get("logits_processors") or ())

    def _parts(self, one: Forced) -> Iterator[range]:
        """Splits an answer into ranges of tokens, so that one request can return all that is asked of a range."""
        start, tokens = 0, set[int]()
        for n in range(len(one.answer)):
            here = set(one.asked[n]) if isinstance(one.asked, tuple) else set()
            if n > start and (not self.forces or len(tokens | here) > MAX_LOGPROB_TOKEN_IDS):
                yield range(start, n)
                start, tokens = n, set()
            tokens |= here
        yield range(start, len(one.answer))

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        sampling_params: Any = None,
        adapters: list[LoRARequest | None] | None = None,
    ) -> Any:
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in requests]
        if not generate:
            if self.soft_prompt is not None:
                raise EngineError("vLLM gives no likelihoods after a soft prompt: use --backend hf.")
            sampling_params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
        if self.soft_prompt is not None:
            soft, n = self.soft_prompt.to(self.model.llm_engine.model_config.dtype), len(self.soft_prompt)
            prompts = [
                {
                    # Rows of zeros where the engine looks up the embedding of a token itself.
                    "prompt_embeds": torch.cat([soft, soft.new_zeros(len(ids), soft.shape[1])]),
                    "prompt_token_ids": [0] * n + ids,
                    "prompt_is_token_ids": [False] * n + [True] * len(ids),
                }
                for ids in requests
            ]
        # A second bar below that of the cells; none where the output is a file.
        bar = sys.stderr.isatty() and partial(tqdm, leave=False, position=1)
        started = time.perf_counter()
        outputs = self.model.generate(
            prompts,
            sampling_params=sampling_params,
            use_tqdm=bar,
            lora_request=adapters if adapters is not None and any(adapters) else self.adapter,
        )
        self.work.seconds += time.perf_counter() - started
        self.work.prompt_tokens += sum(len(ids) for ids in requests)
        self.work.generated_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return outputs
