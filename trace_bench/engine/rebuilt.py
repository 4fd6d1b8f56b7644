"""Tokenizers that encode as their files say: transformers builds some anew, from the vocabulary alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_bench.engine.hub import hub_file

#: Words, numbers, contractions, spaces and characters beyond ASCII, behind a word of at most `_FIRST` tokens.
_TEXT = "What is 7 + 512, didn't they say?\nAnswer: naß, 你好 (x  y).\n\n\tSo it's 1234.5… A"
_FIRST = 4


class FaithfulTokenizer:
    """AutoTokenizer, which trusts the `tokenizer_class` of a file even where it was of no account when it was written.

    A byte-level tokenizer of a Llama that is called LlamaTokenizerFast there would lose every space.
    """

    @staticmethod
    def from_pretrained(model: str | Path, revision: str, **options: Any) -> Any:
        """A tokenizer, as AutoTokenizer gives it.

        Raises:
            ValueError: if it encodes otherwise than its file, naming the class. The first word may differ, by
                `add_prefix_space`.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **options)
        kind = type(tokenizer)
        if "__init__" not in vars(kind):  # the file is taken as it is
            return tokenizer
        found = tokenizer(_TEXT, add_special_tokens=False).input_ids
        failure = f"transformers makes a {kind.__name__} of it, which encodes otherwise than its"
        by_json, pieces = _file(model, "tokenizer.json", revision), None
        if by_json is None and kind.__name__ == "LlamaTokenizer":
            pieces = _file(model, "tokenizer.model", revision)
        if by_json and not _ends_with(found, _by_json(by_json)):
            raise ValueError(
                f"{failure} {by_json.name}. Set tokenizer_class to PreTrainedTokenizerFast in its "
                "tokenizer_config.json (of a hub's model in a local copy): then the file is taken as it is."
            )
        if pieces and not _ends_with(found, _by_pieces(pieces)):
            raise ValueError(
                f"{failure} {pieces.name}, which normalises texts or is no BPE. Take a copy of the model with the "
                "tokenizer.json of who made it."
            )
        return tokenizer


def _file(model: str | Path, name: str, revision: str) -> Path | None:
    """A file of a tokenizer in a local folder or on the hub; None where it has none."""
    if Path(model).is_dir():
        file = Path(model) / name
        return file if file.is_file() else None
    try:
        return hub_file(str(model), name, revision)
    except OSError:
        return None


def _ends_with(found: list[int], wanted: list[int]) -> bool:
    wanted = wanted[_FIRST:]
    return found[max(len(found) - len(wanted), 0) :] == wanted


def _by_json(file: Path) -> list[int]:
    from tokenizers import Tokenizer

    as_in_file = Tokenizer.from_file(str(file))
    as_in_file.no_truncation()
    as_in_file.no_padding()
    return as_in_file.encode(_TEXT, add_special_tokens=False).ids


def _by_pieces(file: Path) -> list[int]:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(str(file)).encode(_TEXT)
