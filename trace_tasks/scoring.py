"""Scores of one example: what TRACE measures, as pure functions of strings.

TRACE (arXiv 2310.06762) scores its tasks with strict accuracy, ROUGE-L, BLEU, a string similarity and SARI.
The functions here give the numbers of the official evaluation code (https://github.com/BeyonderXX/TRACE,
`metrics.py` and `evaluations/`) for a single example, so that lm-evaluation-harness can average them: the
score of a task is the mean over all its examples, empty predictions included. Two form-tolerant accuracies
are added, because strict equality cannot tell a model that forgot the answer from one that changed how it
writes the answer.

Every score is a fraction in [0, 1]; the official code prints similarity and SARI times 100. No function raises on
any string; `bleu` refuses an order below 1, and `extract_answer` a form it does not know.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache

# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy(prediction: str, reference: str) -> float:
    """Strict accuracy: the two strings are equal, character by character.

    Nothing is stripped, so "A " is wrong where "A" is expected. An empty string is never right, not even
    against an empty reference.

    Args:
        prediction: What the model wrote.
        reference: The expected answer.

    Returns:
        1.0 or 0.0.

    Source: `caculate_accuracy` in the official `metrics.py`.
    """
    return float(prediction != "" and prediction == reference)


# The labels that occur in TRACE: C-STANCE and FOMC use A-C, ScienceQA up to E. More letters would only add
# false hits.
_LABEL = "[A-Ea-e]"
_OPENING = r"[\s(\[{<\"'“‘【「《#]"
# What may follow a letter that is a label. All alternatives are there to keep apart labels and words: the
# article "A", "A's", "A-shares", "A.I.", "A股" (a share), "B站" (a site), "B.1.1.7" must not count.
_LABEL_END = r"""(?=
      ["”)\]}>】」》]                               # a closing quote or bracket
    | ['’](?![A-Za-z])                            # the same, but not the genitive
    | [.,:;!、。](?!\d|[A-Za-z](?![A-Za-z]))        # punctuation, but not inside an abbreviation or a version
    | [^\S\n]*(?:\n|\Z)                           # the end of the line
    | [^\S\n]+(?:[-–—]|(?:is|because|since)\b)    # "A - ...", "A because ...": no article stands there
    | [^\S\n]+(?=[\u3400-\u9fff])                 # "A 支持": nor before Chinese
    | (?<=[B-E])[^\S\n]+                          # "B hawkish": upper-case letters that are no English word
)"""
_LEADING_LABEL = re.compile(rf"{_OPENING}*+(?P<label>{_LABEL}){_LABEL_END}", re.VERBOSE)
_ANSWER_MARKER = r"(?:(?<![A-Za-z])(?i:answer|stance)(?![A-Za-z])|答案|回答|态度|立场)"
_OPTION_MARKER = r"(?:(?<![A-Za-z])(?i:choice|option)(?![A-Za-z])|选项|选择|选)"
_MARKER_LINK = r"[\s:=]*+(?:(?i:is|was)(?![A-Za-z])|应该是|应是|应为|是|为)?[\s:=]*+"
# Two patterns, the stronger first: reasoning often names options ("Option A is ...") before it answers.
_MARKED_LABELS = [
    re.compile(
        rf"""{marker}{_MARKER_LINK} (?:{_OPTION_MARKER}{_MARKER_LINK}){{0,9}}+
        {_OPENING}*+ (?P<label>{_LABEL}){_LABEL_END}""",
        re.VERBOSE,
    )
    for marker in (_ANSWER_MARKER, _OPTION_MARKER)
]
_END_OF_LINE = re.compile(r"[^\S\n]*+(?:\n|\Z)")
_RIVAL_LABEL = re.compile(
    rf"""[\s)\].,;/、]*+ (?:(?i:or|and)\b|或者?|和)? [\s(\[]*+ (?P<label>{_LABEL})
    (?= \s* (?: \Z | [.,:;)\]/、。] | (?:or|and)\b | [或和] ) )""",
    re.VERBOSE,
)


# The options of a prompt: a list by lines behind "Choices:" (ScienceQA), or one within the first line (C-STANCE, FOMC).
_CHOICES = re.compile(r"\bchoices:[^\S\n]*\n", re.IGNORECASE)
_LISTED_OPTION = re.compile(r"^[^\S\n]*([A-Z])[.)][^\S\n]*(\S.*)$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?<![A-Za-z])([A-Z])[.)][^\S\n]*([^,;.\n。]+)")
# A shorter text ("no", "2") stands in sentences that are about something else.
_LONG_ENOUGH = re.compile(r"[A-Za-z]{4}|[\u3400-\u9fff]{2}")
# What takes an option back: not only "not dovish", but also "less dovish than" and "不支持".
_TAKEN_BACK = re.compile(
    r"""(?:\b(?:not|no|never|non|neither|nor|cannot|without|less|than|instead\ of|rather\ than|either|or|if|whether)\b
    |n['’]t\b|[不没非未否或])[\s\w'’"-]{0,20}\Z""",
    re.VERBOSE | re.IGNORECASE,
)
# Models that are not trained to stop go on with another question of their own.
_NEXT_PROMPT = re.compile(r"\n\s*(?:Text|Question|Choices|Hint|Solve the following|文本|对象|判断)", re.IGNORECASE)
# Not behind a label ("A.支持").
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z]\.)(?<=[.!?])(?=\s|\Z)|(?<=[。！？])|\n")
_LABEL_ALONE = re.compile(rf"^[^\S\n]*({_LABEL})[.)]?[^\S\n]*$", re.MULTILINE)
_STATED_OPTION = re.compile(
    r"^[^\S\n]*(?:the|my) (?:correct )?(?:answer|stance) is ([^.\n]*)", re.MULTILINE | re.IGNORECASE
)
_LIST_OF_OPTIONS = re.compile(
    r"(?:\A|(?<=\n))[^\S\n]*[A-E][.):][^\n]*(?:\n\s*[A-E][.):][^\n]*)+|[A-E][.):][^\n]{0,80}?[,;.，；、。][^\S\n]*[B-E][.):][^\n]*"
)


def options_of(prompt: str) -> dict[str, str]:
    """The options that a prompt offers: upper-case letter -> text. Empty where it lists fewer than two from A on.

    They are the lines below the last "Choices:" (ScienceQA), or a list in the first line of the prompt that has one
    ("A. dovish, B. hawkish, C. neutral." of FOMC, "A.支持，B.反对，C.中立。" of C-STANCE).
    """
    prompt = nfkc(prompt)
    if found := list(_CHOICES.finditer(prompt)):
        block = prompt[found[-1].end() :].split("\n\n", 1)[0]
        listed = _LISTED_OPTION.findall(block)
    else:
        listed = next((o for line in prompt.split("\n") if len(o := _INLINE_OPTION.findall(line)) > 1), [])
    options: dict[str, str] = {}
    for letter, text in listed:
        if letter != chr(ord("A") + len(options)):
            break
        options[letter] = text.strip()
    return options if len(options) > 1 else {}


def choice_tolerant(prediction: str, reference: str, prompt: str = "") -> float:
    """Form-tolerant accuracy for answers that are the letter of an option, A to E in either case.

    The letter is extracted from both strings by this rule; the score is 1.0 where both give the same one.
    Strictly equal strings count as right whatever they are, so this score is never below `accuracy`.

    1. Full-width characters are made ASCII (NFKC); asterisks and backticks (Markdown) are dropped.
    2. A *label* is a single letter followed by: a closing quote or bracket; one of `.,:;!、。` (not inside
       "A.I." or "B.1"); the end of its line; a space and a dash, "is", "because", "since" or Chinese; or, for
       an upper-case B to E, a space and anything. So "A monetary policy ..." has no label: "A" is an article
       there.
    3. A label at the start of the text, after any white space, opening brackets, opening quotes and "#",
       decides, unless a label after "answer", "stance" or their Chinese words (rule 4) is another one.
    4. Otherwise a label right after a marker does, wherever it stands: "answer", "stance", 答案, 回答, 态度,
       立场, or, only where none of these has a label, "choice", "option", 选项, 选择, 选. Between marker and
       label may stand "is", "was", 是, 为, 应为, 应是 or 应该是, a marker of the second kind ("the answer is
       option B"), colons, equals signs, white space, "#", opening brackets and quotes.
    5. A label is ambiguous where another one follows it on the same line, joined only by punctuation, "or",
       "and", 或, 或者 or 和 ("B or C"), or where the next option is listed after it, on its line or at the
       start of the next line ("A. dovish, B. hawkish"). An ambiguous label at the start is passed over, and
       rule 4 is tried.
    6. Several marked labels of one kind must agree, and none may be ambiguous; otherwise there is no letter.
    7. A text without a label names an option by its text in the prompt (`options_of`), in either case: "dovish", "The
       stance is dovish.", "作者持支持态度". The first sentence (or line) that names any option decides, and must name
       just one; lists of the options are passed over. What stands behind "not", "less", "or", 不 and the like names
       none; nor do texts of less than four letters or two Chinese characters ("no", "2"), unless the sentence is
       nothing else or begins with it and a comma.
    8. A label with the text of another option behind it ("A. hawkish", where A is dovish) is no answer.

    Args:
        prediction: What the model wrote.
        reference: The expected answer, usually the bare letter.
        prompt: The question, which lists the options; without it rules 7 and 8 read nothing.

    Returns:
        1.0 or 0.0; 0.0 where no letter, or no single one, can be extracted.

    Source: this project; TRACE has no such score.
    """
    if accuracy(prediction, reference):
        return 1.0
    expected = _choice(reference)
    return float(expected is not None and read_choice(prediction, prompt) == expected)


def read_choice(text: str, prompt: str = "") -> str | None:
    """The upper-case letter of the option that a text chooses by the rule of `choice_tolerant`, or None."""
    options = {letter: _plain(option) for letter, option in options_of(prompt).items()}
    return _choice(text, options)


def _plain(text: str) -> str:
    """A text for comparing: one form of each character, one case, single spaces, no full stop at the end."""
    return " ".join(nfkc(text).replace("’", "'").split()).casefold().rstrip(" .")


def _choice(text: str, options: dict[str, str] | None = None) -> str | None:
    options = options or {}
    text = nfkc(text).translate({ord("*"): None, ord("`"): None})
    if (leading := _LEADING_LABEL.match(text)) and not _is_ambiguous(text, [leading]):
        letter = leading["label"].upper()
        own = text[: found.start()] if (found := _NEXT_PROMPT.search(text, leading.end())) else text
        others = {match["label"].upper() for match in _MARKED_LABELS[0].finditer(own, leading.end("label"))}
        others |= {label.upper() for label in _LABEL_ALONE.findall(own)}
        others |= {_named_option(sentence, options) or letter for sentence in _STATED_OPTION.findall(own)}
        return None if others - {letter} or _is_contradicted(text, leading, options) else letter
    for pattern in _MARKED_LABELS:
        if marked := list(pattern.finditer(text)):
            labels = {match["label"].upper() for match in marked}
            if len(labels) == 1 and not _is_ambiguous(text, marked):
                return labels.pop() if not any(_is_contradicted(text, m, options) for m in marked) else None
            return None
    return _named_option(text, options)


def _is_contradicted(text: str, label: re.Match[str], options: dict[str, str]) -> bool:
    """Whether the text behind a label is that of another option."""
    end = text.find("\n", label.end("label"))
    behind = _plain(text[label.end("label") : len(text) if end < 0 else end][:1000]).lstrip(" .):,;、。-–—\"'”’")
    own = options.get(label["label"].upper(), "")
    return not (own and behind.startswith(own)) and behind != "" and behind in options.values()


def _named_option(text: str, options: dict[str, str]) -> str | None:
    """The letter of the one option that the first sentence with any names by its text; see `choice_tolerant`."""
    if not options:
        return None
    text = _LIST_OF_OPTIONS.sub("\n", text)
    # The longest first, so that "the Bible" is not read out of "the Bible of 1611".
    letters = {option: letter for letter, option in options.items() if [*options.values()].count(option) == 1}
    if not letters:
        return None
    names = re.compile("|".join(map(re.escape, sorted(letters, key=len, reverse=True))))
    start = 0
    for end in [*(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]:
        if not text[start:end].strip():
            start = end
            continue
        sentence, start = _plain(text[start:end][:2000]).strip("\"'“”‘’()[]-:,;!。 "), end
        named = set()
        for match in names.finditer(sentence):
            before, behind = sentence[: match.start()], sentence[match.end() :]
            if re.search(r"[a-z\d]\Z", before[-1:] + "\0" if not match[0][:1].isalnum() else before[-1:]):
                continue
            if match[0][-1:].isascii() and match[0][-1:].isalnum() and re.match(r"[a-z\d]", behind):
                continue
            alone = not before and (not behind or behind[0] in ",;:-")
            if alone or (_LONG_ENOUGH.search(match[0]) and not _TAKEN_BACK.search(before[-40:])):
                named.add(letters[match[0]])
            elif _LONG_ENOUGH.search(match[0]):
                named.add("")  # taken back: the sentence is about it, but chooses nothing
        if named - {""}:
            return named.pop() if len(named) == 1 else None
    return None


def nfkc(text: str, piece: int = 4000) -> str:
    """Unicode's NFKC form, of long texts piece by piece.

    Python orders a run of combining marks in quadratic time: half a minute for 200,000 of them.
    """
    return "".join(unicodedata.normalize("NFKC", text[i : i + piece]) for i in range(0, len(text), piece))


def _is_ambiguous(text: str, matches: list[re.Match[str]]) -> bool:
    """Whether one of the labels found, all the same, stands beside another one or opens a list of the options."""
    label = matches[0]["label"].upper()
    following = chr(ord(label) + 1)
    option = rf"[{following}{following.lower()}][.):](?:\s+\w|\w\w)"
    end = -1
    for match in matches:
        start = match.end("label")
        if _END_OF_LINE.match(text, start):  # alone on its line: below comes an explanation or the next prompt, no list
            continue
        if re.compile(r"\s*[、,]\s*\Z").match(text, start):  # cut within a list
            return True
        first = start > end  # of its line: what is listed behind another one is listed behind it too
        if first:
            end = len(text) if (found := text.find("\n", start)) < 0 else found
        if (rival := _RIVAL_LABEL.match(text, start, end)) and rival["label"].upper() != label:
            return True
        if first and (
            re.compile(rf"(?<![A-Za-z.]){option}").search(text, start, end)
            or re.compile(rf"\s*{option}").match(text, end + 1)
        ):
            return True
    return False


def names_choice(text: str, letter: str) -> bool:
    """Whether `letter` stands anywhere in `text` as a label by rule 2 of `choice_tolerant`, not as a word."""
    text = nfkc(text).translate({ord("*"): None, ord("`"): None})
    return re.search(rf"(?<![A-Za-z\d])(?:{letter}){_LABEL_END}", text, re.VERBOSE) is not None


# Not after a letter ("CO2"), and no sign after a digit: "10-5" holds 10 and 5. "27/2" is one number, a date is none.
_NUMBER = re.compile(
    r"(?<![A-Za-z\d)])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?!\d{0,9}[A-Z][a-z]?[(\dA-Z])",  # nor one of a formula: "2Mg(OH)2"
)
# What stands before the last of several numbers where it is the result: "..., so 12", "which is 2 hours".
_CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|equals?|total|is|are|was|were|makes?|gives?|gets?|needs?|have|has|left)\W+(?:\w+\W+){0,2}\Z",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"/(\d+(?:\.\d+)?)(?![\d/])")
_RESULT_MARKER = re.compile(r"\banswer\s*(?:is\b|:)|=", re.IGNORECASE)
_STATED_ANSWER = re.compile(r"\banswer\s*(?:is\b|:)|\\boxed\{|####", re.IGNORECASE)
_SIGNED_CURRENCY = re.compile(r"(?<=[-+])[$€£¥₹]\s?(?=[\d.])")
# A line that is nothing but a number, with a currency in front and a unit of a few words behind.
_BARE = re.compile(rf"[\s=$€£¥₹(\[\"'*]*(?:Rs\.?\s*)?{_NUMBER.pattern}(?:/\d+)?[^\S\n]*(?:[^\s\d]+[^\S\n]*){{0,3}}\Z")
#: A text of more words without an end ("... by the number of") was cut before it came to its answer.
_MOST_WORDS = 12
# The number of a list's next item ("2.") ends no sentence.
_ENDED = re.compile(r"(?<!\A\d)[.!?。][\"'”’)]*\Z")

_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL.split())}
_WORD_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
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
    """The text with spelled-out English numbers in digits: "twenty-three apples" -> "23 apples".

    "One" by itself is a pronoun more often than a number, and stays unless it begins a line or follows "answer is".
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

    return _NUMBER_WORDS.sub(digits, text)


def number_tolerant(prediction: str, reference: str) -> float:
    r"""Form-tolerant accuracy for NumGLUE: equal numbers, however they are written, or equal words.

    Where the reference holds a number, one number is read from the prediction and from the reference, and
    they must agree within a relative 1e-6 (absolute 1e-9 near zero). Thousands commas, currency signs, percent
    signs, units, exponents and trailing full stops do not matter; percent means no division by 100; "27/2" is 13.5,
    and English number words are read ("twenty-three", "minus two point five"). Digits stuck to a preceding letter
    ("CO2") are no number. What follows from another question on ("Question: ...") is not read. The number is

    1. that of the first line that is not empty, where this is a number with a unit of at most three words, unless a
       later "answer is" says another one: then there is none;
    2. otherwise the first one after the last "answer is", "answer:", "####" or "\boxed{" that has one in its line;
    3. otherwise that of the last sentence with a number: the first one after its last "=", or its only one, or the
       last one behind "so", "is", "are", "total" and the like. A text of more than 12 words that ends in no full stop
       was cut within its reasoning, and has none.

    Where the reference is a word ("August"), the first non-empty line of the prediction, or the part of it
    after the last marker if that is not empty, must equal it, ignoring case, repeated white space and any
    punctuation around it.

    Strictly equal strings count as right whatever they are, so this score is never below `accuracy`.

    Args:
        prediction: What the model wrote.
        reference: The expected answer, a number or a word.

    Returns:
        1.0 or 0.0.

    Source: this project; TRACE has no such score.
    """
    if accuracy(prediction, reference):
        return 1.0
    expected = read_number(reference)
    if expected is None:
        word = _read_word(reference)
        return float(word != "" and _read_word(prediction) == word)
    value = read_number(prediction)
    return float(value is not None and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9))


def names_number(text: str, answer: str) -> bool:
    """Whether the number `answer` stands in `text`, however it is written, or the word `answer` in either case."""
    expected = read_number(answer)
    if expected is None:
        word = re.escape(_read_word(answer))
        return re.search(rf"(?<!\w){word}(?!\w)", " ".join(text.split()).casefold()) is not None
    numbers = (float(number.replace(",", "")) for number in _NUMBER.findall(text))
    return any(math.isclose(number, expected, rel_tol=1e-6, abs_tol=1e-9) for number in numbers)


def _after_marker(line: str) -> str:
    """Gives the part of `line` after its last result marker, the empty string where it has none."""
    ends = [match.end() for match in _RESULT_MARKER.finditer(line)]
    return line[ends[-1] :] if ends else ""


def read_number(text: str) -> float | None:
    """Reads the number that `number_tolerant` says, None where there is none or it overflows a float."""
    text = _SIGNED_CURRENCY.sub("", text.replace("\N{MINUS SIGN}", "-"))
    if found := _NEXT_PROMPT.search(text.lstrip()):
        text = text.lstrip()[: found.start()]
    text = _in_digits(re.sub(r"\d{1,2}:\d\d(?:[:.]\d+)?", " ", text))  # a time of day is no number
    lines = [line for line in text.splitlines() if line.strip()]
    stated: list[float | None] = []
    for line in lines:
        for end in [match.end() for match in _STATED_ANSWER.finditer(line)][-1:]:
            sentence = re.split(r"(?<=[.!?。])(?=\s)", line[end:])[0]
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
    for line in reversed(lines):
        for sentence in reversed(re.split(r"(?<=[.!?。])(?=\s)", line)):
            if numbers_there := list(_NUMBER.finditer(sentence)):
                equals = sentence.rfind("=") + 1
                marked = _NUMBER.search(sentence, equals) if equals else None
                number = marked or numbers_there[-1]
                before = sentence[numbers_there[-2].end() if len(numbers_there) > 1 else 0 : number.start()]
                # "10 * 35", an operation without its result, or several numbers of which none is said to be one.
                if not marked and (
                    re.search(r"[*×+/]\s*\Z", before)
                    or (
                        len({n[0] for n in numbers_there}) > 1
                        and re.search(r"[^\W\d_]", sentence)
                        and not _CONCLUDES.search(before[-80:])
                    )
                ):
                    return None
                return _value(sentence, number)
    return None


def _value(text: str, number: re.Match[str]) -> float | None:
    """The value of a number found in a text, with what it is divided by; None where it overflows a float."""
    value = float(number[0].replace(",", ""))
    if (fraction := _FRACTION.match(text, number.end())) and float(fraction[1]):
        value /= float(fraction[1])
    return value if math.isfinite(value) else None


def _read_word(text: str) -> str:
    """Reads the word answer that `number_tolerant` says, in comparable form; empty where there is none."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    for part in (_after_marker(line), line):
        if word := re.search(r"[^\W_](?:.*[^\W_])?", " ".join(part.split())):
            return word[0].casefold()
    return ""


# --- overlap of texts ---------------------------------------------------------------------------------------


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L as PyPI's `rouge` 1.0.1 computes it: the F of the sentence-level union LCS, on sets of words.

    Sentences are split at every ".", words at white space. For each sentence of the prediction and each of
    the reference the words of one longest common subsequence (LCS) are collected. With U the set of all words
    collected and P, R the sets of words of the two texts, precision = |U| / |P|, recall = |U| / |R| and

        F = 2 * precision * recall / (precision + recall + 1e-8)

    so that identical texts get 0.999999995. Repeated words count once, and case and other punctuation matter.
    Of several longest subsequences the package's choice is taken; it depends on the order of the two texts,
    which the official code swaps against the package's names. As in the package, a sentence of white space
    alone holds one empty word.

    Args:
        prediction: What the model wrote.
        reference: The expected text.

    Returns:
        F in [0, 1); 0.0 where either text is empty or nothing but full stops (the package raises on the
        latter). A sentence of any length is scored; the package recurses and fails on sentences of about 1000
        words.

    Source: `rouge_l_summary_level` of PyPI's `rouge` 1.0.1, called by `caculate_rouge` in the official
    `metrics.py`.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    predicted_words = {word for sentence in predicted for word in sentence}
    expected_words = {word for sentence in expected for word in sentence}

    # A pair of sentences matters only if it shares a word that is not collected yet. Looking only at such
    # pairs changes nothing in the union, and saves nearly all of the quadratic number of pairs in a text of
    # many sentences.
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

    The table T[i, j] of LCS lengths of the first i words of `x` and j words of `y` is kept as one integer for
    each i, whose bit j - 1 is 0 where T[i, j] = T[i, j - 1] + 1; each row follows from the one before in a
    few operations (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004). Walking back needs no more:
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
    """Counts the runs of `n` tokens."""
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def bleu(prediction: str, reference: str, n: int) -> float:
    """Sentence BLEU against one reference, uniform weights on 1- to n-grams, no smoothing.

    Tokens are what is left between white space and full stops; case and other punctuation matter. The score
    is the geometric mean of the n clipped precisions times the brevity penalty exp(1 - r / p), 1 where the
    prediction's p tokens exceed the reference's r.

    Where an order has no match, 0.0 is returned. nltk puts the smallest positive float in place of that
    precision (and prints a warning); for n up to 4 its score is then below 1e-76, so the two agree. Texts of
    fewer than n tokens score 0 for the same reason, even where they are identical.

    Args:
        prediction: What the model wrote.
        reference: The expected text.
        n: The largest order of n-grams, 1 for BLEU-1 and 4 for BLEU-4.

    Returns:
        BLEU in [0, 1]; 0.0 where either text has no token.

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
    <STR_LIT:x>, <NUM_LIT:x> and <CHAR_LIT:x> become x. The ratio is fuzzywuzzy's `fuzz.ratio` as it is
    without python-Levenshtein; with it, or with rapidfuzz, the numbers are others (about a point). difflib
    ignores frequent characters in references of 200 characters and more, and its ratio depends on the order
    of the arguments.

    Args:
        prediction: What the model wrote.
        reference: The expected line of code.

    Returns:
        A multiple of 0.01 in [0, 1]; 0.0 where either text is empty after the clean-up.

    Source: `evaluations/eval_Py150.py` and `caculate_fuzz` in `metrics.py` of the official code.
    """
    predicted, expected = _undo_placeholders(prediction), _undo_placeholders(reference)
    if not predicted or not expected:
        return 0.0
    if predicted == expected:
        return 1.0
    if 400 * min(len(predicted), len(expected)) < len(predicted) + len(expected):
        return 0.0  # the ratio is below half a percent, and difflib would look for it for minutes
    return round(100 * SequenceMatcher(None, predicted, expected).ratio()) / 100


def _undo_placeholders(code: str) -> str:
    """Puts plain text in place of the literals' placeholders of Py150."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    # The matches are found before any is replaced, and each is replaced everywhere: for nested placeholders
    # this is not what one re.sub gives, and the official numbers come from this.
    # Behind the last ">" none can end: without the cut each open placeholder would look for its end once more.
    for match in list(re.finditer(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", code[: code.rfind(">") + 1], re.DOTALL)):
        code = code.replace(match[0], match[1])
    return code


def sari(source: str, prediction: str, reference: str) -> float:
    """SARI of one simplification against one reference, in the variant of Hugging Face's `evaluate`.

    All three texts are lower-cased, then tokenized by sacrebleu's 13a. For n = 1 to 4, with s, p and r the
    counted n-grams of source, prediction and reference (intersection and difference of counts):

        keep    F1 of  precision = mean of (s & p & r) / (s & p) over the distinct n-grams of s & p  and
                       recall = sum of (s & p & r) / sum of (s & r)
        delete  precision = mean of (s - p - r) / (s - p) over the distinct n-grams of s - p
        add     F1 of precision and recall of the distinct n-grams of p that are not in s, against those of r

    SARI is the mean of the three parts, each averaged over n. 0/0 counts as 1. A prediction equal to its
    reference scores 1 unless it keeps some, but not all, of the occurrences of an n-gram that the source
    repeats. An empty text is one empty token, and an empty prediction usually scores above 0, as officially.

    This is not EASSE's `corpus_sari`, which pools the n-gram counts of the corpus instead of averaging
    examples, averages precision and recall over n before it takes F1, uses F1 for deletions, weights kept and
    deleted n-grams by their counts, counts 0/0 as 0 and does not lower-case unless told to; on 20Minuten it
    differs by 3 to 6 points.

    Args:
        source: The text that was simplified; for TRACE's 20Minuten the whole prompt.
        prediction: What the model wrote.
        reference: The expected simplification.

    Returns:
        SARI in [0, 1].

    Source: Xu et al. 2016 (https://aclanthology.org/Q16-1029), `metrics/sari/sari.py` of
    huggingface/evaluate.
    """
    tokens = [_tokenize_13a(text.lower()) for text in (source, prediction, reference)]
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
    """Divides, with the 0/0 = 1 of `sari`."""
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    """Gives the harmonic mean, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _tokenize_13a(text: str) -> list[str]:
    """Tokenizes for `sari`; an empty text gives one empty token, as the official code's split(" ") does."""
    return _tokenizer_13a()(text).split(" ")


@cache
def _tokenizer_13a() -> Callable[[str], str]:
    """Makes sacrebleu's 13a tokenizer once."""
    # Imported late: it is slow to load and only SARI needs it.
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Callable[[str], str] = Tokenizer13a()
    return tokenizer


# --- reading answers ----------------------------------------------------------------------------------------


def scienceqa_parts(text: str) -> tuple[str, str]:
    r"""Splits a ScienceQA answer such as "B\nBecause ..." into the choice and the reasoning.

    Args:
        text: A prediction or a reference.

    Returns:
        The first character, for `accuracy`, and the text from the third character on, for `bleu` and
        `rouge_l`; both are empty where the text is too short (the official code fails on an empty
        prediction).

    Source: `evaluations/eval_ScienceQA.py` of the official code.
    """
    return text[:1], text[2:]


_MARKED_ANSWER = re.compile(r"(?:(?<![A-Za-z])answer|回答|答案)\s*[:：]", re.IGNORECASE)
_MARKED_SUMMARY = re.compile(
    r"(?:therefore\s*+(?:,\s*+)?)?the\s+summary\s+of\s+the\s+meeting\s+transcripts?\s+is\s*[:：]", re.IGNORECASE
)
_MARKED_REASONING = re.compile(r"(?<![A-Za-z])reasoning\s*[:：]", re.IGNORECASE)


def extract_answer(form: str, text: str) -> str | None:
    """Reads the answer out of a text with reasoning, as the training answers of TRACE's reasoning variant have it.

    The markers are read tolerantly: in either case, with white space before the colon, and with an ASCII or a
    full-width colon. Where a marker occurs several times, the last one that anything follows decides: reasoning
    may speak of an "answer:" before it gives one, and a text cut at the limit of tokens may end in a marker.
    A text without its marker has no answer, even if it is nothing but the right letter; but for Py150, where the
    answer comes first and needs none.

    ========= ======================== =============================================================================
    form      tasks                    the answer
    ========= ======================== =============================================================================
    "line"    C-STANCE, FOMC,          after "Answer:", "回答：" or "答案：", the first line that is not blank,
              ScienceQA, NumGLUE       stripped; what stands on further lines is talk about the answer
    "text"    20Minuten                after the same markers, all that follows, stripped
    "summary" MeetingBank              after "the summary of the meeting transcripts is:", all that follows, stripped
                                       (references have several lines); where that is missing, as for "text"
    "code"    Py150                    before any "Reasoning:", the first line that is not blank; not stripped,
                                       since some references end in a space and the official similarity counts it
    ========= ======================== =============================================================================

    Stripping is right here although the official accuracy compares without it: there the whole output has to be
    the answer, while here the marker and the layout around it ("Answer: 36" and a line break) are form.

    Args:
        form: "line", "text", "summary" or "code".
        text: What the model wrote after the prompt, or a training answer.

    Returns:
        The answer, never blank; None where there is none.

    Raises:
        ValueError: for an unknown form.

    Source: this project, from the markers in the official training answers.
    """
    parts = split_answer(form, text)
    return parts[1] if parts else None


def split_answer(form: str, text: str) -> tuple[str, str] | None:
    """Splits a text with reasoning into the reasoning path and the answer, by the rules of `extract_answer`.

    Args:
        form: As for `extract_answer`.
        text: As for `extract_answer`.

    Returns:
        The path, as it stands before the marker of the answer (for "code" after that of the reasoning; empty without
        one), and the answer; None where there is no answer.

    Raises:
        ValueError: for an unknown form.
    """
    if form not in ("line", "text", "summary", "code"):
        raise ValueError(f"unknown form of an answer: {form!r}")
    if form == "code":
        before, *after = _MARKED_REASONING.split(text, maxsplit=1)
        line = next((line for line in before.split("\n") if line.strip()), None)
        return None if line is None else ("".join(after), line)
    marker_of_task = _MARKED_SUMMARY if form == "summary" and _MARKED_SUMMARY.search(text) else _MARKED_ANSWER
    end = len(text)
    for marker in reversed(list(marker_of_task.finditer(text))):
        answer = text[marker.end() : end].strip()
        if answer:
            return text[: marker.start()], answer.split("\n")[0].rstrip() if form == "line" else answer
        end = marker.start()
    return None
