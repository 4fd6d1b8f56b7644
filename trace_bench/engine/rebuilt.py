"""Tokenizers that encode as their tokenizer.json says: transformers builds some anew, from the vocabulary alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_bench.engine.hub import hub_file

#: Words, numbers, contractions, spaces and characters beyond ASCII, behind a word of at most `_FIRST` tokens.
_TEXT = "What is 7 + 512, didn't they say?\nAnswer: naß, 你好 (x  y).\n\n\tSo it's 1234.5; A"
_FIRST = 4


class FaithfulTokenizer:
    """AutoTokenizer, which trusts the `tokenizer_class` of a file even where it was of no account when it was written.

    The byte-level tokenizers of DeepSeek's first Llamas would lose every space.
    """

    @staticmethod
    def from_pretrained(model: str | Path, revision: str, **options: Any) -> Any:
        """A tokenizer, as AutoTokenizer gives it.

        Raises:
            ValueError: if it encodes otherwise than its file, naming the class. The first word may differ, by
                `add_prefix_space`.
        """
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **options)
        if "__init__" not in vars(type(tokenizer)):  # the file is taken as it is
            return tokenizer
        file = Path(model) / "tokenizer.json"
        if not Path(model).is_dir():
            try:
                file = hub_file(str(model), file.name, revision)
            except OSError:  # there is none
                return tokenizer
        if not file.is_file():
            return tokenizer
        as_in_file = Tokenizer.from_file(str(file))
        as_in_file.no_truncation()
        as_in_file.no_padding()
        wanted = as_in_file.encode(_TEXT, add_special_tokens=False).ids[_FIRST:]
        found = tokenizer(_TEXT, add_special_tokens=False).input_ids
        if found[max(len(found) - len(wanted), 0) :] != wanted:
            raise ValueError(
                f"transformers makes a {type(tokenizer).__name__} of it, which encodes otherwise than its "
                "tokenizer.json. Set tokenizer_class to PreTrainedTokenizerFast in its tokenizer_config.json (of a "
                "hub's model in a local copy): then the file is taken as it is."
            )
        return tokenizer
