"""A judge in this process: a local model in vLLM, no server and no key.

Small models reason and then forget the verdict. Unlike over an endpoint, one can be had here: the reply is continued
with the opening brackets, and the model chooses among the verdicts that it was offered. Such verdicts are counted
(`forced`), and the calibration says what they are worth. A reply that ends in thinking is unscored instead.

A request is rendered once. What is generated, and what continues a reply, comes after that very text: a template that
renders a reply again may leave out its thinking, or all of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from judges import JudgeError
from judges.judge import Judge
from judges.replies import Reply, Request
from judges.thinking import answer_of, opened_by
from judges.verdict import is_unclosed, verdict_of
from trace_bench.engine import SPEED_ONLY_ARGS, prepare_vllm, starting_vllm, with_dtype
from trace_bench.engine.models import load_tokenizer, pinned_revision, resolve_model
from trace_bench.keys import refuse_secrets
from trace_tasks.tokens import PromptError, rendered, unknown_variables

#: Requests given to the engine at once: a killed program loses at most these.
CHUNK = 256
#: The date for templates with `strftime_now`: fixed, so that requests are the same on another day.
DATE = datetime(2025, 1, 1)
#: The verdicts that a request offers: the material in it has no double brackets (`judges.prompts.neutralise`).
_OFFERED = re.compile(r"\[\[(\w+)\]\]")
_OPENING = "\n\n[["
#: Keys of a request that are not arguments of SamplingParams.
_OTHER = {"model", "messages", "chat_template_kwargs", "max_tokens", "max_completion_tokens"}
#: Arguments of the chat template that the program sets itself.
_RENDERING = {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}


class _Asked(NamedTuple):
    """A request as the engine gets it."""

    key: str
    body: Request
    prompt: str
    ids: list[int]
    sampling: Any
    offered: list[str]
    """The verdicts that the request offers."""


class LocalJudge(Judge):
    """A model in vLLM: a hub id, a local folder, or SmolLM2-135M-Instruct. See `Judge`.

    The engine starts with the first request that is not cached. `sampling` is as `vllm serve` takes it: vLLM's
    SamplingParams, and `chat_template_kwargs`. `engine_args` are the dtype, and those arguments of vLLM's LLM that
    decide memory and speed only, since replies are cached without them. As in the evaluation, the default dtype is
    float32 where bfloat16 is slow. A dtype other than the model's own makes another judge.
    """

    date = f"{DATE:%Y-%m-%d}"

    def __init__(
        self,
        model: str,
        *,
        cache: Path,
        sampling: dict[str, Any] | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.engine_args = with_dtype(engine_args or {})
        if refused := sorted(self.engine_args.keys() - SPEED_ONLY_ARGS - {"dtype"}):
            raise JudgeError(
                f"engine_args: {', '.join(refused)} is not allowed: it would change the verdicts. Use only dtype, "
                f"{', '.join(sorted(SPEED_ONLY_ARGS))}."
            )
        refuse_secrets({"model": model, "engine_args": self.engine_args}, "the judge's")
        self.folder = resolve_model(model)
        self.revision = pinned_revision(self.folder)
        # Other weights under the same name are another judge: their replies are not mixed in the cache.
        dtype = self.engine_args.get("dtype", "auto")
        endpoint = f"vllm:{self.revision}" + f":{dtype}" * (dtype != "auto")
        super().__init__(model, endpoint=endpoint, cache=cache, sampling=sampling)
        self._tokenizer: Any = None
        self._llm: Any = None

    def send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Generates the replies; see `Judge.send`. A request that does not fit into the model's context fails."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self.folder)
            self._check_template()
            prepare_vllm(self.engine_args)
        # Before the engine starts, which takes the time.
        asked = [self._asked(key, body) for key, body in bodies.items()]
        if self._llm is None:
            self._llm = _open(self.folder, self.engine_args)
        errors: dict[str, str] = {}
        fitting = []
        room = self._llm.llm_engine.model_config.max_model_len - len(_OPENING) - 1  # a verdict may have to be forced
        for one in asked:
            limit = one.sampling.max_tokens or max(1, room - len(one.ids))
            if len(one.ids) + limit <= room:
                one.sampling.max_tokens = limit
                fitting.append(one)
            else:
                errors[one.key] = (
                    f"a prompt of {len(one.ids)} tokens and a reply of {limit} do not fit into the model's {room}: "
                    "raise max_model_len in --engine-args, or lower max_tokens in --sampling"
                )
        with tqdm(total=len(fitting), desc=desc, unit="request") as bar:
            for i in range(0, len(fitting), CHUNK):
                chunk = fitting[i : i + CHUNK]
                outputs = self._generate([one.ids for one in chunk], [one.sampling for one in chunk])
                for one, reply in zip(chunk, self._replies(chunk, outputs), strict=True):
                    self.cache.put(one.key, one.body, reply)
                bar.update(len(chunk))
        return errors

    def _check_template(self) -> None:
        """Refuses a model without a chat template, and arguments that its template does not take."""
        if self._tokenizer.chat_template is None:
            raise JudgeError(f"{self.model} has no chat template. Use a chat model.")
        given, template = self.sampling.get("chat_template_kwargs", {}), self._tokenizer.get_chat_template()
        if unknown := sorted({*unknown_variables(template, given), *(_RENDERING & given.keys())}):
            raise JudgeError(
                f"--sampling chat_template_kwargs: {', '.join(unknown)}: the chat template of {self.model} has no such "
                "argument. Leave it out."
            )

    def _asked(self, key: str, body: Request) -> _Asked:
        from vllm import SamplingParams

        names = {name: value for name, value in body.items() if name not in _OTHER}
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        try:
            # Marks of thinking are special tokens of some models.
            sampling = SamplingParams(**{"skip_special_tokens": False, **names, "max_tokens": limit})
        except (TypeError, ValueError) as e:
            raise JudgeError(f"--sampling {', '.join(names)}: vLLM's SamplingParams refuse it: {e}.") from e
        arguments = {"strftime_now": DATE.strftime, **body.get("chat_template_kwargs", {})}
        try:
            prompt = rendered(
                self._tokenizer, body["messages"], "Use a different model.", add_generation_prompt=True, **arguments
            )
        except PromptError as e:
            raise JudgeError(f"{self.model}: {e}") from e
        if body["messages"][-1]["content"].strip() not in prompt:
            raise JudgeError(f"The chat template of {self.model} leaves out the question. Use a different model.")
        offered = sorted(set(_OFFERED.findall(body["messages"][-1]["content"])))
        return _Asked(key, body, prompt, self._ids(prompt), sampling, offered)

    def _ids(self, text: str) -> list[int]:
        # A rendered chat holds its special tokens as text.
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _generate(self, prompts: list[list[int]], sampling: list[Any]) -> list[Any]:
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def _replies(self, asked: Sequence[_Asked], generated: Sequence[Any]) -> list[Reply]:
        """The replies. If a reply gives none of the offered verdicts, the model is made to choose one."""
        from vllm import SamplingParams

        replies = [self._reply(one, output) for one, output in zip(asked, generated, strict=True)]
        open_ = [
            i
            for i, (one, reply) in enumerate(zip(asked, replies, strict=True))
            if one.offered and not is_unclosed(reply) and verdict_of(reply, one.offered) is None
        ]
        if not open_:
            return replies
        # First token after the brackets -> its verdict, for each reply. The offered ones begin with different letters.
        words = [{self._first_token(word): word for word in asked[i].offered} for i in open_]
        prompts = [self._ids(asked[i].prompt + generated[i].text.rstrip() + _OPENING) for i in open_]
        sampling = [SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=list(tokens)) for tokens in words]
        for i, tokens, output in zip(open_, words, self._generate(prompts, sampling), strict=True):
            text = f"{replies[i].text.rstrip()}{_OPENING}{tokens[output.token_ids[0]]}]]"
            replies[i] = replace(replies[i], text=text, forced=True)
        return replies

    def _first_token(self, word: str) -> int:
        before, whole, alone = map(self._ids, (_OPENING, _OPENING + word, word))
        return whole[len(before)] if whole[: len(before)] == before else alone[0]

    def _reply(self, one: _Asked, generated: Any) -> Reply:
        answer = answer_of(opened_by(one.prompt) + generated.text)
        text = answer or ""
        for token in self._tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, "")
        return Reply(
            text=text,
            thinking=generated.text[: len(generated.text) - len(answer or "")],
            unclosed=answer is None,
            finish_reason=generated.finish_reason,
            prompt_tokens=len(one.ids),
            completion_tokens=len(generated.token_ids),
        )


def _tokenizer(folder: str) -> Any:
    if Path(folder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else loading asks a hub that may not be there, and waits
    return load_tokenizer(folder)


def _open(folder: str, args: dict[str, Any]) -> Any:
    from vllm import LLM

    with starting_vllm():
        # The tokenizer that renders the chats; "auto" takes a different one for Mistral's models.
        return LLM(model=folder, tokenizer_mode="hf", **args)
