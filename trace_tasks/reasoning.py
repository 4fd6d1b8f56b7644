"""The official reasoning form of the tasks (RCL): prompts that ask for a reasoning path, answers that hold one.

From a plain row to its row in the reasoning variant of the data. The way back, from a text with reasoning to its
answer, is `answers.extract_answer`.

Source: the official reasoning variant, https://github.com/BeyonderXX/TRACE; prompts as its test rows have them.
"""

import re
from typing import NamedTuple

from trace_tasks import scoring


class Frame(NamedTuple):
    """How a task asks, plainly and for the reasoning too, and how its answers are marked."""

    instruction: str
    """The end of the plain instruction, and what follows it."""
    asking: str
    """The same in the reasoning form."""
    cue: str
    """The end of a plain prompt."""
    reasoning_cue: str
    """The end of a prompt in the reasoning form."""
    marker: str
    """What stands between the path and the answer; for Py150 between the answer and the path."""
    form: str
    """The form of the answer for `answers.extract_answer`."""


_FIRST = "Give your reasoning first, and then the answer."
_MATH = Frame("problem.\n", f"problem. {_FIRST}\n", "Answer:", "Reasoning:", "\nAnswer:", "line")
#: Folder -> frame.
FRAMES = {
    "C-STANCE": Frame(
        "输出A，B或者C。\n", "输出A，B或者C。先给出推理，然后给出答案。\n", "态度：", "推理：", "\n回答：", "line"
    ),
    "FOMC": Frame("A, B and C.\n", f"A, B and C. {_FIRST}\n", "Stance:", "Reasoning:", "\nAnswer:", "line"),
    "MeetingBank": Frame(
        "transcripts.\n",
        f"transcripts. {_FIRST}\n",
        "Summary:",
        "Reasoning:",
        # Without a space after the full stop, as officially.
        "Therefore, the summary of the meeting transcripts is:\n",
        "summary",
    ),
    "Py150": Frame(
        "<s> ",
        "Complete the next line of the following codes. Give your answer first, and then the reasoning.\n<s> ",
        "",
        "",
        "\nReasoning:",
        "code",
    ),
    "ScienceQA": Frame(
        "question and give your reasons.\n\n",
        f"question. {_FIRST}\n",
        "Answer:",
        "Reasoning:",
        "\nAnswer:",
        "line",
    ),
    "NumGLUE-cm": _MATH,
    "NumGLUE-ds": _MATH,
    "20Minuten": Frame("German.\n", f"German. {_FIRST}\n", "Simplification:", "Reasoning:", "\nAnswer:", "text"),
}


_ASKS = re.compile(r"\A[^\n]*(?:Give your reasoning first|and then the reasoning|先给出推理)")


def row_variant(folder: str, row: dict[str, str]) -> str | None:
    """Which variant of the data a row belongs to, by what it says.

    A reasoning row asks for the reasoning in its first line, or has some before the marker of its answer. A plain row
    ends in the cue for the bare answer (Py150 has none: its plain prompts begin with the code).

    Returns:
        "reasoning", "plain", or None for a row in a frame of its own.
    """
    frame, prompt, answer = FRAMES[folder], row["prompt"], row["answer"]
    if _ASKS.search(prompt):
        return "reasoning"
    before, marker, _ = answer.partition(frame.marker)
    explained = folder == "ScienceQA" and answer[1:2] == "\n"  # a plain answer too: the letter, then its reasons
    if marker and before.strip() and not explained:
        return "reasoning"
    plain = prompt.endswith(frame.cue) if frame.cue else prompt.startswith(frame.instruction)
    return "plain" if plain else None


def reasoning_prompt(folder: str, prompt: str) -> str:
    """The prompt that asks for the reasoning too, from a plain one in the official frame.

    Raises:
        ValueError: if the prompt has another frame; the message says what is missing.
    """
    frame = FRAMES[folder]
    if frame.instruction not in prompt:
        raise ValueError(f"no {frame.instruction!r} in the prompt, by which the instruction of {folder} is known.")
    if not prompt.endswith(frame.cue):
        raise ValueError(f"the prompt ends in {prompt[-20:]!r}, not in {frame.cue!r} as those of {folder} do.")
    return prompt.replace(frame.instruction, frame.asking, 1).removesuffix(frame.cue) + frame.reasoning_cue


def bare_answer(folder: str, answer: str) -> str:
    """The answer as the reasoning variant has it: ScienceQA's is the letter without its explanation."""
    return scoring.scienceqa_parts(answer)[0] if folder == "ScienceQA" else answer


def reasoning_answer(folder: str, path: str, answer: str) -> str:
    """The training answer: the reasoning path (it may be empty), the official marker and the bare answer.

    White space around the answer is dropped, but for Py150 and MeetingBank, as officially.
    """
    frame = FRAMES[folder]
    if frame.form == "code":
        return f"{answer}{frame.marker}{path}"
    return f"{path}{frame.marker}{answer if frame.form == 'summary' else answer.strip()}"


def as_tested(prompt: str) -> str:
    """Brings a prompt of the official reasoning variant into the form that its test prompts have.

    Two tasks train on other prompts than they are tested on: 222 of MeetingBank's 376 training prompts end in
    "Reasoning:Reasoning:" (test prompts: "Reasoning:"), and 20Minuten's training prompts have no empty line before
    "Paragraph:" (all of the 200 at hand; test prompts have one). Other prompts, test prompts among them, stay as
    they are.
    """
    # The look-behind lets a run of cues be read once, not once for each of its cues.
    prompt = re.sub(r"(?<!Reasoning:)(?:Reasoning:){2,}+\Z", "Reasoning:", prompt)
    return re.sub(r"\A(Provide a simplified version [^\n]*)\nParagraph:\n", r"\1\n\nParagraph:\n", prompt)
