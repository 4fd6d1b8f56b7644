"""What the commands share that ask a model: its options, the model, and what asking it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from judges import JudgeError
from trace_bench.cli import show
from trace_bench.cli.options import json_object, options, positive

if TYPE_CHECKING:
    from pathlib import Path

    from judges.judge import Judge, Usage
    from judges.replies import Request

#: Characters of --currency.
LONGEST_CURRENCY = 10


def add_asking(p: argparse.ArgumentParser, who: str, sampling: str) -> None:
    """Adds the options of a command that asks a model: which one, where, how, and at which price."""
    g = p.add_argument_group(f"the {who}")
    g.add_argument("--model", required=True, metavar="NAME_OR_PATH", help=f"the {who}, as the endpoint calls it")
    g.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible endpoint (default: OPENAI_BASE_URL, OpenAI)")
    g.add_argument(
        "--local",
        action="store_true",
        help=f"run the {who} here in vLLM: a hub id or a folder",
    )
    g.add_argument("--engine-args", metavar="JSON", help="for --local, such as '{\"tensor_parallel_size\": 8}'")
    g.add_argument("--concurrency", type=positive, metavar="N", help="most requests at the same time (8)")
    g.add_argument("--sampling", metavar="JSON", help=f"parameters of each request ('{sampling}')")
    g.add_argument("--batch", action="store_true", help="use the Batch API: cheaper, within a day, resumable")
    g.add_argument("--price-in", type=_price, metavar="X", help="price of a million prompt tokens, to show the cost")
    g.add_argument("--price-out", type=_price, metavar="Y", help="price of a million reply tokens")
    g.add_argument("--currency", type=_currency, metavar="NAME", help="currency of the prices, such as EUR")
    g.add_argument("--dry-run", action="store_true", help="count requests, tokens and cost, and ask nothing")


def _price(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use the price of a million tokens, such as 2.5")
    return number


def _currency(text: str) -> str:
    if not 1 <= len(text) <= LONGEST_CURRENCY or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(
            f"{text!r:.50} is not allowed: use up to {LONGEST_CURRENCY} printable characters, no space, such as EUR"
        )
    return text


def refuse_useless(args: argparse.Namespace, switch: str, *useless: str) -> None:
    """Refuses options that do nothing where `switch` is given."""
    given = [name for name in useless if getattr(args, switch) and getattr(args, name)]
    if given:
        raise JudgeError(f"{options(given)} has no effect with --{switch}. Leave it out.")


def make_judge(args: argparse.Namespace, cache: Path, sampling: dict[str, Any] | None = None) -> Judge:
    """The model that the options of `add_asking` name; `sampling` where they give none."""
    from trace_bench import versions

    versions.check()
    if (args.price_in is None) != (args.price_out is None):
        raise JudgeError("Give both --price-in and --price-out: the prices of a million tokens.")
    if args.currency and args.price_in is None:
        raise JudgeError("--currency needs --price-in and --price-out: give both, or leave it out.")
    refuse_useless(args, "local", "base_url", "concurrency", "batch")
    given, engine_args = json_object("--sampling", args.sampling), json_object("--engine-args", args.engine_args)
    sampling = sampling if given is None else given
    if args.local:
        from judges.local import LocalJudge

        return LocalJudge(args.model, cache=cache, sampling=sampling, engine_args=engine_args)
    if args.engine_args:
        raise JudgeError("--engine-args works only with --local. Leave it out.")
    from judges.batch import BatchClient
    from judges.client import Client

    kind = BatchClient if args.batch else Client
    base_url, concurrency = args.base_url, args.concurrency or 8
    return kind(args.model, cache=cache, base_url=base_url, sampling=sampling, concurrency=concurrency)


def print_estimate(args: argparse.Namespace, judge: Judge, requests: list[Request]) -> None:
    """Prints what a dry run found: the expected case, and the worst one."""
    from judges.judge import CHARACTERS_PER_TOKEN, TOKENS_PER_REPLY, token_limit

    guess = judge.estimate(requests)
    show(
        f"{guess.sent} requests to send to {judge.endpoint}, {guess.cached} in the cache; about "
        f"{guess.prompt_tokens:,} prompt tokens (characters / {CHARACTERS_PER_TOKEN})"
    )
    each = min(TOKENS_PER_REPLY, token_limit(judge.sampling) or TOKENS_PER_REPLY)
    expected = f"expected: about {guess.completion_tokens:,} reply tokens (a guess of {each} each)"
    show(expected + _cost(args, guess.prompt_tokens, guess.completion_tokens))
    if guess.most_completion_tokens is None:
        show(
            "worst case: there is none, since no token limit is sent, so the model or the server decides where a reply "
            "ends. To set one, use max_tokens or max_completion_tokens in --sampling"
        )
    else:
        most = f"worst case: {guess.most_completion_tokens:,} reply tokens (every reply as long as the limit sent"
        most += f", {limit:,})" if (limit := token_limit(judge.sampling)) else ")"
        show(most + _cost(args, guess.prompt_tokens, guess.most_completion_tokens))


def print_most(args: argparse.Namespace, judge: Judge, what: str, requests: list[Request]) -> None:
    """Prints what all requests cost at most that may still be sent."""
    guess = judge.estimate(requests)
    prompts, most = guess.prompt_tokens, guess.most_completion_tokens
    if most is None:
        rest = " and, since no token limit is sent, any number of reply tokens"
    else:
        rest = f" and {most:,} reply tokens{_cost(args, prompts, most)}"
    show(f"{what}: at most {guess.sent} requests, about {prompts:,} prompt tokens{rest}")


def print_usage(args: argparse.Namespace, what: str, usage: Usage) -> None:
    """Prints what was done and what it took."""
    cost = _cost(args, usage.prompt_tokens, usage.completion_tokens)
    rest = f", without {usage.uncounted} replies for which the endpoint gave no counts" if usage.uncounted else ""
    show(
        f"{what}: {usage.sent} requests sent, {usage.cached} from the cache, {usage.failed} failed; "
        f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} reply tokens{cost}{rest}"
    )


def _cost(args: argparse.Namespace, prompt_tokens: int, completion_tokens: int) -> str:
    """The cost in words; empty without prices."""
    if args.price_in is None:
        return ""
    cost = (prompt_tokens * args.price_in + completion_tokens * args.price_out) / 1e6
    return f", cost {cost:.2f}" + (f" {args.currency}" if args.currency else "")
