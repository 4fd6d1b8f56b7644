"""Reads a number out of an answer, in any way of writing it. The score is this project's own, not one of TRACE's."""

import math
import re

from trace_tasks.scoring import accuracy

# A model that is not trained to stop goes on with a new question of its own; `begins` is the line break before it.
# The search starts only where white space begins, so that a run of blank lines is read once, not once for each line.
NEXT_PROMPT = re.compile(
    r"(?<!\s)[^\S\n]*+(?P<begins>\n)\s*+(?:Text|Question|Choices|Hint|Solve the following|文本|对象|判断)",
    re.IGNORECASE,
)

# Full-width forms ("１２．５") and the minus sign; not NFKC, which makes 102 of "10²".
_ASCII = {0xFEE0 + code: code for code in range(ord("!"), ord("~") + 1)} | {ord("\N{MINUS SIGN}"): "-"}
# A number does not follow a letter ("CO2"), and a sign does not follow a digit: "10-5" contains 10 and 5.
_NUMBER = re.compile(
    r"(?<![A-Za-z\d)])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?!\d{0,9}[A-Z][a-z]?[(\dA-Z])",  # nor is the number of a formula one: "2Mg(OH)2"
)
# The words before the last of several numbers that make it the result: "..., so 12", "which is 2 hours".
_CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|equals?|total|is|are|was|were|makes?|gives?|gets?|needs?|have|has|left)\W+(?:\w+\W+){0,2}\Z",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"/(\d+(?:\.\d+)?)(?![\d/])")
_RESULT_MARKER = re.compile(r"\banswer\s*(?:is\b|:)|=", re.IGNORECASE)
_BETWEEN_SENTENCES = r"(?<=[.!?。])(?=\s)"
_STATED_ANSWER = re.compile(r"\banswer\s*(?:is\b|:)|\\boxed\{|####", re.IGNORECASE)
# Between two numbers: an operation without its result ("10-3"), or a wrong separator of thousands ("12,34").
_UNFINISHED = re.compile(r"\s*[-+*×/^]\s*|[,'’_]")
_SIGNED_CURRENCY = re.compile(r"(?<=[-+])[$€£¥₹]\s?(?=[\d.])")
# A line that is only a number, perhaps with a currency in front and a unit of a few words after it.
_BARE = re.compile(rf"[\s=$€£¥₹(\[\"'*]*(?:Rs\.?\s*)?{_NUMBER.pattern}(?:/\d+)?[^\S\n]*(?:[^\s\d]+[^\S\n]*){{0,3}}\Z")
#: A text of more words that does not end a sentence ("... by the number of") was cut before its answer.
_MOST_WORDS = 12
# A line that is only the number of a list's next item ("2.") ends no sentence.
_ENDED = re.compile(r"(?<!\A\d)[.!?。][\"'”’)]*\Z")

_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL.split())}
_WORD_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
# Digits and one of these words are one number: "2.5 million".
_SCALED = re.compile(rf"({_NUMBER.pattern})[^\S\n]+({'|'.join(_SCALES)})(?!\w)", re.IGNORECASE)
_NUMBER_WORD = "|".join(sorted([*_WORD_VALUES, *_SCALES], key=len, reverse=True))
_DIGIT_WORD = "|".join(_SMALL.split()[:10])
_NUMBER_WORDS = re.compile(
    rf"""(?<![\w-]) (?:(?P<minus>minus|negative)\s+)?
    (?P<words>(?:an?\s+(?=hundred|thousand|million|billion))?
        (?:{_NUMBER_WORD}) (?:(?:\s+and)?[\s-]+(?:{_NUMBER_WORD}))*+)
    (?:\s+point(?P<decimals>(?:\s+(?:{_DIGIT_WORD})(?!\w))++))? (?![\w-])""",
    re.VERBOSE | re.IGNORECASE,
)


def _in_digits(text: str) -> str:
    """Replaces English number words by digits: "twenty-three apples" -> "23 apples", "2 million" -> "2000000".

    "One" alone is more often a pronoun than a number. It stays unless it begins a line or follows "answer is".
    """

    def digits(match: re.Match[str]) -> str:
        words = re.split(r"[\s-]+", match["words"].lower())
        if len(words) > 20:  # no number
            return match[0]
        before = text[max(0, match.start() - 20) : match.start()]
        if words == ["one"] and not match["minus"] and not match["decimals"]:
            line = text[match.end() :].split("\n", 1)[0]
            begins = re.search(r"(?:\A|\n|answer\s*(?:is|:))[^\S\n]*\Z", before, re.IGNORECASE)
            if not begins or re.match(r"\s+(?:of|by|can|way|could|must)\b", line, re.IGNORECASE):
                return match[0]
        total = group = 0
        for word in words:
            if word == "hundred":
                group = max(group, 1) * 100
            elif word in _SCALES:
                total, group = total + max(group, 1) * _SCALES[word], 0
            else:
                group += _WORD_VALUES.get(word, 0)
        decimals = "".join(str(_WORD_VALUES[word]) for word in (match["decimals"] or "").lower().split())
        return f"{'-' if match['minus'] else ''}{total + group}{'.' if decimals else ''}{decimals}"

    def scaled(match: re.Match[str]) -> str:
        return f"{float(match[1].replace(',', '')) * _SCALES[match[2].lower()]:.15g}"

    return _NUMBER_WORDS.sub(digits, _SCALED.sub(scaled, text))


def number_tolerant(prediction: str, reference: str) -> float:
    r"""Form-tolerant accuracy for NumGLUE: equal numbers, in any way of writing them, or equal words.

    If the reference contains a number, one number is read from the prediction and one from the reference. They must
    agree within a relative 1e-6 (absolute 1e-9 near zero). Thousands commas, currency signs, percent signs, units,
    exponents and trailing full stops do not matter. A percent sign does not divide by 100. "27/2" is 13.5. English
    number words are read ("twenty-three", "2.5 million"). Digits right after a letter ("CO2") are no number, nor is an
    operation without its result ("10-3"). The text is read only up to a new question ("Question: ..."). The number is

    1. the one in the first line that is not empty, if this line is a number with a unit of at most three words. If a
       later "answer is" says a different number, there is none;
    2. otherwise the first one after the last "answer is", "answer:", "####" or "\boxed{" with a number in its line;
    3. otherwise one in the last sentence with a number: the first one after its last "=", or its only one, or the
       last one if it follows "so", "is", "are", "total" and the like. A text of more than 12 words that does not end a
       sentence was cut within its reasoning, and has none.

    If the reference is a word ("August"), the first line of the prediction that is not empty must equal it, or the part
    of this line after the last marker if this part is not empty. Case, repeated white space and punctuation around the
    word are ignored.

    Strictly equal strings always count as right, so this score is never below `accuracy`.
    """
    if accuracy(prediction, reference):
        return 1.0
    expected = read_number(reference)
    if expected is None:
        word = _read_word(reference)
        return float(word != "" and _read_word(prediction) == word)
    value = read_number(prediction)
    return float(value is not None and _is_close(value, expected))


def _is_close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)


def names_number(text: str, answer: str) -> bool:
    """Whether `text` contains the number `answer`, in any way of writing it, or the word `answer` in either case."""
    expected = read_number(answer)
    if expected is None:
        word = re.escape(_read_word(answer))
        return re.search(rf"(?<!\w){word}(?!\w)", " ".join(text.split()).casefold()) is not None
    return any(_is_close(float(number.replace(",", "")), expected) for number in _NUMBER.findall(text))


def read_number(text: str) -> float | None:
    """Reads a number by the rules of `number_tolerant`. None if there is none, or it overflows a float."""
    text = _SIGNED_CURRENCY.sub("", text.translate(_ASCII))
    if found := NEXT_PROMPT.search(text.lstrip()):
        text = text.lstrip()[: found.start("begins")]
    text = _in_digits(re.sub(r"\d{1,2}:\d\d(?:[:.]\d+)?", " ", text))  # a time of day is no number
    lines = [line for line in text.splitlines() if line.strip()]
    stated: list[float | None] = []
    for line in lines:
        for end in [match.end() for match in _STATED_ANSWER.finditer(line)][-1:]:
            sentence = re.split(_BETWEEN_SENTENCES, line[end:])[0]
            # "The answer is 2 + 2 = 4."
            if number := _NUMBER.search(sentence, sentence.rfind("=") + 1) or _NUMBER.search(sentence):
                stated.append(_value(sentence, number))
    if lines and len(lines[0]) < 200 and _BARE.match(lines[0].rstrip(" .)]\"'*")):
        first = _NUMBER.search(lines[0])
        value = _value(lines[0], first) if first else None
        return value if not stated or stated[-1] == value else None
    if stated:
        return stated[-1]
    if len(text.split()) > _MOST_WORDS and not _ENDED.search(lines[-1].rstrip()):
        return None
    sentences = (sentence for line in lines for sentence in re.split(_BETWEEN_SENTENCES, line))
    last = next((sentence for sentence in reversed(list(sentences)) if _NUMBER.search(sentence)), "")
    return _concluded(last)


def _concluded(sentence: str) -> float | None:
    """The number that a sentence concludes with, by rule 3 of `number_tolerant`."""
    numbers = list(_NUMBER.finditer(sentence))
    equals = sentence.rfind("=") + 1
    if not numbers:
        return None
    if equals and (marked := _NUMBER.search(sentence, equals)):
        return _value(sentence, marked)
    before = sentence[numbers[-2].end() if len(numbers) > 1 else 0 : numbers[-1].start()]
    if re.search(r"[*×+/^]\s*\Z", before) or (len(numbers) > 1 and _UNFINISHED.fullmatch(before)):
        return None
    several = len({number[0] for number in numbers}) > 1 and re.search(r"[^\W\d_]", sentence)
    return _value(sentence, numbers[-1]) if not several or _CONCLUDES.search(before[-80:]) else None


def _value(text: str, number: re.Match[str]) -> float | None:
    """The value of a number found in a text, after a division as in "27/2". None if it overflows a float."""
    value = float(number[0].replace(",", ""))
    if (fraction := _FRACTION.match(text, number.end())) and float(fraction[1]):
        value /= float(fraction[1])
    return value if math.isfinite(value) else None


def _read_word(text: str) -> str:
    """Reads the word that `number_tolerant` compares. Empty if there is none."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    ends = [match.end() for match in _RESULT_MARKER.finditer(line)]
    for part in (line[ends[-1] :] if ends else "", line):
        if word := re.search(r"[^\W_](?:.*[^\W_])?", " ".join(part.split())):
            return word[0].casefold()
    return ""
