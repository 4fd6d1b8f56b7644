"""Loads tokenizers that encode as their files say: transformers rebuilds some from the vocabulary alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from trace_bench.engine.hub import find_file
from trace_bench.run import read_json

log = logging.getLogger(__name__)

#: Words, numbers, contractions, spaces and characters beyond ASCII, behind a word of at most `_FIRST` tokens.
_TEXT = "What is 7 + 512, didn't they say?\nAnswer: naß, 你好 (x  y).\n\n\tSo it's 1234.5… A"
_FIRST = 4


def faithful_tokenizer(model: str | Path, revision: str, **options: Any) -> Any:
    """A tokenizer, as AutoTokenizer gives it; of one that encodes otherwise than its tokenizer.json, that file's.

    AutoTokenizer trusts the `tokenizer_class` of a file even where it was of no account when it was written: a
    byte-level tokenizer of a Llama that is called LlamaTokenizerFast there would lose every space.

    Raises:
        ValueError: if there is a tokenizer.model alone, and it encodes otherwise.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **options)
    kind = type(tokenizer)
    if "__init__" not in vars(kind):  # the file is taken as it is
        return tokenizer
    if by_json := find_file(model, "tokenizer.json", revision):
        if _encodes(tokenizer, _by_json(by_json)):
            return tokenizer
        log.warning(
            "transformers loads a %s for %s, which encodes differently from its tokenizer.json: the file is used as "
            "it is.",
            *(kind.__name__, model),
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model, revision=revision, **options)
        settings = read_json(config) if (config := find_file(model, "tokenizer_config.json", revision)) else {}
        for name in ("add_bos_token", "add_eos_token"):  # LlamaTokenizerFast heeded them, whatever the file says
            if isinstance(settings.get(name), bool):
                setattr(tokenizer, name, settings[name])
        return tokenizer
    pieces = find_file(model, "tokenizer.model", revision) if kind.__name__ == "LlamaTokenizer" else None
    if pieces:
        from sentencepiece import SentencePieceProcessor

        _merge_by_score(tokenizer, pieces)
        if not _encodes(tokenizer, SentencePieceProcessor(str(pieces)).encode(_TEXT)):
            raise ValueError(
                f"transformers loads a {kind.__name__}, which encodes differently from its {pieces.name} (this file "
                "normalises texts, or is not BPE). Use a copy of the model with its author's tokenizer.json."
            )
    return tokenizer


def _encodes(tokenizer: Any, wanted: list[int]) -> bool:
    """Whether a tokenizer gives the text these ids. Its first word may differ, by `add_prefix_space`."""
    found, wanted = tokenizer(_TEXT, add_special_tokens=False).input_ids, wanted[_FIRST:]
    return found[max(len(found) - len(wanted), 0) :] == wanted


def _by_json(file: Path) -> list[int]:
    from tokenizers import Tokenizer

    as_in_file = Tokenizer.from_file(str(file))
    as_in_file.no_truncation()
    as_in_file.no_padding()
    return as_in_file.encode(_TEXT, add_special_tokens=False).ids


def _merge_by_score(tokenizer: Any, file: Path) -> None:
    """Has the pieces be merged by their scores, where transformers takes their numbers for the order.

    By those the pieces of several spaces would come first: for "x  y" LLaMA has "▁x", "▁", "▁y", and not "▁▁", "y".
    """
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

    pieces = SentencePieceExtractor(str(file)).proto.pieces
    vocab, scores = {p.piece: i for i, p in enumerate(pieces)}, {p.piece: p.score for p in pieces}
    merges = generate_merges(vocab, scores)
    tokenizer.backend_tokenizer.model = BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
