"""TRACE's scores of one example, as pure functions of strings.

TRACE (arXiv 2310.06762) scores its tasks with strict accuracy, ROUGE-L, BLEU, a string similarity and SARI.
The functions here give the numbers of the official evaluation code (https://github.com/BeyonderXX/TRACE,
`metrics.py` and `evaluations/`) for one example. lm-evaluation-harness averages them: the score of a task is the
mean over all its examples, including those with an empty prediction. The form-tolerant accuracies are in
`answers.py`.

The first argument is the model's answer, the second the expected answer. Every score is a fraction in [0, 1]; the
official code prints similarity and SARI times 100. No function raises on any string; `bleu` refuses an order below 1.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache
from string import punctuation

_NO_PUNCTUATION = str.maketrans("", "", punctuation)

# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy(prediction: str, reference: str) -> float:
    """Strict accuracy: 1.0 if the two strings are equal, character by character.

    Nothing is stripped, so "A " is wrong if "A" is expected. An empty string is never right, not even
    if the reference is empty.

    Source: `caculate_accuracy` in the official `metrics.py`.
    """
    return float(prediction != "" and prediction == reference)


def label_accuracy(prediction: str, reference: str) -> float:
    """O-LoRA's exact match for CL_Benchmark: equal words, ignoring case, punctuation and white space.

    Only the part of the prediction after its last "Answer:" counts, as in O-LoRA's code for decoder models. ASCII
    punctuation is deleted, not replaced by a space. A reference that is only punctuation, such as the "-" in 131 of
    MNLI's test rows, equals an empty answer.

    Source: `skip_instructions` in `src/uie_trainer_lora.py` and `exact_match_score` in `src/compute_metrics.py` of
    https://github.com/cmnfriend/O-LoRA.
    """
    return float(_bare_words(prediction.rpartition("Answer:")[2]) == _bare_words(reference))


def _bare_words(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()


# --- overlap of texts ---------------------------------------------------------------------------------------


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L as PyPI's `rouge` 1.0.1 computes it: the F of the sentence-level union LCS, on sets of words.

    Sentences are split at every ".", words at white space. For each pair of a sentence of the prediction and one of
    the reference, the words of one longest common subsequence (LCS) are collected. Let U be the set of all words
    collected, and P and R the sets of words of the two texts. Then precision = |U| / |P|, recall = |U| / |R| and

        F = 2 * precision * recall / (precision + recall + 1e-8)

    so identical texts get 0.999999995. Repeated words count once. Case and other punctuation matter.
    If there are several longest subsequences, the package's choice is taken. It depends on the order of the two
    texts, and the official code passes them in the opposite order of the package's names. As in the package, a
    sentence of only white space has one empty word.

    Returns:
        F in [0, 1); 0.0 if either text is empty or only full stops (the package raises on the latter). Sentences of
        any length are scored; the package recurses and fails on sentences of about 1000 words.

    Source: `rouge_l_summary_level` of PyPI's `rouge` 1.0.1, called by `caculate_rouge` in the official
    `metrics.py`.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    predicted_words = {word for sentence in predicted for word in sentence}
    expected_words = {word for sentence in expected for word in sentence}

    # A pair of sentences matters only if it shares a word that is not collected yet. Skipping the other pairs
    # does not change the union, and saves nearly all pairs in a text of many sentences.
    sentences_with = defaultdict(set)
    for index, sentence in enumerate(expected):
        for word in sentence:
            sentences_with[word].add(index)
    union: set[str] = set()
    for sentence in predicted:
        missing = (set(sentence) & expected_words) - union
        candidates = {index for word in missing for index in sentences_with[word]}
        for index in sorted(candidates):
            if not missing.isdisjoint(expected[index]):
                found = _lcs_words(sentence, expected[index])
                union |= found
                missing -= found

    precision, recall = len(union) / len(predicted_words), len(union) / len(expected_words)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[tuple[str, ...]]:
    """Splits `text` into its different sentences of words, in order, as PyPI's `rouge` does."""
    sentences = (tuple(part.split()) or ("",) for part in text.split(".") if part)
    return list(dict.fromkeys(sentences))  # a repeated sentence adds nothing to a union


def _lcs_words(x: tuple[str, ...], y: tuple[str, ...]) -> set[str]:
    """Collects the words of the longest common subsequence of `x` and `y` that PyPI's `rouge` would choose.

    T[i, j] is the LCS length of the first i words of `x` and the first j words of `y`. Row i of this table is kept as
    one integer: its bit j - 1 is 0 if T[i, j] = T[i, j - 1] + 1. Each row follows from the one before in a few
    operations (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004). These bits are enough to walk back:
    where the two words differ, T[i - 1, j] > T[i, j - 1] holds exactly if bit j - 1 of row i is 0.
    """
    positions: defaultdict[str, int] = defaultdict(int)
    for j, word in enumerate(y):
        positions[word] |= 1 << j
    full = (1 << len(y)) - 1
    row = full
    rows = []
    for word in x:
        matches = row & positions[word]
        row = ((row + matches) | (row - matches)) & full
        rows.append(row)

    words = set()
    i, j = len(x) - 1, len(y) - 1
    while i >= 0 and j >= 0:
        if x[i] == y[j]:
            words.add(x[i])
            i, j = i - 1, j - 1
        elif rows[i] >> j & 1:
            j -= 1
        else:
            i -= 1
    return words


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def bleu(prediction: str, reference: str, n: int) -> float:
    """Sentence BLEU against one reference, uniform weights on 1- to n-grams, no smoothing.

    Texts are split into tokens at white space and full stops; case and other punctuation matter. The score
    is the geometric mean of the n clipped precisions times the brevity penalty, which is exp(1 - r / p), or 1 if
    the prediction's number of tokens p exceeds the reference's r.

    If an order has no match, the score is 0.0. nltk replaces this precision by the smallest positive float (and
    prints a warning); for n up to 4 its score is then below 1e-76, so the two agree. Texts of fewer than n tokens
    score 0 for the same reason, even if they are identical.

    Raises:
        ValueError: `n` is below 1.

    Source: nltk's `sentence_bleu`, called by `caculate_bleu` in the official `metrics.py`.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    predicted, expected = prediction.replace(".", " ").split(), reference.replace(".", " ").split()
    log_precisions = 0.0
    for order in range(1, n + 1):
        matches = (_ngrams(predicted, order) & _ngrams(expected, order)).total()
        if matches == 0:
            return 0.0
        log_precisions += math.log(matches / (len(predicted) - order + 1))
    log_brevity = min(0.0, 1 - len(expected) / len(predicted))
    return math.exp(log_brevity + log_precisions / n)


def similarity(prediction: str, reference: str) -> float:
    """Py150 similarity: the character ratio of difflib on cleaned code, rounded to a whole percent.

    The clean-up undoes the placeholders of Py150: <NUM_LIT> becomes 0, <STR_LIT> and <CHAR_LIT> nothing, and
    <STR_LIT:x>, <NUM_LIT:x> and <CHAR_LIT:x> become x. The ratio is fuzzywuzzy's `fuzz.ratio` without
    python-Levenshtein. With python-Levenshtein or rapidfuzz the numbers differ by about a point. difflib
    ignores frequent characters in references of 200 characters and more, and its ratio depends on the order
    of the arguments.

    Returns:
        A multiple of 0.01 in [0, 1]; 0.0 if either text is empty after the clean-up.

    Source: `evaluations/eval_Py150.py` and `caculate_fuzz` in `metrics.py` of the official code.
    """
    predicted, expected = _undo_placeholders(prediction), _undo_placeholders(reference)
    if not predicted or not expected:
        return 0.0
    if predicted == expected:
        return 1.0
    if 400 * min(len(predicted), len(expected)) < len(predicted) + len(expected):
        return 0.0  # the ratio is below half a percent, and difflib would take minutes
    return round(100 * SequenceMatcher(None, predicted, expected).ratio()) / 100


def _undo_placeholders(code: str) -> str:
    """Replaces Py150's placeholders of literals by plain text."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    # As in the official code, all matches are found first, and then each is replaced everywhere. For nested
    # placeholders one re.sub would give something else.
    # No match ends after the last ">". Without the cut, each open placeholder there would search for its end again.
    for match in list(re.finditer(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", code[: code.rfind(">") + 1], re.DOTALL)):
        code = code.replace(match[0], match[1])
    return code


def sari(source: str, prediction: str, reference: str) -> float:
    """SARI of one simplification against one reference, in the variant of Hugging Face's `evaluate`.

    All three texts are lower-cased, then tokenized by sacrebleu's 13a. For n = 1 to 4, s, p and r are the counted
    n-grams of source, prediction and reference; & and - are intersection and difference of counts:

        keep    F1 of  precision = mean of (s & p & r) / (s & p) over the distinct n-grams of s & p  and
                       recall = sum of (s & p & r) / sum of (s & r)
        delete  precision = mean of (s - p - r) / (s - p) over the distinct n-grams of s - p
        add     F1 of precision and recall of the distinct n-grams of p that are not in s, against those of r

    SARI is the mean of the three parts, each averaged over n. 0/0 counts as 1. A prediction equal to its
    reference scores 1 unless it keeps some, but not all, of the occurrences of an n-gram that the source
    repeats. An empty text is one empty token; so an empty prediction usually scores above 0, as in the official code.

    EASSE's `corpus_sari` differs from this by 3 to 6 points on 20Minuten. It pools the n-gram counts of the corpus
    instead of averaging examples, averages precision and recall over n before it takes F1, uses F1 for deletions,
    weights kept and deleted n-grams by their counts, counts 0/0 as 0, and lower-cases only if told to.

    For TRACE's 20Minuten the source is the whole prompt.

    Source: Xu et al. 2016 (https://aclanthology.org/Q16-1029), `metrics/sari/sari.py` of
    huggingface/evaluate.
    """
    # An empty text gives one empty token, as the official code's split(" ") does.
    tokens = [_tokenizer_13a()(text.lower()).split(" ") for text in (source, prediction, reference)]
    total = 0.0
    for n in range(1, 5):
        original, predicted, expected = (_ngrams(text, n) for text in tokens)

        kept, to_keep = original & predicted, original & expected
        well_kept = kept & expected
        keep_precision = _ratio(sum(count / kept[gram] for gram, count in well_kept.items()), len(kept))
        keep = _f1(keep_precision, _ratio(well_kept.total(), to_keep.total()))

        deleted = original - predicted
        well_deleted = deleted - expected
        delete = _ratio(sum(count / deleted[gram] for gram, count in well_deleted.items()), len(deleted))

        added, to_add = predicted.keys() - original.keys(), expected.keys() - original.keys()
        well_added = len(added & to_add)
        add = _f1(_ratio(well_added, len(added)), _ratio(well_added, len(to_add)))

        total += (keep + delete + add) / 3
    return total / 4


def _ratio(part: float, whole: float) -> float:
    """Divides, where 0/0 = 1 as `sari` defines it."""
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@cache
def _tokenizer_13a() -> Callable[[str], str]:
    # Imported late: it is slow to load and only SARI needs it.
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


# --- reading answers ----------------------------------------------------------------------------------------


def scienceqa_parts(text: str) -> tuple[str, str]:
    r"""Splits a ScienceQA answer such as "B\nBecause ..." into the choice and the reasoning.

    Returns:
        The first character, for `accuracy`, and the text from the third character on, for `bleu` and
        `rouge_l`. Either is empty if the text is too short (the official code fails on an empty prediction).

    Source: `evaluations/eval_ScienceQA.py` of the official code.
    """
    return text[:1], text[2:]
