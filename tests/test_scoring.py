"""Tests of `trace_tasks.scoring`: equality with the official code, cases worked by hand, edge cases and properties.

The comparison with the official code needs predictions with official scores in `shared/golden` next to the repository,
and is skipped without them. Their texts are not the project's, so a failure names rows by index and shows no text.
"""

import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from trace_tasks.answers import choice_tolerant, options_of, read_choice
from trace_tasks.scoring import accuracy, bleu, rouge_l, sari, scienceqa_parts, similarity
from trace_tasks.written_numbers import number_tolerant, read_number

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

SCORES: dict[str, Callable[[str, str, str], float]] = {
    "accuracy": lambda source, prediction, reference: accuracy(prediction, reference),
    "rouge-L": lambda source, prediction, reference: rouge_l(prediction, reference),
    "bleu-1": lambda source, prediction, reference: bleu(prediction, reference, 1),
    "bleu-4": lambda source, prediction, reference: bleu(prediction, reference, 4),
    "similarity": lambda source, prediction, reference: similarity(prediction, reference),
    "sari": sari,
}


def golden(name: str):
    """Reads one golden file, or skips the test."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        pytest.skip("no shared/golden beside the repository: parity with the official code is not checked")
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_scores_equal_those_of_the_official_code():
    checked = 0
    for task, metrics in golden("official_scores").items():
        for metric, official in metrics.items():
            rows = [(row["source"], row["prediction"], row["reference"]) for row in golden(task)]
            if task == "ScienceQA":
                part = int(metric != "accuracy")
                rows = [(s, scienceqa_parts(p)[part], scienceqa_parts(r)[part]) for s, p, r in rows]
            scores = [SCORES[metric](*row) for row in rows]
            scale = 100 if metric in ("similarity", "sari") else 1
            assert scale * sum(scores) / len(scores) == pytest.approx(official, rel=0, abs=1e-6), (task, metric)
            checked += 1
    assert checked == 16


# --- accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("A", "A", 1), ("A ", "A", 0), ("a", "A", 0), ("", "A", 0), ("", "", 0), ("周一", "周一", 1), ("1.0", "1", 0)],
)
def test_accuracy_is_strict_equality(prediction, reference, score):
    assert accuracy(prediction, reference) == score


CHOICE_IS_READ = [
    "A", " a.", "a", "(A)", "[a] dovish", "A. dovish", "A.dovish", "A) dovish", "A: dovish", "A - dovish",
    "A, dovish", '"A"', "'A'", "**A**", "# A", "A because rates fall", "A is right", "A\nThe bank is cautious.",
    "A\r\nmore", "\n\nA", "A.\nB is wrong.", "A\ndovish, B. hawkish, C. neutral: pick one of A, B and C", "A. A",
    "Answer: A", "answer:a", "Answer:\nA", "**Answer:** A", "The answer is (A).",
    "The answer is A, since rates fall.", "The answer is option A.", "Rates fall, so the stance is: A",
    "Reasoning first.\nSo prices fall.\nAnswer: A", "A monetary policy of low rates was chosen. The answer is A.",
    "A or B? The answer is A.", "Answer: A\nThe answer is A.", "Option A is best",
    "Option B is too strong, option C is too weak. Answer: A", "Ａ", "（Ａ）支持", "A.支持", "A。",
    "A 支持", "答案：A", "答案是A。",
    "态度：A", "态度： A.支持", "回答:A", "我选A", "选项 A", "【A】",
]  # fmt: skip


ANOTHER_CHOICE_IS_READ = [
    *("B", "b.", "B hawkish", "B because A is wrong", "B. A clause has a verb.", "态度：B", "B\nA clause"),
    "B. Not D.C. at all",
    "A is wrong. B is right.",
    "A is not correct, B is.",
    "Option A is incorrect. Option B is correct.",
    "(A) isn't what it says. Answer: B",
    "B\nA is wrong.",
    "A不对，选B",
    "A 错误。B 正确。",
]


@pytest.mark.parametrize(
    ("prediction", "letter"), [*((p, "A") for p in CHOICE_IS_READ), *((p, "B") for p in ANOTHER_CHOICE_IS_READ)]
)
def test_the_letter_of_a_choice_is_read(prediction, letter):
    assert [choice_tolerant(prediction, label) for label in "ABC"] == [label == letter for label in "ABC"]


NO_SINGLE_CHOICE_CAN_BE_READ = [
    "", " ", "?", "dovish", "A monetary policy of low rates", "a monetary policy", "A 10-year bond",
    "The answer is a monetary policy.", "Answer: A monetary policy", "A's", "A-shares fall", "A.I. is hawkish",
    "D.C. is a city", "A股大跌", "AB", "Apple", "e.g. this", "A or B", "A and B", "A/B", "A, B and C", "A或B",
    "The answer is A or B.", "A. dovish, B. hawkish, C. neutral", "A. a duck\nB. a goose",
    "A.支持，B.反对，C.中立。只写A，B或者C。",
    "请说出作者的态度，选择一项：A.支持，B.反对，C.中立。只写A，B或者C。",
    "What is the stance? Pick one of A, B and C.",
    "Answer: A\nText: something else\nAnswer: B", "neither A nor B", "Option A is strong, option B is weak.",
    "A is wrong.", "A is not it", "选项A不正确。", "A is wrong. B is wrong.",
    "answer: ", "A" * 20, "\N{GRINNING FACE}",
]  # fmt: skip


@pytest.mark.parametrize("prediction", NO_SINGLE_CHOICE_CAN_BE_READ)
def test_ambiguous_or_missing_choices_give_no_letter(prediction):
    assert [choice_tolerant(prediction, label) for label in "ABCDE"] == [0] * 5
    assert choice_tolerant("dovish", "dovish") == 1 and choice_tolerant("dovish.", "dovish") == 0  # no letter


FOMC = "What is the stance? A. dovish, B. hawkish, C. neutral. Choose one.\nText:\nA. long, B. short.\nStance:"
STANCE = "判断以下文本的态度：A.支持，B.反对，C.中立。输出A，B或者C。\n文本：\n我们很好\n态度："
SCIENCE = "Question:\nWhich one?\n\nChoices:\nA. a poem\nB. the Bible\nC. the Bible of 1611\nD. no\nE. 2\n\nAnswer:"


def test_the_options_of_a_prompt_are_read():
    assert options_of(FOMC) == {"A": "dovish", "B": "hawkish", "C": "neutral"}
    assert options_of(STANCE) == {"A": "支持", "B": "反对", "C": "中立"}
    assert options_of(SCIENCE) == {"A": "a poem", "B": "the Bible", "C": "the Bible of 1611", "D": "no", "E": "2"}
    demonstrated = SCIENCE.replace("a poem", "a song") + "B\nBecause.\n\n" + SCIENCE
    assert options_of(demonstrated)["A"] == "a poem", "the last question's"
    assert options_of("") == options_of("A. only one") == options_of("B. two, C. three") == {}


THE_TEXT_OF_AN_OPTION_IS_ITS_LETTER = [
    (FOMC, "dovish", "A"), (FOMC, " Hawkish.", "B"), (FOMC, "The stance is dovish.", "A"),
    (FOMC, "The stance is **hawkish**, since rates rise.", "B"), (FOMC, "This text takes a neutral stance.", "C"),
    (FOMC, "Stance: neutral", "C"), (FOMC, "NEUTRAL\n\nOptions:\nA. dovish\nB. hawkish\nC. neutral", "C"),
    (FOMC, "The committee sounds hawkish. It is not dovish.", "B"), (FOMC, "B. hawkish", "B"),
    (FOMC, "B: a hawkish text", "B"), (FOMC, "A\n\nThe sentence is neutral in its first part.", "A"),
    (FOMC, "B. hawkish\nText: another\nStance: A", "B"), (STANCE, "支持", "A"), (STANCE, "作者持反对态度。", "B"),
    (STANCE, "态度：中立", "C"), (STANCE, "我认为作者的态度是支持。", "A"), (STANCE, "A.支持", "A"),
    (SCIENCE, "The answer is the Bible.", "B"), (SCIENCE, "the bible of 1611", "C"), (SCIENCE, "It is a poem", "A"),
    (SCIENCE, "No", "D"), (SCIENCE, "No, it is not.", "D"), (SCIENCE, "2", "E"),
    (SCIENCE, "B\nThe Bible is the source.", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "prediction", "letter"), THE_TEXT_OF_AN_OPTION_IS_ITS_LETTER)
def test_the_text_of_an_option_counts_as_its_letter(prompt, prediction, letter):
    assert read_choice(prediction, prompt) == letter
    assert [choice_tolerant(prediction, label, prompt) for label in "ABCDE"] == [label == letter for label in "ABCDE"]


NO_SINGLE_OPTION_IS_NAMED = [
    (FOMC, "The stance is not dovish."), (FOMC, "It is less hawkish than before."),
    (FOMC, "It is dovish or hawkish."), (FOMC, "It isn't neutral"), (FOMC, "dovish, hawkish and neutral"),
    (FOMC, "A. dovish\nB. hawkish\nC. neutral"), (FOMC, "A. hawkish"), (FOMC, "The answer is B. dovish"),
    (FOMC, "A. dovish\nStance: B. hawkish"), (FOMC, "A.\nThe stance is a neutral one."), (FOMC, "A\nB\nC"),
    (FOMC, "dovishness is a word"), (FOMC, "Text: we choose among dovish and hawkish"), (STANCE, "不支持"),
    (STANCE, "支持或反对"), (STANCE, "A.支持，B.反对，C.中立。"), (STANCE, "A.反对"), (SCIENCE, "There is no answer."),
    (SCIENCE, "It has 2 parts"), (SCIENCE, "A. the Bible"), ("", "The stance is dovish."),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "prediction"), NO_SINGLE_OPTION_IS_NAMED)
def test_texts_that_name_no_or_several_options_give_no_letter(prompt, prediction):
    assert read_choice(prediction, prompt) is None
    assert [choice_tolerant(prediction, label, prompt) for label in "ABCDE"] == [0] * 5


LABELLED = Path(__file__).with_name("labelled_answers.jsonl")


def test_tolerant_scores_agree_with_answers_labelled_by_hand(capsys):
    """The file has 223 greedy answers of SmolLM2-135M-Instruct to real test rows, up to 48 tokens, labelled by hand.

    It has only the model's words (answers that quote a prompt at length were left out), the number of the row, and the
    label: a letter, a number, or null if the answer names none or several.
    """
    data = GOLDEN.parent / "data" / "trace"
    if not data.is_dir():
        pytest.skip("no shared/data beside the repository: the prompts, which list the options, are not checked")
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    tasks = {row["task"] for row in rows}
    prompts = {task: json.loads((data / task / "test.json").read_text(encoding="utf-8")) for task in tasks}
    counts = {task: [0, 0, 0] for task in sorted(tasks)}  # right, read but wrong or not there, there but not so read
    for row in rows:
        task, label = row["task"], row["label"]
        if task.startswith("NumGLUE"):
            read = read_number(row["answer"])
            same = read is not None and label is not None and read == pytest.approx(label, rel=1e-6)
        else:
            read = read_choice(row["answer"], prompts[task][row["row"]]["prompt"])
            same = read is not None and read == label
        for i, one in enumerate((same, read is not None and not same, label is not None and not same)):
            counts[task][i] += one
    right, wrong, missed = map(sum, zip(*counts.values(), strict=True))
    precision, recall = right / (right + wrong), right / (right + missed)
    with capsys.disabled():
        print(f"\n{len(rows)} labelled answers: precision {precision:.3f}, recall {recall:.3f} {counts}")
    assert len(rows) >= 200 and right >= 100
    assert precision > 0.97 and recall > 0.97


NUMBER_IS_READ = [
    ("17.48", "17.48"), (" 17.48\n", "17.48"), ("17.48 km", "17.48"), ("17.48km.", "17.48"), ("= 17.48 km", "17.48"),
    ("The answer is 8.", "8"), ("The answer is: 8 of 10 apples", "8"), ("Answer: 8 apples and 3 pears", "8"),
    ("8.0", "8"), ("8.", "8"), ("08", "8"), ("1,680", "1680"), ("1,234,567.5 dollars", "1234567.5"),
    ("1680", "1,680"), ("$8", "8"), ("8$ in 2 coins = 8$", "8"), ("-$5", "-5"), ("€ 8.50", "8.5"), ("Rs.500", "500"),
    ("50%", "50"), (".5", "0.5"), ("-5", "-5"), ("\N{MINUS SIGN}5", "-5"), ("5 million", "5000000"),
    ("She has 2.5 thousand apples.", "2500"), ("3 hundred", "300"), ("１２．５", "12.5"), ("10²", "10"),
    ("1.4300000000000002", "1.43"), ("1.43", "1.4300000000000002"), ("5.5e-17", "0"), ("2e3", "2000"),
    ("3 + 5 = 8 apples", "8"), ("There are 48 wheels, 4 each, so 12", "12"),
    ("8\nSolve the problem with 3 apples", "8"), ("\n\n8\n3", "8"), ("Let me see.\nIt is 8.", "8"),
    ("8 moles of CO2", "8"), ("８", "8"), ("共8个", "8"), ("August", "August"), ("august.", "August"), ("eight", "8"),
    ("Twenty-three apples.", "23"), ("twenty three", "23"), ("$23.00", "23"), ("one hundred and five", "105"),
    ("a hundred", "100"), ("two thousand three hundred forty", "2340"), ("minus two point five", "-2.5"),
    ("zero", "0"), ("The answer is one.", "1"), ("She has twelve left", "12"), ("27/2", "13.5"),
    ("\\boxed{23}", "23"), ("First he had 5.\n#### 23", "23"), ("A deck has 13 cards.\n\nThe answer is 26.", "26"),
    ("The answer is 2 + 2 = 4.", "4"), ("3 + 5 is 8.\nSo she has 8 apples left.", "8"),
    ("8 km\nQuestion: How far is 5 km?\nAnswer: 5", "8"), ("She waited 6 minutes until 6:39 pm.", "6"),
    ("10\n\nThe answer is 10.", "10"), ('"August"\nbecause', "August"), ("The answer is Friday.", "Friday"),
    ("Answer: friday", "Friday"), ("Day = Friday", "Friday"), ("So .25 it is", "0.25"),
]  # fmt: skip


NUMBER_IS_WRONG = [
    ("", "8"), ("", ""), (".", "August"), ("eighty", "8"), ("8.1", "8"), ("8.00001", "8"), ("-8", "8"), ("18", "8"),
    ("8\n3", "3"), ("The answer is 8 of 10", "10"), ("CO2", "2"), ("1e999", "8"), ("1e999", "2e999"),
    ("August or May", "August"), ("May", "August"), ("Friday 8", "Friday"), ("None", "0"), ("This one is hard", "1"),
    ("tone", "1"), ("twenty-three", "20"), ("twenty-three", "3"), ("27/2", "2"), ("1\n\nThe answer is 2.", "1"),
    ("1\n\nThe answer is 2.", "2"), ("To solve this problem, we need to find how many apples she eats in 3", "3"),
    ("10 moles is equal to 10 * 35 grams.", "35"), ("Mg(OH)2", "2"), (".5C1", "0.5"),
    ("It rained for 5 hours and rested for 3 hours.", "3"), ("x .5Mg(", "0.25"), ("-.5C1 and 7", "0.25"),
    ("5 million", "1000000"), ("3 hundred", "100"), ("10-3", "3"), ("10 - 3", "3"), ("10^3", "3"), ("12,34", "34"),
    ("1'000", "0"), ("1_000", "0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [*((*row, 1) for row in NUMBER_IS_READ), *((*row, 0) for row in NUMBER_IS_WRONG)],
)
def test_the_number_of_an_answer_is_read(prediction, reference, score):
    assert number_tolerant(prediction, reference) == score


# --- ROUGE-L ------------------------------------------------------------------------------------------------


def f_measure(precision: float, recall: float) -> float:
    """The F of PyPI's `rouge`, including its small constant."""
    return 2 * precision * recall / (precision + recall + 1e-8)


ROUGE_L = [
    ("a b c", "a b c", f_measure(1, 1)), ("a b c d", "a c", f_measure(2 / 4, 1)), ("a b", "c d", 0),
    # Lin's example of the union LCS: w1 w2 w3 w5 of 5 and of 8 different words.
    ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5.", f_measure(4 / 5, 4 / 8)),
    ("a. b", "b. a", f_measure(1, 1)),  # sentences are matched in any order,
    ("a b", "b a", f_measure(1 / 2, 1 / 2)),  # words within one are not
    ("a a a", "a", f_measure(1, 1)),  # sets of words
    ("A", "a", 0), ("a,", "a", 0),
    ("3.5", "5.3", f_measure(1, 1)),  # every full stop splits
    ("a. ", "b. ", f_measure(1 / 2, 1 / 2)),  # white space after the last stop is an empty word
    (" ", " ", f_measure(1, 1)), ("天气 很好", "天气 不好", f_measure(1 / 2, 1 / 2)), ("", "a", 0), ("a", "", 0),
    ("", "", 0),
    (".", ".", 0), ("...", "a", 0), ("a", ".", 0),
    # Values of rouge 1.0.1, which depend on the order of the two texts.
    ("a.b A ", "b\nb.A b ", 0.7999999952), ("b\nb.A b ", "a.b A ", 0.3999999952),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "reference", "score"), ROUGE_L)
def test_rouge_l_has_the_recorded_values(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score, rel=0, abs=1e-10)


def plain_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L by its definition, with a full table for every pair of sentences."""
    texts = [[part.split() or [""] for part in text.split(".") if part] for text in (prediction, reference)]
    union = set()
    for x, y in product(*texts):
        table = defaultdict(int)
        for i, j in product(range(len(x)), range(len(y))):
            table[i, j] = table[i - 1, j - 1] + 1 if x[i] == y[j] else max(table[i - 1, j], table[i, j - 1])
        i, j = len(x) - 1, len(y) - 1
        while i >= 0 and j >= 0:
            if x[i] == y[j]:
                union.add(x[i])
                i, j = i - 1, j - 1
            elif table[i - 1, j] > table[i, j - 1]:
                i -= 1
            else:
                j -= 1
    different = [len({word for sentence in text for word in sentence}) for text in texts]
    return f_measure(len(union) / different[0], len(union) / different[1])


def test_rouge_l_equals_the_plain_table():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choice("abcdef") + rng.choice("   .\n") for _ in range(30)) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(plain_rouge_l(a, b), abs=1e-12)


# --- BLEU ---------------------------------------------------------------------------------------------------

BLEU = [
    ("a b c d", "a b c d", 4, 1),
    ("a b c d", "a b c d e f g h", 1, 2.718281828459045**-1),  # brevity: exp(1 - 8 / 4)
    ("a a a a", "a a", 1, 2 / 4),  # clipped counts
    ("a b x c", "a b y c", 2, (3 / 4 * 1 / 3) ** 0.5),
    ("a.b\n c", "a b c.", 3, 1),  # full stops and white space are no tokens
    ("A", "a", 1, 0),
    ("a b c", "a b c", 4, 0),  # no 4-gram, no smoothing
    ("x y", "a b", 1, 0), ("", "a", 1, 0), ("a", "", 1, 0), (". .", "a", 1, 0), ("a", ".", 4, 0),
    ("天 气", "天 气", 2, 1),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "reference", "n", "score"), BLEU)
def test_bleu_has_the_recorded_values(prediction, reference, n, score):
    assert bleu(prediction, reference, n) == pytest.approx(score, rel=0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:\\s*The hypothesis contains 0 counts")  # nltk, without a match
def test_bleu_equals_nltk():
    nltk_bleu = pytest.importorskip("nltk.translate.bleu_score")
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(1, 12))] for _ in range(2))
        for n in (1, 2, 4):
            expected = nltk_bleu.sentence_bleu([b], a, (1 / n,) * n)
            assert bleu(" ".join(a), " ".join(b), n) == pytest.approx(expected, rel=0, abs=1e-12)


def test_bleu_refuses_order_zero():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        bleu("a", "a", 0)


# --- similarity ---------------------------------------------------------------------------------------------

SIMILARITY = [
    ("abcd", "bcde", 0.75),  # 2 * 3 / 8
    ("abc", "ab", 0.8),
    ("ab", "a", 0.67),  # 66.67 % rounded
    ("x = <NUM_LIT>", "x = 0", 1), ("f ( '<STR_LIT>' )", "f ( '' )", 1), ("'<CHAR_LIT>'", "''", 1),
    ("<STR_LIT:utf-8>", "utf-8", 1), ("<NUM_LIT:1> + <NUM_LIT:1>", "1 + 1", 1), ("<STR_LIT:a\nb>", "a\nb", 1),
    ("<STR_LIT:<NUM_LIT:1>> <NUM_LIT:1>", "1 1", 1),  # nested: replaced again, everywhere
    ("<STR_LIT>", "<STR_LIT>", 0),  # empty after the clean-up
    ("", "a", 0), ("a", "", 0), ("", "", 0), ("é", "é", 1), ("a", "b", 0),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "reference", "score"), SIMILARITY)
def test_similarity_has_the_recorded_values(prediction, reference, score):
    assert similarity(prediction, reference) == pytest.approx(score, rel=0, abs=1e-12)


# --- SARI ---------------------------------------------------------------------------------------------------

SARI = [
    ("a b", "a", "a", 1),
    # "c" is added wrongly: add is 0 for 1- and 2-grams, everything else is 1 or 0/0.
    ("a b", "a c", "a", (2 / 3 + 2 / 3 + 1 + 1) / 4),
    # One "a" of two is kept: keep is 1, but "a" is in the reference, so delete is 0 for 1-grams.
    ("a a", "a", "a", (2 / 3 + 1 + 1 + 1) / 4),
    # Nothing deleted: keep has precision 1/2, recall 1 for 1-grams, so F 2/3; the 2-gram is wrong.
    ("a b", "a b", "a", ((2 / 3 + 1 + 1) / 3 + (0 + 1 + 1) / 3 + 1 + 1) / 4),
    ("The Cat.", "the cat .", "THE CAT.", 1),  # lower case and 13a tokens
    ("ÄPFEL", "äpfel", "Äpfel", 1), ("", "", "", 1),
    # An empty text is one empty token, which is added wrongly; keep is 0 and delete 1 for 1-grams.
    ("a", "", "a", ((0 + 0 + 0) / 3 + 1 + 1 + 1) / 4),
]  # fmt: skip


@pytest.mark.parametrize(("source", "prediction", "reference", "score"), SARI)
def test_sari_has_the_recorded_values(source, prediction, reference, score):
    assert sari(source, prediction, reference) == pytest.approx(score, rel=0, abs=1e-12)


# --- ScienceQA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"), [("B\nBecause.", ("B", "Because.")), ("B", ("B", "")), ("B\n", ("B", "")), ("", ("", ""))]
)
def test_a_scienceqa_answer_is_split_into_letter_and_explanation(text, parts):
    assert scienceqa_parts(text) == parts


# --- all scores ---------------------------------------------------------------------------------------------


def long_text(seed: int, vocabulary: int, full_stops: float) -> str:
    """Gives 3000 random words."""
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(vocabulary)}" + "." * (rng.random() < full_stops) for _ in range(3000))


@pytest.mark.parametrize(("vocabulary", "full_stops"), [(2, 0), (300, 0.1), (300, 0.5), (100_000, 0)])
def test_long_texts_are_scored_quickly(vocabulary, full_stops):  # repeated patterns: test_fuzz.py
    source, prediction, reference = (long_text(seed, vocabulary, full_stops) for seed in range(3))
    sari("", "", "")  # imports sacrebleu, which is not what is timed
    for name, score in SCORES.items():
        start = time.process_time()
        assert 0 <= score(source, prediction, reference) <= 1, name
        assert time.process_time() - start < 2, name


def test_importing_the_scoring_loads_no_heavy_package():
    heavy = ["torch", "datasets", "evaluate", "numpy", "nltk", "sacrebleu"]
    # `trace_tasks/__init__.py` is part of what is imported, so this keeps both light.
    code = f"import sys, trace_tasks.scoring; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"
