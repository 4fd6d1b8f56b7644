"""Texts to token ids and back, in the same way for training, evaluation and judging, on every backend.

Prompts: first the special tokens that the tokenizer adds in front (BOS), then the text. Tokens that a tokenizer would
add at the end (`add_eos_token`) are left out: after EOS a model does not answer. A chat prompt is only the text that
the template makes, as transformers' `apply_chat_template` encodes it.

Answers: only the generated ids are decoded, without special tokens and without cleaning up spaces, as in the official
code. vLLM itself decodes them after the prompt, which puts a space before the first word of SentencePiece.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from trace_tasks.errors import TraceError
from trace_tasks.limits import LimitError, limited


class PromptError(TraceError, ValueError):
    """A prompt cannot be made with this chat template or length limit. The message says what to change."""


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes generated token ids as the official code does (`batch_decode` without special tokens)."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def drops_first_space(tokenizer: Any) -> bool:
    """Whether a text that is decoded alone loses the space in front of it, as with SentencePiece tokenizers."""
    ids = tokenizer("a b", add_special_tokens=False).input_ids
    first = max((n for n in range(len(ids)) if text_of(tokenizer, ids[:n]) == "a"), default=len(ids))
    return text_of(tokenizer, ids[first:]) == "b"


def leading_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer adds in front of a text, such as BOS. Many add none."""
    alone, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return list(whole[:start])


#: The most seconds and bytes that rendering a chat template may take, and the most characters that it may add. A
#: template of a foreign model can loop, though it cannot run code.
RENDERING = (10.0, 2**30)
MOST_ADDED = 1_000_000
#: Arguments of `apply_chat_template` that this module sets, so a user cannot.
_NOT_OF_TEMPLATES = {
    *("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("tokenizer", "turns", "fix"),
}


def rendered(tokenizer: Any, turns: Sequence[dict[str, str]], fix: str, **arguments: Any) -> str:
    """The text that the tokenizer's chat template makes of a chat; the arguments are for `apply_chat_template`.

    `fix` is the part of the error message that says what to do if the template refuses the turns.

    Raises:
        PromptError: if the template refuses the turns, or takes too long or too much memory.
    """
    try:
        with limited(*RENDERING):
            text = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
    except LimitError as e:
        raise PromptError(f"The model's chat template cannot be used: {e} to render a chat.") from None
    except Exception as e:  # jinja2's own errors, and any error of an expression in the template
        roles = ", ".join(turn["role"] for turn in turns)
        raise PromptError(f"The model's chat template refuses the turns {roles}: {str(e).rstrip('.')}. {fix}") from e
    asked = sum(len(turn["content"]) for turn in turns)
    if len(text) > 10 * asked + MOST_ADDED:
        raise PromptError(f"The model's chat template cannot be used: it makes {len(text)} characters of {asked}.")
    return text


def unknown_variables(template: str, names: Iterable[str]) -> list[str]:
    """The names that do not occur in a template, so that setting them would change nothing."""
    return sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", template))


#: Texts that are rendered to see whether the template shows the question, and how it ends an answer.
_PROBE, _ANSWER = "What is asked here", "This is answered"
_NO_TEMPLATE = (
    "Put a different template into the tokenizer's files, or leave out what uses it (chat_template, judged, distance)."
)


class Chat:
    """Renders chat prompts from the tokenizer, its chat template, the template's arguments and one date.

    Args:
        tokenizer: It must have a chat template.
        arguments: Further variables of the template, such as {"enable_thinking": False}.
        date: The day that a template gets from `strftime_now`. It is the day on which the run began, so that the
            prompts stay the same. None = today.

    Raises:
        PromptError: if there is no template, it does not use an argument, or it leaves out the question.
    """

    def __init__(self, tokenizer: Any, arguments: dict[str, Any] | None = None, date: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise PromptError(
                "chat_template or chat_template_args is set, but the tokenizer has no chat template. Use a chat model, "
                "or leave them out."
            )
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        if taken := sorted(self.arguments.keys() & _NOT_OF_TEMPLATES):
            raise PromptError(
                f"chat_template_args: {taken[0]} is not a variable of the template, but an option that the program "
                "sets. Leave it out."
            )
        self._check_variables()
        self.day = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        #: Rendered text -> its turns and mode. A prompt that is too long is rendered again with less content.
        self._made: dict[str, tuple[list[dict[str, str]], dict[str, bool]]] = {}
        if _PROBE not in self._render([{"role": "user", "content": _PROBE}], add_generation_prompt=True):
            raise PromptError(
                f"The model's chat template leaves out the question: perhaps it is for images and ignores plain text. "
                f"{_NO_TEMPLATE}"
            )

    def _check_variables(self) -> None:
        try:
            template = self.tokenizer.get_chat_template(
                self.arguments.get("chat_template"), self.arguments.get("tools")
            )
        except ValueError:
            names = sorted(self.tokenizer.chat_template)
            raise PromptError(
                f"The tokenizer has several chat templates without a default: {', '.join(names)}. Choose one, for "
                f"example with chat_template_args '{json.dumps({'chat_template': names[0]})}'."
            ) from None
        if unknown := unknown_variables(template, self.arguments.keys() - {"chat_template"}):
            raise PromptError(
                f"chat_template_args: the chat template has no variable {', '.join(unknown)}. Leave it out, or use the "
                "name from the template."
            )

    @cached_property
    def end(self) -> str | None:
        """The token with which the template ends an answer, which may differ from EOS. None if it writes none."""
        turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._render(turns, add_generation_prompt=False)
        except PromptError:
            return None
        behind = text.rpartition(_ANSWER)[2].lstrip()
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return max((token for token in tokens if token and behind.startswith(token)), key=len, default=None)

    @property
    def end_ids(self) -> frozenset[int]:
        """The id of `end`; empty if there is none."""
        return frozenset({self.tokenizer.convert_tokens_to_ids(self.end)} if self.end else ())

    def __call__(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. Without `add_generation_prompt` it ends within the last message, to be continued."""
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        mode = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text = self._render(turns, **mode)
        self._made[text] = turns, mode
        return text

    def __contains__(self, text: str) -> bool:
        return text in self._made

    def _render(self, turns: list[dict[str, str]], **mode: bool) -> str:
        fix = _NO_TEMPLATE
        if turns[0]["role"] == "system":
            fix = (
                "A task's `description` becomes a system turn. If the template has none, put the description into "
                "doc_to_text; or leave chat_template out."
            )
        arguments = {"strftime_now": self.day.strftime, **self.arguments}
        return rendered(self.tokenizer, turns, fix, **mode, **arguments)

    def cut_ids(self, text: str, limit: int) -> list[int]:
        """At most `limit` token ids of a text from `__call__`; parts of the chat are left out if needed.

        Earlier turns are left out first, then the beginning of the last question. The template's own words stay.

        Raises:
            PromptError: if the template alone is longer.
        """
        turns, mode = self._made[text]
        (ids,) = _encoded(self.tokenizer, [text])
        asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        while len(ids) > limit and len(asked) > 1:  # drop the first question and all turns up to the second one
            turns = turns[: asked[0]] + turns[asked[1] :]
            asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            (ids,) = _encoded(self.tokenizer, [self._render(turns, **mode)])
        return ids if len(ids) <= limit else self._cut_turn(turns, asked[0] if asked else -1, mode, limit, ids)

    def _cut_turn(
        self, turns: list[dict[str, str]], index: int, mode: dict[str, bool], limit: int, ids: list[int]
    ) -> list[int]:
        content = turns[index]["content"]
        (words,) = _encoded(self.tokenizer, [content])
        keep = len(words) - (len(ids) - limit)
        while keep > 0:
            # Half of a character's bytes are decoded to "\ufffd". Special tokens stay: Py150's "<s>" may be one.
            end = self.tokenizer.decode(words[len(words) - keep :], clean_up_tokenization_spaces=False).lstrip("\ufffd")
            cut = list(turns)
            # A normaliser of the tokenizer may have made the text longer.
            cut[index] = {**turns[index], "content": content[max(len(content) - len(end), 0) :]}
            (ids,) = _encoded(self.tokenizer, [self._render(cut, **mode)])
            if len(ids) <= limit:
                return ids
            keep -= len(ids) - limit
        raise PromptError(
            f"The chat template and the text around the question are longer than the limit of {limit} tokens for a "
            "prompt. Raise max_prompt_length."
        )


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of texts, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False).input_ids if texts else []


def prompt_ids(
    tokenizer: Any, texts: Sequence[str], limit: int | None = None, chat: Chat | None = None
) -> list[list[int]]:
    """Token ids of prompts, truncated on the left. BOS stays in front, and the template of a chat stays whole.

    A text that already begins with the BOS text gets no second BOS. `chat` is the object that rendered the texts that
    are chats. At most `limit` tokens are kept, from the end of a prompt; None = no limit.

    Raises:
        PromptError: if a chat template alone is longer than the limit.
    """
    bos, leading = tokenizer.bos_token, leading_ids(tokenizer)
    out = []
    for text, ids in zip(texts, _encoded(tokenizer, texts), strict=True):
        if chat is not None and text in chat:
            out.append(ids if limit is None or len(ids) <= limit else chat.cut_ids(text, limit))
            continue
        has_bos = bos and text.startswith(bos)
        head, whole = (ids[:1], ids) if has_bos else (leading, leading + ids)
        if limit is not None and len(whole) > limit:
            whole = head[:limit] + whole[len(whole) - max(limit - len(head), 0) :]
        out.append(whole)
    return out


def _alone(tokenizer: Any, answer: str) -> list[int]:
    """The token ids of an answer alone; encoded after a line break if the tokenizer would add a space in front."""
    ids, start, behind = _encoded(tokenizer, [answer, "\n", f"\n{answer}"])
    if text_of(tokenizer, ids) == f" {answer}" and behind[: len(start)] == start:  # byte-level, with add_prefix_space
        return behind[len(start) :]
    return ids


def example_ids(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    max_prompt: int | None = None,
    max_answer: int | None = None,
    chat: Chat | None = None,
) -> list[dict[str, list[int]]]:
    """Training examples: the ids of the prompt as it is tested, then of answer and EOS. Only answer and EOS have loss.

    Prompt and answer are tokenised together, and the ids after the prompt's are taken. Tokenizers that mark word starts
    would give an answer alone different ids, which would teach a leading space. If a token spans prompt and answer,
    the answer is tokenised alone, so that the prompt stays as it is tested.

    Prompts keep their last `max_prompt` tokens. Answers keep their first `max_answer`, including EOS; a cut answer has
    no EOS. `chat` is the object that rendered the prompts that are chats.

    Returns:
        A dictionary of "input_ids" and "labels" for each; labels are -100 on the prompt.
    """
    full = prompt_ids(tokenizer, prompts, None, chat)
    cut = prompt_ids(tokenizer, prompts, max_prompt, chat) if max_prompt is not None else full
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    joint = prompt_ids(tokenizer, texts)
    if chat is not None:  # a rendered chat gets no BOS, and with its answer it is no longer a text in `chat`
        bare = _encoded(tokenizer, texts)
        joint = [b if prompt in chat else j for prompt, b, j in zip(prompts, bare, joint, strict=True)]
    examples = []
    for answer, whole, kept, both in zip(answers, full, cut, joint, strict=True):
        target = both[len(whole) :] if both[: len(whole)] == whole else _alone(tokenizer, answer)
        target = [*target, tokenizer.eos_token_id][:max_answer]
        examples.append({"input_ids": kept + target, "labels": [-100] * len(kept) + target})
    return examples


def questions(texts: Sequence[str], chat: Chat | None) -> list[str]:
    """Texts as questions in the chat template; unchanged without one."""
    return list(texts) if chat is None else [chat([{"role": "user", "content": text}]) for text in texts]


def check_room(chat: Chat, limit: int | None) -> None:
    """Refuses a chat template that leaves no room for a question within the limit of a prompt.

    Raises:
        PromptError: saying both lengths.
    """
    ids = prompt_ids(chat.tokenizer, questions(["?"], chat), None, chat)[0]
    if limit is not None and len(ids) >= limit:
        raise PromptError(
            f"The chat template alone has {len(ids) - 1} tokens, but max_prompt_length is {limit}. Raise it."
        )
