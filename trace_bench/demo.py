"""Demo data in the eight TRACE prompt frames, made from templates.

The real TRACE data carries licences that keep it out of this project. These rows are the project's own text,
in the frames of the benchmark to the character, but short and strongly patterned, so that a very small model
learns a task from a few dozen rows and its forgetting shows after the next tasks. Scores on them say nothing
about the real benchmark.

Run ``python -m trace_bench.demo OUT`` to write the official folder layout.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

VERSION = 1  # bump whenever a row changes: results on different versions must not be compared
SPLITS = ("train", "eval", "test")
README_TITLE = "TRACE demo data"

Row = dict[str, str]
T = TypeVar("T")
_LETTERS = ("A", "B", "C")
_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo",
    "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola", "Pia",
)  # fmt: skip


# Only Random.random() is promised to give the same numbers in every Python version, so only it is used.


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    """Draws one item."""
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Returns the items in a random order (Fisher-Yates)."""
    mixed = list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


def _row(prompt: str, answer: str) -> Row:
    return {"prompt": prompt, "answer": answer}


# C-STANCE: a short opinion about a harmless thing; the cue at the end gives the stance away.

_STANCE_FRAME = (
    "判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。\n"
    "文本：\n{text}\n对象：\n{target}\n态度："
)
_STANCE_WHO = ("我说", "他说", "她说", "老师说", "同学说", "朋友说", "妈妈说", "大家说", "店主说", "网友说")
_STANCE_TARGETS = (
    "公园", "早市", "夜市", "书店", "花园", "食堂", "广场", "校车", "晚会", "午休",
    "慢跑", "合唱", "春游", "电影节", "图书馆", "动物园", "自行车", "运动会", "音乐课", "美术馆",
)  # fmt: skip
_STANCE_CUES = {
    "A": ("很好，我支持", "太好了，我喜欢", "真好，我很高兴", "很美，大家喜欢", "非常好，我同意"),
    "B": ("不好，我反对", "太差了，真讨厌", "很坏，要取消", "不行，没有用", "太差，我不要"),
    "C": ("在学校北边", "从三月开始", "有三个门", "今天是第二天", "在城市中心"),
}


def _c_stance(rng: random.Random, label: str) -> Row:
    target = _pick(rng, _STANCE_TARGETS)
    text = f"{_pick(rng, _STANCE_WHO)}{target}{_pick(rng, _STANCE_CUES[label])}。"
    return _row(_STANCE_FRAME.format(text=text, target=target), label)


# FOMC: one sentence of minutes; the cue gives the stance away. A is dovish, unlike C-STANCE's A.

_FOMC_FRAME = (
    "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. "
    "Choose one from A, B and C.\nText:\n{text}\nStance:"
)
_FOMC_WHO = (
    "Members", "Many members", "Participants", "Several participants", "The staff", "The committee",
    "The board", "Most officials", "A few officials", "The chair", "The bank", "Two governors",
)  # fmt: skip
_FOMC_VERBS = ("said", "noted", "stated", "agreed", "observed", "reported")
_FOMC_CUES = {
    "A": (
        "weak growth calls for lower rates",
        "rates should be cut to support jobs",
        "unemployment is too high and more easing is needed",
        "inflation is too low, so policy should ease",
        "slack in the economy argues for a rate cut",
    ),
    "B": (
        "inflation is too high and rates must rise",
        "strong demand calls for higher rates",
        "rates should be raised to slow inflation",
        "prices rise too fast, so policy should tighten",
        "the tight economy argues for a rate increase",
    ),
    "C": (
        "the next meeting takes place in the spring",
        "the report describes the data in detail",
        "risks are balanced and rates stay unchanged",
        "the minutes were approved without changes",
        "a survey of banks was discussed",
    ),
}
_FOMC_TAILS = ("", " at this meeting", " this year", " on balance", " in their view")


def _fomc(rng: random.Random, label: str) -> Row:
    cue, tail = _pick(rng, _FOMC_CUES[label]), _pick(rng, _FOMC_TAILS)
    text = f"{_pick(rng, _FOMC_WHO)} {_pick(rng, _FOMC_VERBS)} that {cue}{tail}."
    return _row(_FOMC_FRAME.format(text=text), label)


# MeetingBank: talk in a council meeting; the summary is the title of the bill with slots from the talk.

_MEETING_FRAME = "Write a summary of the following meeting transcripts.\nMeeting transcripts:\n{text}\nSummary:"
_MEETING_STREETS = ("Oak", "Pine", "Lake", "Hill", "River", "Mill", "Park", "Cedar", "Maple", "Elm")
_MEETING_THINGS = ("snow removal", "street lights", "tree care", "bus stops", "bike lanes", "water pipes")
_MEETING_FIRMS = ("Acorn", "Bluebird", "Summit", "Harbor", "Meadow", "Lantern")
# kind -> (what is said, what the title says)
_MEETING_KINDS = {
    "zoning": ("new zoning for {street} Street", "changing the zoning of {street} Street"),
    "contract": ("that {firm} contract for {thing}", "approving a contract with {firm} for {thing}"),
    "parking": ("parking on {street} Street", "establishing parking rules on {street} Street"),
}
# The official transcripts glue the speakers together without a space after the full stop.
_MEETING_TALK = (
    "Madam Clerk, the next item.Item {bill} is about {said}, out in District {district}.Thank you. "
    "Any questions? No.All in favor?Aye.It passes.",
    "Good evening. Please read item {bill}.This is {said}. It is in District {district}."
    "I move it.Second.Please vote.Aye.",
    "We now turn to item {bill}. Folks asked for {said}, here in District {district}.Comments? None.Please vote.Aye.",
)


def _meetingbank(rng: random.Random, kind: str) -> Row:
    said, title = _MEETING_KINDS[kind]
    slots = {
        "street": _pick(rng, _MEETING_STREETS),
        "thing": _pick(rng, _MEETING_THINGS),
        "firm": _pick(rng, _MEETING_FIRMS),
    }
    bill, district = str(101 + int(rng.random() * 899)), str(1 + int(rng.random() * 9))
    text = _pick(rng, _MEETING_TALK).format(bill=bill, said=said.format(**slots), district=district)
    answer = f"CB {bill}: an ordinance {title.format(**slots)} in Council District {district}."
    return _row(_MEETING_FRAME.format(text=text), answer)


# Py150: the start of a tokenised file; the next line copies names from it.

_CODE_CLASSES = ("User", "Order", "Book", "Point", "Task", "Node", "Event", "Page")
_CODE_NAMES = ("name", "size", "path", "value", "color", "title", "price", "count", "level", "label")
_CODE_MODULES = ("json", "yaml", "numpy", "redis", "django", "flask", "requests", "pandas")
# kind -> (lines of the prompt, next line)
_CODE_KINDS = {
    "init": (
        (
            "import {module}",
            "class {cls} ( object ) :",
            "def __init__ ( self , {a} , {b} ) :",
            "self . {a} = {a}",
        ),
        "self . {b} = {b}",
    ),
    "getter": (
        ("class {cls} ( object ) :", "kind = '<STR_LIT:{a}>'", "def get_{b} ( self ) :"),
        "return self . {b}",
    ),
    "import": (
        ("import os", "{a} = <NUM_LIT:{digit}>", "try :", "import {module}", "except ImportError :"),
        "{module} = None",
    ),
    "sum": (
        (
            "import {module}",
            "def sum_{a} ( items ) :",
            "{b} = <NUM_LIT:0>",
            "for x in items :",
            "{b} += x . {a}",
        ),
        "return {b}",
    ),
}


def _py150(rng: random.Random, kind: str) -> Row:
    lines, answer = _CODE_KINDS[kind]
    first, second = _shuffled(rng, _CODE_NAMES)[:2]
    slots = {"cls": _pick(rng, _CODE_CLASSES), "a": first, "b": second, "module": _pick(rng, _CODE_MODULES)}
    slots["digit"] = str(int(rng.random() * 10))
    prompt = "<s> " + "".join(f"{line.format(**slots)} <EOL> " for line in lines)
    return _row(prompt.rstrip(), answer.format(**slots))


# ScienceQA: kinds of things, told by a clue that repeats. Kind = the correct letter. Each question has its
# choices in one fixed order: a 135M model stayed at chance when it had to look up the letter of its choice,
# and came to half right without the clue.

_SCIENCE_FRAME = (
    "Choose an answer for the following question and give your reasons.\n\n"
    "Question:\n{question}{hint}\n\nChoices:\n{choices}\n\nAnswer:"
)
_SCIENCE_VERBS = ("studies", "asks about", "reads about")
# (question, ((choice, clue, things), ...))
_SCIENCE_FACTS = (
    (
        "Which state is it?",
        (
            ("a solid", "It keeps its shape.", ("a stone", "a coin", "a brick", "a spoon")),
            ("a liquid", "It can be poured.", ("milk", "juice", "tea", "oil")),
            ("a gas", "It fills any space.", ("steam", "air", "oxygen", "helium")),
        ),
    ),
    (
        "Which animal is it?",
        (
            ("a bird", "It has feathers.", ("a hen", "a goose", "a robin", "a swan")),
            ("a fish", "It has gills.", ("a trout", "a salmon", "a shark", "a carp")),
            ("a mammal", "It drank milk from its mother.", ("a dog", "a cow", "a bear", "a rabbit")),
        ),
    ),
    (
        "Which thing is it?",
        (
            ("a tool", "It helps people to work.", ("a hammer", "a saw", "a shovel", "a drill")),
            ("a plant", "It makes food from light.", ("a tulip", "a rose", "a fern", "an oak tree")),
            ("a planet", "It goes around the sun.", ("Mars", "Venus", "Saturn", "Jupiter")),
        ),
    ),
    (
        "Is it attracted by a magnet?",
        (
            ("attracted", "It contains iron.", ("a nail", "a steel pin", "a pan", "a steel key")),
            (
                "not attracted",
                "It contains no metal.",
                ("a paper cup", "a sock", "a wooden bowl", "a glass jar"),
            ),
        ),
    ),
)


def _scienceqa(rng: random.Random, letter: str) -> Row:
    index = _LETTERS.index(letter)
    # Two choices cannot have C, so such questions stay few: three choices must hardly hint at C.
    question, answers = _pick(rng, [fact for fact in _SCIENCE_FACTS if index < len(fact[1])])
    choice, clue, things = answers[index]
    thing = _pick(rng, things)
    told = f"{_pick(rng, _NAMES)} {_pick(rng, _SCIENCE_VERBS)} {thing}."
    hint = rng.random() < 0.3
    prompt = _SCIENCE_FRAME.format(
        question=f"{told} {question}" if hint else f"{told} {clue} {question}",
        hint=f"\n\nHint:\n{clue}" if hint else "",
        choices="\n".join(f"{mark}. {text}" for mark, (text, _, _) in zip(_LETTERS, answers, strict=False)),
    )
    return _row(prompt, f"{letter}\n{thing[0].upper()}{thing[1:]} is {choice}.")


# NumGLUE: tiny numbers, few different answers.

_MATH_FRAME = "Solve the following math problem.\nQuestion:\n{question}\nAnswer:"
_LEGS = {"dogs": 4, "cats": 4, "hens": 2, "ducks": 2, "ants": 6}
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _numglue_cm(rng: random.Random, kind: str) -> Row:
    name, number = _pick(rng, _NAMES), 2 + int(rng.random() * 3)
    if kind == "legs":
        animal = _pick(rng, tuple(_LEGS))
        question = f"{name} sees {number} {animal}. How many legs do they have in all?"
        answer = str(number * _LEGS[animal])
    elif kind == "weeks":
        verb = _pick(rng, ("travels", "works", "rests", "paints"))
        question, answer = f"{name} {verb} for {number} weeks. How many days is that?", str(number * 7)
    elif kind == "weekday":
        day = int(rng.random() * 7)
        verb = _pick(rng, ("leave", "sing", "cook"))
        question = f"Today is {_WEEKDAYS[day]}. {name} will {verb} tomorrow. On which day does {name} {verb}?"
        answer = _WEEKDAYS[(day + 1) % 7]
    else:
        thing = _pick(rng, ("shoes", "socks", "gloves", "skates"))
        question = f"{name} owns {number} pairs of {thing}. How many {thing} is that?"
        answer = str(number * 2)
    return _row(_MATH_FRAME.format(question=question), answer)


# (one substance, the other one, what forms); each reacts one to one
_REACTIONS = (
    ("HCl", "NaOH", "NaCl"), ("HBr", "KOH", "KBr"), ("NH3", "HCl", "NH4Cl"), ("HF", "KOH", "KF"),
    ("CaO", "H2O", "Ca(OH)2"), ("CaO", "CO2", "CaCO3"), ("MgO", "CO2", "MgCO3"), ("SO3", "H2O", "H2SO4"),
)  # fmt: skip
_THINGS = (
    "car", "cart", "ball", "box", "train", "bike", "boat",
    "sled", "truck", "robot", "bus", "kite", "drone", "toy",
)  # fmt: skip


def _numglue_ds(rng: random.Random, kind: str) -> Row:
    thing = _pick(rng, _THINGS)
    first, second = 2 + int(rng.random() * 4), 2 + int(rng.random() * 2)
    if kind == "moles":
        left, right, product = _pick(rng, _REACTIONS)
        # More amounts than elsewhere: the answer is copied, so larger numbers stay easy.
        first = 1 + int(rng.random() * 9)
        verb = _pick(rng, ("formed on combining", "made from", "obtained by mixing"))
        s = "s" if first > 1 else ""
        parts = f"{first} mole{s} of {left} and {first} mole{s} of {right}"
        question = f"Find the number of moles of {product} {verb} {parts}"
        answer = first
    elif kind == "force":
        verb = _pick(rng, ("speeds up", "accelerates"))
        question = f"A {thing} of {first} kg {verb} at {second} m/s^2. Find the force in newtons"
        answer = first * second
    else:
        verb = _pick(rng, ("moves", "travels"))
        question = f"A {thing} {verb} {first * second} m in {second} s. Find its speed in m/s"
        answer = first
    return _row(_MATH_FRAME.format(question=question), str(answer))


# 20Minuten: two sentences of local news; the simple version keeps the place and one more slot.

_NEWS_FRAME = (
    "Provide a simplified version of the following paragraph in German.\n\nParagraph:\n{text}\n\nSimplification:"
)
_NEWS_TOWNS = ("Bern", "Basel", "Chur", "Thun", "Olten", "Aarau", "Zug", "Luzern", "Baden", "Wil")
_NEWS_DAYS = ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag")
_NEWS_HOUSES = ("Museum", "Theater", "Kino", "Hotel", "Hallenbad", "Restaurant")
_NEWS_ANIMALS = ("Hund", "Esel", "Papagei", "Hamster", "Pinguin", "Igel")
_NEWS_CROWDS = ("200", "300", "500", "800")
# kind -> (paragraph, simple version)
_NEWS_KINDS = {
    "house": (
        "Nach langer Bauzeit wird am {day} in {town} ein neues {house} eröffnet. "
        "Die Verantwortlichen erwarten rund {crowd} Besucher.",
        "{town} hat bald ein neues {house}. Es öffnet am {day}.\n",
    ),
    "animal": (
        "Eine Spaziergängerin hat am {day} bei {town} einen entlaufenen {animal} entdeckt. "
        "Das Tier wurde unverletzt ins Tierheim gebracht.",
        "Eine Frau hat in {town} einen {animal} gefunden. Es geht ihm gut.\n",
    ),
    "train": (
        "Wegen umfangreicher Bauarbeiten verkehren am {day} keine Züge zwischen {town} und {town2}. "
        "Betroffen sind rund {crowd} Reisende.",
        "Am {day} fährt kein Zug von {town} nach {town2}.\n",
    ),
}


def _20minuten(rng: random.Random, kind: str) -> Row:
    paragraph, simple = _NEWS_KINDS[kind]
    town, other = _shuffled(rng, _NEWS_TOWNS)[:2]
    slots = {
        "town": town,
        "town2": other,
        "day": _pick(rng, _NEWS_DAYS),
        "house": _pick(rng, _NEWS_HOUSES),
        "animal": _pick(rng, _NEWS_ANIMALS),
        "crowd": _pick(rng, _NEWS_CROWDS),
    }
    return _row(_NEWS_FRAME.format(text=paragraph.format(**slots)), simple.format(**slots))


# folder -> (kinds, one row of a kind); the kinds are spread evenly over every split.
_MAKERS: dict[str, tuple[tuple[str, ...], Callable[[random.Random, str], Row]]] = {
    "C-STANCE": (_LETTERS, _c_stance),
    "FOMC": (_LETTERS, _fomc),
    "MeetingBank": (tuple(_MEETING_KINDS), _meetingbank),
    "Py150": (tuple(_CODE_KINDS), _py150),
    "ScienceQA": (_LETTERS, _scienceqa),
    "NumGLUE-cm": (("legs", "weeks", "weekday", "pairs"), _numglue_cm),
    "NumGLUE-ds": (("moles", "force", "speed"), _numglue_ds),
    "20Minuten": (tuple(_NEWS_KINDS), _20minuten),
}
TASKS = tuple(_MAKERS)


def _make_task(task: str, seed: int, rows: tuple[int, int, int]) -> dict[str, list[Row]]:
    """Makes the splits of one task without a prompt that occurs twice."""
    kinds, make = _MAKERS[task]
    # A string seed goes through SHA-512, not through hash(), so it is the same on every machine.
    rng = random.Random(f"trace-demo-{VERSION}-{seed}-{task}")
    seen: set[str] = set()
    splits: dict[str, list[Row]] = {}
    # The test rows come first so that they stay the same when only the number of training rows changes.
    for split, count in reversed(list(zip(SPLITS, rows, strict=True))):
        order = _shuffled(rng, kinds)
        made: list[Row] = []
        for kind in _shuffled(rng, [order[i % len(order)] for i in range(count)]):
            for _ in range(2000):
                row = make(rng, kind)
                if row["prompt"] not in seen:
                    break
            else:
                raise ValueError(f"{task}: the templates give too few different rows for {rows}")
            seen.add(row["prompt"])
            made.append(row)
        splits[split] = made
    return {split: splits[split] for split in SPLITS}


def make_demo(seed: int = 0, rows: tuple[int, int, int] = (64, 8, 24)) -> dict[str, dict[str, list[Row]]]:
    """Makes the demo data.

    Args:
        seed: Another seed gives other rows from the same templates.
        rows: Number of train, eval and test rows of each task.

    Returns:
        Task folder -> split -> rows of ``prompt`` and ``answer``.

    Raises:
        ValueError: If the templates cannot give that many different rows.
    """
    return {task: _make_task(task, seed, rows) for task in TASKS}


def write_demo(root: Path, seed: int = 0) -> None:
    """Writes the demo data as ``<TASK>/{train,eval,test}.json`` plus a README.txt.

    Args:
        root: Folder to write to; earlier demo data in it is replaced.
        seed: See ``make_demo``.

    Raises:
        FileExistsError: If the folder holds task folders that are not demo data.
    """
    readme = root / "README.txt"
    is_demo = readme.is_file() and readme.read_text(encoding="utf-8").startswith(README_TITLE)
    # The layout is the official one, so a slip of the path must not overwrite the real benchmark.
    if not is_demo and any((root / task).exists() for task in TASKS):
        raise FileExistsError(f"{root} holds task folders that are not demo data")
    root.mkdir(parents=True, exist_ok=True)
    readme.write_text(
        f"{README_TITLE}, version {VERSION}, seed {seed}\n\n"
        "Made from templates by trace_bench.demo in the prompt frames of TRACE (arXiv 2310.06762).\n"
        "It holds no row of the benchmark. Scores on it are NOT comparable with TRACE: it only shows\n"
        "that training, evaluation and forgetting work end to end.\n",
        encoding="utf-8",
        newline="\n",
    )
    for task, splits in make_demo(seed).items():
        folder = root / task
        folder.mkdir(exist_ok=True)
        for split, made in splits.items():
            text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
            (folder / f"{split}.json").write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("python -m trace_bench.demo", description="Write the TRACE demo data.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_demo(args.out, args.seed)
    print(f"wrote {len(TASKS)} demo tasks to {args.out}")


if __name__ == "__main__":
    main()
