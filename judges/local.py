"""A judge in this process: a local model in vLLM, no server and no key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from judges import JudgeError
from judges.client import SAMPLING, Judge, Reply, Request
from trace_bench.engine import prepare_vllm
from trace_bench.models import pinned_revision, resolve_model

#: Requests given to the engine in one go: when the program is killed no more than these are lost.
CHUNK = 256


class LocalJudge(Judge):
    """A model in vLLM; the engine starts with the first request that is not cached.

    Args:
        model: A hub id, a local folder, or SmolLM2-135M-Instruct.
        cache: The file of replies.
        sampling: Arguments of vLLM's SamplingParams; None = greedy.
    """

    def __init__(self, model: str, *, cache: Path, sampling: dict[str, Any] | None = None) -> None:
        self.folder = resolve_model(model)
        self.revision = pinned_revision(self.folder)
        # Other weights under the same name are another judge: their replies are not mixed in the cache.
        super().__init__(model, endpoint=f"vllm:{self.revision}", cache=cache, sampling=sampling or SAMPLING)
        self._llm: Any = None

    def send(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Generates the replies; see `Judge.send`. A request that does not fit into the model's context fails."""
        if self._llm is None:
            self._llm = _open(self.folder)
        from vllm import SamplingParams

        tokenizer = self._llm.get_tokenizer()
        if tokenizer.chat_template is None:
            raise JudgeError(f"{self.model} has no chat template: use a model that was tuned for chat as the judge.")
        room = self._llm.llm_engine.model_config.max_model_len
        errors: dict[str, str] = {}
        fitting = []
        for key, body in bodies.items():
            prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            if length + body.get("max_tokens", 0) > room:
                errors[key] = f"the prompt and the reply do not fit into the model's {room} tokens"
            else:
                fitting.append((key, body))
        with tqdm(total=len(fitting), desc=desc, unit="request") as bar:
            for i in range(0, len(fitting), CHUNK):
                chunk = fitting[i : i + CHUNK]
                names = [{k: v for k, v in body.items() if k not in ("model", "messages")} for _, body in chunk]
                outputs = self._llm.chat(
                    [body["messages"] for _, body in chunk], [SamplingParams(**n) for n in names], use_tqdm=False
                )
                for (key, body), output in zip(chunk, outputs, strict=True):
                    answer = output.outputs[0]
                    self.cache.put(
                        key,
                        body,
                        Reply(
                            text=answer.text,
                            finish_reason=answer.finish_reason,
                            prompt_tokens=len(output.prompt_token_ids),
                            completion_tokens=len(answer.token_ids),
                        ),
                    )
                bar.update(len(chunk))
        return errors


def _open(folder: str) -> Any:
    if Path(folder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else loading asks a hub that may not be there, and waits
    args: dict[str, Any] = {"enable_prefix_caching": True}
    prepare_vllm(args)
    from vllm import LLM

    return LLM(model=folder, **args)
