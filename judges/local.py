"""A judge in this process: a local model in vLLM, no server and no key.

Small models reason and then forget the verdict. Here, unlike over an endpoint, one can be had: the reply is continued
with the opening brackets, and the model chooses among the verdicts that it was offered. Such verdicts are counted
(`forced`), and the calibration says what they are worth.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from judges import JudgeError
from judges.client import SAMPLING, Judge, Reply, Request
from judges.verdict import verdict_of
from trace_bench.engine import FREE, prepare_vllm, starting_vllm
from trace_bench.models import pinned_revision, resolve_model

#: Requests given to the engine in one go: when the program is killed no more than these are lost.
CHUNK = 256
#: The verdicts that a request offers: the material in it has no double brackets (`judges.prompts.neutralise`).
_OFFERED = re.compile(r"\[\[(\w+)\]\]")
_OPENING = "\n\n[["


class LocalJudge(Judge):
    """A model in vLLM; the engine starts with the first request that is not cached.

    Args:
        model: A hub id, a local folder, or SmolLM2-135M-Instruct.
        cache: The file of replies.
        sampling: Arguments of vLLM's SamplingParams; None = greedy.
        engine_args: Arguments of vLLM's LLM, such as tensor_parallel_size; those of memory and speed only, since
            replies are cached without them.
    """

    def __init__(
        self,
        model: str,
        *,
        cache: Path,
        sampling: dict[str, Any] | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.engine_args = {"enable_prefix_caching": True, **(engine_args or {})}
        refused = sorted(self.engine_args.keys() - FREE)
        if refused:
            raise JudgeError(
                f"engine_args: {', '.join(refused)}: would make another judge of this model. There are "
                f"{', '.join(sorted(FREE))}."
            )
        self.folder = resolve_model(model)
        self.revision = pinned_revision(self.folder)
        # Other weights under the same name are another judge: their replies are not mixed in the cache.
        super().__init__(model, endpoint=f"vllm:{self.revision}", cache=cache, sampling=sampling or SAMPLING)
        self._llm: Any = None

    def send(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Generates the replies; see `Judge.send`. A request that does not fit into the model's context fails."""
        if self._llm is None:
            self._llm = _open(self.folder, self.engine_args)
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
            if length + body.get("max_tokens", 0) + len(_OPENING) + 1 > room:
                errors[key] = f"the prompt and the reply do not fit into the model's {room} tokens"
            else:
                fitting.append((key, body))
        with tqdm(total=len(fitting), desc=desc, unit="request") as bar:
            for i in range(0, len(fitting), CHUNK):
                chunk = fitting[i : i + CHUNK]
                names = [{k: v for k, v in body.items() if k not in ("model", "messages")} for _, body in chunk]
                messages = [body["messages"] for _, body in chunk]
                outputs = self._llm.chat(messages, [SamplingParams(**n) for n in names], use_tqdm=False)
                replies = [
                    Reply(
                        text=output.outputs[0].text,
                        finish_reason=output.outputs[0].finish_reason,
                        prompt_tokens=len(output.prompt_token_ids),
                        completion_tokens=len(output.outputs[0].token_ids),
                    )
                    for output in outputs
                ]
                for (key, body), reply in zip(chunk, self._decided(messages, replies), strict=True):
                    self.cache.put(key, body, reply)
                bar.update(len(chunk))
        return errors

    def _decided(self, messages: list[list[dict[str, str]]], replies: list[Reply]) -> list[Reply]:
        """The replies, continued with a verdict where verdicts were offered and none was given."""
        from vllm import SamplingParams

        tokenizer = self._llm.get_tokenizer()
        # Verdict -> its first token after the brackets. The offered ones begin with different letters.
        tokens: dict[str, int] = {}
        opened = [reply.text.rstrip() + _OPENING for reply in replies]
        open_ones: dict[int, list[str]] = {}
        for i, (turns, reply) in enumerate(zip(messages, replies, strict=True)):
            offered = sorted(set(_OFFERED.findall(turns[-1]["content"])))
            if offered and verdict_of(reply, offered) is None:
                open_ones[i] = offered
                for word in set(offered) - tokens.keys():
                    before, whole, alone = (
                        tokenizer(text, add_special_tokens=False).input_ids
                        for text in (_OPENING, _OPENING + word, word)
                    )
                    tokens[word] = whole[len(before)] if whole[: len(before)] == before else alone[0]
        if not open_ones:
            return replies
        outputs = self._llm.chat(
            [[*messages[i], {"role": "assistant", "content": opened[i]}] for i in open_ones],
            [
                SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[tokens[word] for word in offered])
                for offered in open_ones.values()
            ],
            add_generation_prompt=False,
            continue_final_message=True,
            use_tqdm=False,
        )
        decided = list(replies)
        for (i, offered), output in zip(open_ones.items(), outputs, strict=True):
            chosen = output.outputs[0].token_ids[0]
            word = next(word for word in offered if tokens[word] == chosen)
            decided[i] = replace(replies[i], text=f"{opened[i]}{word}]]", forced=True)
        return decided


def _open(folder: str, args: dict[str, Any]) -> Any:
    if Path(folder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else loading asks a hub that may not be there, and waits
    prepare_vllm(args)
    from vllm import LLM

    with starting_vllm():
        return LLM(model=folder, **args)
