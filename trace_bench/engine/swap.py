"""What both engines share: an lm-eval LM whose weights can be swapped, and all work on token ids."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trace_tasks.errors import TraceError
from trace_tasks.tokens import Chat, example_ids, prompt_ids, text_of


class EngineError(TraceError):
    """The engine cannot be started, or cannot serve a checkpoint; the message says what to do."""


@dataclass
class Work:
    """What an engine has done: tokens, and the seconds they took."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """A request for an answer: the prompt, and where the answer ends."""

    ids: tuple[int, ...]
    """The tokens of the prompt."""
    most: int
    """The most tokens of the answer."""
    stops: tuple[str, ...]
    """Texts that end it."""
    ends: frozenset[int]
    """Tokens that end it: EOS."""
    sampling: tuple[tuple[str, Any], ...] = ()
    """Sampling arguments; empty = greedy, as for TRACE's tasks. With a "seed" each run draws the same answers."""
    given: tuple[int, ...] = ()
    """The first tokens of the answer. They are already the last ids of the prompt, and are not generated."""
    rated: bool = False
    """Whether the mean log-probability of the answer is wanted."""
    reference: tuple[int, ...] = ()
    """The tokens of the reference answer, if its likelihood is wanted later: the engine may find it on the way."""

    def with_given(self, given: tuple[int, ...]) -> Wanted:
        """The same request with the first tokens of its answer given. The limit stays, but one token is generated."""
        return replace(self, ids=self.ids + given, most=max(self.most - len(given), 1), given=given)


#: The token ids of a prompt and of its reference answer, as training has them.
Example = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Forced:
    """A known answer. The log-probabilities of some tokens are wanted at each of its positions."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    asked: tuple[tuple[int, ...], ...] | int
    """The tokens wanted at each position of the answer; a number = at least that many of the likeliest ones."""


def to_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first one of `ends`; all of them if there is none. The rest is padding."""
    return ids[: next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))]


#: For each position of an answer: token -> its log-probability there.
TokenLogprobs = list[dict[int, float]]


@dataclass(frozen=True)
class Answer:
    """A generated answer."""

    text: str
    """Its text up to the first stop."""
    finished: bool = True
    """False if it was cut at its length limit."""
    logprob: float | None = None
    """The mean log-probability of its tokens, including the last one, at temperature 1; None if not asked for."""


class SwapLM:
    """A mixin for lm-eval's class of a backend: swaps weights, and makes prompts and answers from token ids.

    Attributes:
        chat: Renders chat prompts; None takes the tokenizer's template as it is.
        max_prompt_length: Prompts of generation tasks are cut to their last `max_prompt_length` tokens.
        served: How the engine holds the loaded weights, for the record of a cell.
        unfinished: The answers that were cut at their length limit. The caller empties it.
        given: Request -> the first token ids of its answer, which are not generated. A request with no such ids is
            skipped. None = generate every answer completely.
        reference: Request -> the token ids of its reference answer (`reference_ids`), whose likelihood the engine may
            compute on the way. None = no likelihood is wanted.
    """

    base: str
    revision: str | None
    trust_remote_code: bool
    max_prompt_length: int | None
    tokenizer: Any
    ends: frozenset[int]
    chat: Chat | None = None
    soft_prompt: Any = None

    def __init__(self, **kwargs: Any) -> None:
        self.work = Work()
        self.unfinished: set[str] = set()
        self.given: Callable[[Any], tuple[int, ...]] | None = None
        self.reference: Callable[[Any], tuple[int, ...]] | None = None
        #: The mean log-probability of the answers that are `rated`.
        self.ratings: dict[Wanted, float] = {}
        self.served: dict[str, Any] = {"weights": "base"}
        # The stages ask the same texts, so their token ids are kept.
        self._ids: dict[tuple[str, int | None], array[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[array[int], ...]] = {}
        self._examples: dict[tuple[Any, ...], Example] = {}
        super().__init__(**kwargs)

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its answer together: the context without the soft prompt, if there is one."""
        taken = 0 if self.soft_prompt is None else len(self.soft_prompt)
        return super().max_length - taken  # type: ignore[misc]

    def load(self, checkpoint: Path | None, below: Sequence[Path] = ()) -> None:
        """Puts the weights of a checkpoint into the engine; None = the base model.

        Args:
            checkpoint: An adapter or a full model.
            below: Adapters to merge into the base model first, since this one was trained on top of them.
        """
        raise NotImplementedError

    def reuse(self, checkpoints: Sequence[Path]) -> None:
        """Prepares a running engine for checkpoints that did not exist when it was started."""
        self.work = Work()
        self.soft_prompt = None  # the former checkpoint's

    def prepare(self, checkpoint: Path | None, below: Sequence[Path] = ()) -> None:
        """Announces the next checkpoint, so that it can be merged while the engine works."""

    def answer_together(self, checkpoints: Sequence[Path]) -> None:
        """Announces which checkpoints will get the same questions, so that all can answer in one batch."""

    def _answers(self, wanted: list[Wanted]) -> list[list[int]]:
        """The token ids of the answers. Padding may follow the end of an answer."""
        raise NotImplementedError

    def likelihoods_of(self, examples: list[Example]) -> list[float]:
        """The log-likelihood of each answer given its prompt: the sum over its tokens, in nats."""
        raise NotImplementedError

    def token_logprobs(self, forced: Sequence[Forced]) -> list[TokenLogprobs]:
        """The log-probabilities of the tokens asked for, at each position of the given answers."""
        raise NotImplementedError

    def first_tokens(self, prompts: Sequence[Sequence[int]], most: int, in_chat: bool = False) -> list[list[int]]:
        """The first `most` tokens of the model's own greedy answers. A shorter answer ends with its EOS.

        `in_chat` says that the prompts are chats, so that the template's end of a turn ends an answer, too.
        """
        ends = self.ends | self.chat.end_ids if in_chat and self.chat is not None else self.ends
        wanted = [Wanted(tuple(ids), most, (), ends) for ids in prompts]
        return [to_end(ids, ends)[:most] for ids in self._answers(wanted)]

    # ----------------------------------------------------------------------------------------------------- prompts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """lm-eval's hook for chat prompts."""
        self.chat = self.chat or Chat(self.tokenizer)
        return self.chat(chat_history, add_generation_prompt)

    def tok_encode(self, string: str | list[str], add_special_tokens: bool | None = None, **_: Any) -> Any:
        """lm-eval's hook for whole texts, whose likelihoods are compared."""
        texts = [string] if isinstance(string, str) else list(string)
        if add_special_tokens is False:
            ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        else:
            ids = prompt_ids(self.tokenizer, texts, None, self.chat)
        return ids[0] if isinstance(string, str) else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if (context, continuation) not in self._pairs:
            pair = super()._encode_pair(context, continuation)  # type: ignore[misc]
            self._pairs[context, continuation] = tuple(array("l", ids) for ids in pair)
        first, second = self._pairs[context, continuation]
        return first.tolist(), second.tolist()

    def counts(self, rows: Sequence[dict[str, Any]], answer_tokens: int) -> dict[str, int]:
        """How many of lm-eval's samples had a prompt that was cut, and how many an answer that was cut."""
        limit = min(self.max_length - answer_tokens, self.max_prompt_length or self.max_length)
        prompts = self._prompt_ids([r["arguments"][0][0] for r in rows], None)
        return {
            "n_cut": sum(len(ids) > limit for ids in prompts),
            # An answer with a limit of one token is meant to end there.
            "n_unfinished": sum(
                r["filtered_resps"][0] in self.unfinished and r["arguments"][0][1].get("max_gen_toks") != 1
                for r in rows
            ),
        }

    def _prompt_ids(self, texts: list[str], limit: int | None) -> list[list[int]]:
        new = [text for text in dict.fromkeys(texts) if (text, limit) not in self._ids]
        for text, ids in zip(new, prompt_ids(self.tokenizer, new, limit, self.chat), strict=True):
            self._ids[text, limit] = array("l", ids)
        return [self._ids[text, limit].tolist() for text in texts]

    # ----------------------------------------------------------------------------------------------------- answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The answers to lm-eval's requests: greedy, ended by EOS, the task's stops or its length."""
        wanted = [self._wanted(*request.args) for request in requests]
        asked = list(range(len(wanted)))
        if self.given is not None:
            given = [self.given(request) for request in requests]
            wanted = [want.with_given(ids) for want, ids in zip(wanted, given, strict=True)]
            asked = [i for i, ids in enumerate(given) if ids]
        if self.reference is not None:
            wanted = [replace(w, reference=self.reference(r)) for w, r in zip(wanted, requests, strict=True)]
        answers = dict(zip(asked, self.answers([wanted[i] for i in asked]), strict=True))
        texts = [answers.get(i, "") for i in range(len(wanted))]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)  # type: ignore[attr-defined]
        return texts

    def answers(self, wanted: list[Wanted]) -> list[str]:
        """The texts of answers, up to the first stop in each."""
        full = self.full_answers(wanted)
        self.unfinished |= {answer.text for answer in full if not answer.finished}
        return [answer.text for answer in full]

    def full_answers(self, wanted: list[Wanted]) -> list[Answer]:
        """The answers with their texts, how they ended, and their mean log-probability if it is wanted."""
        answers = []
        for want, generated in zip(wanted, self._answers(wanted), strict=True):
            ids = [*want.given, *generated]
            end = next((n for n, token in enumerate(ids) if token in want.ends), None)
            whole = text = self._answer_text(ids[:end])
            for stop in want.stops:
                text = text.split(stop)[0]
            finished = end is not None or text != whole or len(ids) < want.most + len(want.given)
            answers.append(Answer(text, finished, self.ratings.get(want)))
        return answers

    def check_numbers(self, name: str) -> None:
        """Refuses weights that give no probabilities: their answers would be scored like any others.

        Raises:
            EngineError: if the loaded weights give NaN, as after a training that has diverged.
        """
        ids = tuple(self._prompt_ids(["What is one and one?"], None)[0][-4:])
        ((logprobs,),) = self.token_logprobs([Forced(ids, ids[-1:], 1)])
        if any(math.isnan(nats) for nats in logprobs.values()):
            raise EngineError(
                f"{name} gives NaN instead of probabilities: its training has diverged, or its files are damaged. "
                "Train it again, evaluate other stages (--stages), or remove a checkpoint from elsewhere (--drop NAME)."
            )

    def log_likelihoods(
        self, prompts: Sequence[str], answers: Sequence[str], max_answer: int | None = None
    ) -> list[tuple[float, int]]:
        """The log-likelihoods of reference answers: the sum over an answer's tokens, and the number of these tokens.

        The token ids are those of a training row, including EOS (`example_ids`). So the sum is minus the row's training
        loss times the number of tokens. Nothing is generated.

        Args:
            prompts: The prompts as texts; they are cut to their last `max_prompt_length` tokens.
            answers: The reference answers.
            max_answer: Answers are cut to their first `max_answer` tokens; None = not cut.

        Returns:
            (nats, tokens) of each answer; NaN nats if prompt and answer do not fit into the context.
        """
        examples = self._example_ids(prompts, answers, max_answer)
        fits = [i for i, (prompt, answer) in enumerate(examples) if prompt and len(prompt + answer) <= self.max_length]
        found = dict(zip(fits, self.likelihoods_of([examples[i] for i in fits]) if fits else (), strict=True))
        return [(found.get(i, math.nan), len(answer)) for i, (_, answer) in enumerate(examples)]

    def reference_ids(self, prompt: str, answer: str, max_answer: int | None) -> tuple[int, ...]:
        """The token ids of a reference answer that `log_likelihoods` scores."""
        return self._example_ids([prompt], [answer], max_answer)[0][1]

    def _example_ids(self, prompts: Sequence[str], answers: Sequence[str], max_answer: int | None) -> list[Example]:
        limits, pairs = (self.max_prompt_length, max_answer), list(zip(prompts, answers, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if (pair, limits) not in self._examples]
        made = example_ids(self.tokenizer, [p for p, _ in new], [a for _, a in new], *limits, self.chat)
        for pair, example in zip(new, made, strict=True):
            ids, n = tuple(example["input_ids"]), example["labels"].count(-100)
            self._examples[pair, limits] = ids[:n], ids[n:]
        return [self._examples[pair, limits] for pair in pairs]

    def _wanted(self, text: str, options: dict[str, Any]) -> Wanted:
        from lm_eval.models.utils import normalize_gen_kwargs

        kwargs = dict(normalize_gen_kwargs(options, self.max_gen_toks))  # type: ignore[attr-defined]
        most, until = kwargs.pop("max_gen_toks"), kwargs.pop("until", None) or []
        if not kwargs.pop("do_sample", False):
            kwargs.pop("temperature", None)
        room = self.max_length - most
        if room < 1:
            raise EngineError(
                f"An answer of {most} tokens leaves no room for a prompt in the engine's context of {self.max_length}: "
                "in --engine-args, raise max_model_len (vllm) or max_length (hf)."
            )
        if self.chat is not None and text in self.chat and self.chat.end:
            until = [*until, self.chat.end]  # which neither the tokenizer nor the model may call EOS
        (ids,) = self._prompt_ids([text], min(room, self.max_prompt_length or room))
        return self.want(ids, most, until, kwargs)

    def want(
        self, ids: Sequence[int], most: int, until: Sequence[str], sampling: dict[str, Any], rated: bool = False
    ) -> Wanted:
        """A request for the answer to a prompt's ids; `until` are texts that end it."""
        # Special tokens are not part of an answer's text, so a stop that is one is compared with the ids.
        special = self._special
        return Wanted(
            ids=tuple(ids),
            most=most,
            stops=tuple(stop for stop in until if stop and stop not in special),
            ends=self.ends | {special[stop] for stop in until if stop in special},
            sampling=tuple(sampling.items()),
            rated=rated,
        )

    @cached_property
    def _special(self) -> dict[str, int]:
        return {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def _answer_text(self, ids: Sequence[int]) -> str:
        """The text of an answer; with lm-eval's `think_end_token`, only what follows the last such token."""
        mark = self.think_end_token  # type: ignore[attr-defined]
        if isinstance(mark, str) and len(marks := self.tokenizer(mark, add_special_tokens=False).input_ids) == 1:
            (mark,) = marks  # a special token is not part of the text
        if isinstance(mark, int):
            last = max((n for n, token in enumerate(ids) if token == mark), default=None)
            return text_of(self.tokenizer, ids) if last is None else text_of(self.tokenizer, ids[last + 1 :]).lstrip()
        text = text_of(self.tokenizer, ids)
        return text if mark is None or mark not in text else text.rpartition(mark)[2].lstrip()
