"""Reads the answer that a model means, in any form. These scores are this project's own: TRACE has none like them.

Strict equality cannot tell a model that forgot the answer from one that writes the answer differently. So `read_choice`
reads the letter of an option out of the text, and `extract_answer` the answer after a reasoning path. Numbers are read
in `written_numbers.py`. No function raises on any string; `extract_answer` refuses a form that it does not know.
"""

import re
import unicodedata
from itertools import pairwise

from trace_tasks.scoring import accuracy
from trace_tasks.written_numbers import NEXT_PROMPT

# --- a choice -----------------------------------------------------------------------------------------------

# The labels that occur in TRACE: C-STANCE and FOMC use A-C, ScienceQA up to E. More letters would only add
# false hits.
_LABEL = "[A-Ea-e]"
_OPENING = r"[\s(\[{<\"'“‘【「《#]"
# What may follow a letter that is a label. The alternatives tell labels from words: the article "A", "A's",
# "A-shares", "A.I.", "A股" (a share), "B站" (a site) and "B.1.1.7" must not count.
_LABEL_END = r"""(?=
      ["”)\]}>】」》]                               # a closing quote or bracket
    | ['’](?![A-Za-z])                            # a closing quote, but not a genitive
    | [.,:;!、。](?!\d|[A-Za-z](?![A-Za-z]))        # punctuation, but not inside an abbreviation or a version
    | [^\S\n]*(?:\n|\Z)                           # the end of the line
    | [^\S\n]+(?:[-–—]|(?:is|because|since)\b)    # "A - ...", "A because ...": "A" is no article there
    | [^\S\n]+(?=[\u3400-\u9fff])                 # "A 支持": nor is it before Chinese
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
# "A is wrong.", "选项 A 不对，": a clause that rejects an option.
_REJECTED = re.compile(
    rf"""(?:\A|(?<=[.!?;,\n。！？；，])) (?:[^\S\n]|[(\[{{<"'“‘【「《#])*+
    (?:(?i:(?:the\s)?(?:option|choice|answer)\s)|选项)? [^\S\n]*+ [(\["'“‘]*+ {_LABEL} [)\]}}>"'”’.:]*+
    (?: [^\S\n]++
        (?i:(?:is|was)(?:n['’]t|[^\S\n]++(?:(?:the|clearly|definitely|also)[^\S\n]++)?(?:not|wrong|incorrect))\b)
      | [^\S\n]*+ (?:不对|不正确|不是|是错|错) )
    [^.!?;,\n。！？；，]*+ [.!?;,。！？；，]?""",
    re.VERBOSE,
)
_END_OF_LINE = re.compile(r"[^\S\n]*+(?:\n|\Z)")
_RIVAL_LABEL = re.compile(
    rf"""[\s)\].,;/、]*+ (?:(?i:or|and)\b|或者?|和)? [\s(\[]*+ (?P<label>{_LABEL})
    (?= \s* (?: \Z | [.,:;)\]/、。] | (?:or|and)\b | [或和] ) )""",
    re.VERBOSE,
)


# The options of a prompt: one on each line after "Choices:" (ScienceQA), or all on the first line (C-STANCE, FOMC).
_CHOICES = re.compile(r"\bchoices:[^\S\n]*\n", re.IGNORECASE)
_LISTED_OPTION = re.compile(r"^[^\S\n]*([A-Z])[.)][^\S\n]*(\S.*)$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?<![A-Za-z])([A-Z])[.)][^\S\n]*([^,;.\n。]+)")
# O-LoRA's line of options, which follows the lines of task and data set. Its labels contain no comma.
_OFFERED_LABELS = re.compile(r"\ATask:\w+\nDataset:[^\n]+\n[^\n]*\nOption: ([^\n]+) \n")
# Shorter options ("no", "2") also occur in sentences that do not name an option.
_LONG_ENOUGH = re.compile(r"[A-Za-z]{4}|[\u3400-\u9fff]{2}")
_ANY = re.compile("")
# Words that negate the option after them: "not dovish", but also "less dovish than" and "不支持".
_TAKEN_BACK = re.compile(
    r"""(?:\b(?:not|no|never|non|neither|nor|cannot|without|less|than|instead\ of|rather\ than|either|or|if|whether)\b
    |n['’]t\b|[不没非未否或])[\s\w'’"-]{0,20}\Z""",
    re.VERBOSE | re.IGNORECASE,
)
# The full stop of a label ("A.支持") ends no sentence.
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z]\.)(?<=[.!?])(?=\s|\Z)|(?<=[。！？])|\n")
_LABEL_ALONE = re.compile(rf"^[^\S\n]*({_LABEL})[.)]?[^\S\n]*$", re.MULTILINE)
_STATED_OPTION = re.compile(
    r"^[^\S\n]*(?:the|my) (?:correct )?(?:answer|stance) is ([^.\n]*)", re.MULTILINE | re.IGNORECASE
)
_LIST_OF_OPTIONS = re.compile(
    r"(?:\A|(?<=\n))[^\S\n]*[A-E][.):][^\n]*(?:\n\s*[A-E][.):][^\n]*)+|[A-E][.):][^\n]{0,80}?[,;.，；、。][^\S\n]*[B-E][.):][^\n]*"
)


def options_of(prompt: str) -> dict[str, str]:
    """The options that a prompt offers: upper-case letter -> text. Empty if it lists fewer than two, starting with A.

    The labels in a prompt of CL_Benchmark have no letters. They get letters here, in their order.
    """
    if labels := offered_labels(prompt):
        return {chr(ord("A") + i): label for i, label in enumerate(labels)}
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


def offered_labels(prompt: str) -> list[str]:
    """The labels, as words, that a prompt of CL_Benchmark (`data.packs`) offers. Empty for any other prompt."""
    found = _OFFERED_LABELS.match(prompt)
    return found[1].split(", ") if found else []


def choice_tolerant(prediction: str, reference: str, prompt: str = "") -> float:
    """Form-tolerant accuracy for answers that are the letter of an option, A to E in either case.

    The rules below extract a letter from both strings. The score is 1.0 if both give the same letter, else 0.0; it is
    0.0 if they give none. Strictly equal strings always count as right, so this score is never below `accuracy`.

    1. Full-width characters are made ASCII (NFKC); asterisks and backticks (Markdown) are dropped.
    2. A *label* is a single letter followed by: a closing quote or bracket; one of `.,:;!、。` (not inside
       "A.I." or "B.1"); the end of its line; a space and a dash, "is", "because", "since" or Chinese; or, for
       an upper-case B to E, a space and anything. So "A monetary policy ..." has no label: "A" is an article
       there.
    3. A label at the start of the text, after any white space, opening brackets, opening quotes and "#",
       decides, unless a different label follows "answer", "stance" or their Chinese words (rule 4).
    4. Otherwise a label right after a marker decides, anywhere in the text. The markers are "answer", "stance", 答案,
       回答, 态度, 立场; if none of these has a label, they are "choice", "option", 选项, 选择, 选. Between marker and
       label may stand "is", "was", 是, 为, 应为, 应是 or 应该是, a marker of the second kind ("the answer is
       option B"), colons, equals signs, white space, "#", opening brackets and quotes.
    5. A label is ambiguous if a different one follows it on the same line, joined only by punctuation, "or",
       "and", 或, 或者 or 和 ("B or C"), or if the next option is listed after it, on its line or at the
       start of the next line ("A. dovish, B. hawkish"). An ambiguous label at the start is ignored, and
       rule 4 is tried.
    6. Several marked labels of one kind must agree, and none may be ambiguous; otherwise there is no letter.
    7. A text without a label may name an option by its text in the prompt (`options_of`), in either case: "dovish",
       "The stance is dovish.", "作者持支持态度". The first sentence (or line) that names an option decides, and must
       name exactly one. Lists of the options are ignored. An option after "not", "less", "or", 不 and the like does
       not count; nor does one of fewer than four letters or two Chinese characters ("no", "2"), unless it is the
       whole sentence, or the sentence begins with it and a comma.
    8. A label followed by the text of a different option ("A. hawkish", where A is dovish) is no answer.
    9. A sentence, or a part of one before a comma, that rejects a label ("A is wrong.", "A is not ...", "A不对") is
       removed first. All other rules see the rest.

    Rules 7 and 8 need the prompt, which lists the options.
    """
    if accuracy(prediction, reference):
        return 1.0
    expected = read_choice(reference, prompt)
    return float(expected is not None and read_choice(prediction, prompt) == expected)


def read_choice(text: str, prompt: str = "") -> str | None:
    """The upper-case letter of the option that a text chooses by the rules of `choice_tolerant`, or None.

    If the prompt offers labels (`offered_labels`), only rule 7 applies, because the model saw no letters. Then short
    labels ("Bad") count, too.
    """
    options = {letter: _plain(option) for letter, option in options_of(prompt).items()}
    if offered_labels(prompt):
        return _named_option(_without_markdown(text), options, long_enough=_ANY)
    return _choice(text, options)


def _plain(text: str) -> str:
    """A text in a form for comparison: one form of each character, one case, single spaces, no full stop at the end."""
    return " ".join(nfkc(text).replace("’", "'").split()).casefold().rstrip(" .")


def _choice(text: str, options: dict[str, str]) -> str | None:
    text = _REJECTED.sub("", _without_markdown(text))
    if (leading := _LEADING_LABEL.match(text)) and not _is_ambiguous(text, [leading]):
        letter = leading["label"].upper()
        own = text[: found.start("begins")] if (found := NEXT_PROMPT.search(text, leading.end())) else text
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


def _without_markdown(text: str) -> str:
    return nfkc(text).translate({ord("*"): None, ord("`"): None})


def _is_contradicted(text: str, label: re.Match[str], options: dict[str, str]) -> bool:
    """Whether a label is followed by the text of a different option."""
    end = text.find("\n", label.end("label"))
    behind = _plain(text[label.end("label") : len(text) if end < 0 else end][:1000]).lstrip(" .):,;、。-–—\"'”’")
    own = options.get(label["label"].upper(), "")
    return not (own and behind.startswith(own)) and behind != "" and behind in options.values()


def _named_option(text: str, options: dict[str, str], long_enough: re.Pattern[str] = _LONG_ENOUGH) -> str | None:
    """The letter of the option that a text names by its words: rule 7 of `choice_tolerant`."""
    letters = {option: letter for letter, option in options.items() if [*options.values()].count(option) == 1}
    if not letters:
        return None
    # The longest come first, so that "the Bible" is not found in "the Bible of 1611".
    names = re.compile("|".join(map(re.escape, sorted(letters, key=len, reverse=True))))
    text = _LIST_OF_OPTIONS.sub("\n", text)
    for start, end in pairwise([0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]):
        if not text[start:end].strip():
            continue
        sentence = _plain(text[start:end][:2000]).strip("\"'“”‘’()[]-:,;!。 ")
        named = set()
        for match in names.finditer(sentence):
            name, before, behind = match[0], sentence[: match.start()], sentence[match.end() :]
            # A part of a longer word does not count.
            if name[:1].isalnum() and re.match(r"[a-z\d]", before[-1:]):
                continue
            if name[-1:].isascii() and name[-1:].isalnum() and re.match(r"[a-z\d]", behind):
                continue
            if not before and (not behind or behind[0] in ",;:-"):  # alone
                named.add(letters[name])
            elif long_enough.search(name):
                # "" stands for a negated option: the sentence is about it, but does not choose it.
                named.add("" if _TAKEN_BACK.search(before[-40:]) else letters[name])
        if named - {""}:
            return named.pop() if len(named) == 1 else None
    return None


def nfkc(text: str) -> str:
    """Unicode's NFKC form, made piece by piece.

    Python sorts a run of combining marks in quadratic time: 200,000 of them take half a minute.
    """
    return "".join(unicodedata.normalize("NFKC", text[i : i + 4000]) for i in range(0, len(text), 4000))


def _is_ambiguous(text: str, matches: list[re.Match[str]]) -> bool:
    """Whether one of these matches of a label is next to a different label or begins a list of the options."""
    label = matches[0]["label"].upper()
    following = chr(ord(label) + 1)
    option = rf"[{following}{following.lower()}][.):](?:\s+\w|\w\w)"
    end = -1
    for match in matches:
        start = match.end("label")
        if _END_OF_LINE.match(text, start):  # alone on its line: no list follows, but an explanation or the next prompt
            continue
        if re.compile(r"\s*[、,]\s*\Z").match(text, start):  # the text was cut within a list
            return True
        first = start > end  # the first label of its line: a list after a later one is a list after it, too
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
    """Whether `letter` occurs in `text` as a label by rule 2 of `choice_tolerant`, not as a word."""
    text = _without_markdown(text)
    return re.search(rf"(?<![A-Za-z\d])(?:{letter}){_LABEL_END}", text, re.VERBOSE) is not None


# --- an answer behind reasoning -----------------------------------------------------------------------------

_MARKED_ANSWER = re.compile(r"(?:(?<![A-Za-z])answer|回答|答案)\s*[:：]", re.IGNORECASE)
_MARKED_SUMMARY = re.compile(
    r"(?:therefore\s*+(?:,\s*+)?)?the\s+summary\s+of\s+the\s+meeting\s+transcripts?\s+is\s*[:：]", re.IGNORECASE
)
_MARKED_REASONING = re.compile(r"(?<![A-Za-z])reasoning\s*[:：]", re.IGNORECASE)


def extract_answer(form: str, text: str) -> str | None:
    """Reads the answer out of a text with reasoning, in the form of the training answers of TRACE's reasoning variant.

    Markers are found in either case, with white space before the colon, and with an ASCII or a full-width colon. If
    there are several markers, the last one that is followed by any text decides: reasoning may mention an "answer:"
    before it gives one, and a text cut at the limit of tokens may end in a marker. A text without its marker has no
    answer, even if it is just the right letter. Py150 needs no marker, because its answer comes first.

    ========= ======================== =============================================================================
    form      tasks                    the answer
    ========= ======================== =============================================================================
    "line"    C-STANCE, FOMC,          after "Answer:", "回答：" or "答案：", the first line that is not blank,
              ScienceQA, NumGLUE       stripped; further lines are comments on the answer
    "text"    20Minuten                after the same markers, all that follows, stripped
    "summary" MeetingBank              after "the summary of the meeting transcripts is:", all that follows, stripped
                                       (references have several lines); without this marker, as for "text"
    "code"    Py150                    before any "Reasoning:", the first line that is not blank; not stripped,
                                       because some references end in a space that the official similarity counts
    ========= ======================== =============================================================================

    The official accuracy strips nothing, because there the whole output is the answer. Here the marker and the layout
    around the answer ("Answer: 36" and a line break) are form, so they are stripped.

    Returns:
        The answer, never blank; None if there is none.

    Raises:
        ValueError: for an unknown form.
    """
    parts = split_answer(form, text)
    return parts[1] if parts else None


def split_answer(form: str, text: str) -> tuple[str, str] | None:
    """Splits a text with reasoning into the reasoning path and the answer, by the rules of `extract_answer`.

    Returns:
        The path and the answer; None if there is no answer. The path is the text before the marker of the answer. For
        "code" it is the text after the marker of the reasoning, or empty without this marker.
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
