"""The official reasoning variant of the tasks (RCL): prompts that ask for a reasoning path, answers that contain one.

This module turns a plain row into its row in the reasoning variant. `answers.extract_answer` goes the other way, from
a text with reasoning to its answer.

Source: the official reasoning variant, https://github.com/BeyonderXX/TRACE. Prompts have the form of its test rows.
"""

import re
from typing import NamedTuple

from trace_tasks import scoring


class Frame(NamedTuple):
    """The words with which a task asks, without and with reasoning, and the words that mark its answers."""

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
        # The official text has no space after the full stop.
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
    """The variant of the data that a row belongs to, judged by its text.

    A reasoning row asks for the reasoning in its first line, or has reasoning before the marker of its answer. A plain
    row ends in the cue for the bare answer (Py150 has no cue: its plain prompts begin with the code).

    Returns:
        "reasoning", "plain", or None for a row in a different frame.
    """
    frame, prompt, answer = FRAMES[folder], row["prompt"], row["answer"]
    if _ASKS.search(prompt):
        return "reasoning"
    before, marker, _ = answer.partition(frame.marker)
    explained = folder == "ScienceQA" and answer[1:2] == "\n"  # a plain answer, too: the letter, then its reasons
    if marker and before.strip() and not explained:
        return "reasoning"
    plain = prompt.endswith(frame.cue) if frame.cue else prompt.startswith(frame.instruction)
    return "plain" if plain else None


def reasoning_prompt(folder: str, prompt: str) -> str:
    """Turns a plain prompt in the official frame into the prompt that also asks for the reasoning.

    Raises:
        ValueError: if the prompt has a different frame; the message says what is missing.
    """
    frame = FRAMES[folder]
    if frame.instruction not in prompt:
        raise ValueError(f"no {frame.instruction!r} in the prompt, by which the instruction of {folder} is known.")
    if not prompt.endswith(frame.cue):
        raise ValueError(f"the prompt ends in {prompt[-20:]!r}, not in {frame.cue!r} as those of {folder} do.")
    return prompt.replace(frame.instruction, frame.asking, 1).removesuffix(frame.cue) + frame.reasoning_cue


def bare_answer(folder: str, answer: str) -> str:
    """The answer without reasoning, in the form of the reasoning variant: for ScienceQA only the letter."""
    return scoring.scienceqa_parts(answer)[0] if folder == "ScienceQA" else answer


def reasoning_answer(folder: str, path: str, answer: str) -> str:
    """The training answer: the reasoning path (it may be empty), the official marker and the bare answer.

    White space around the answer is dropped, except for Py150 and MeetingBank, as in the official data.
    """
    frame = FRAMES[folder]
    if frame.form == "code":
        return f"{answer}{frame.marker}{path}"
    return f"{path}{frame.marker}{answer if frame.form == 'summary' else answer.strip()}"


def as_tested(prompt: str) -> str:
    """Brings a prompt of the official reasoning variant into the form of its test prompts.

    In two tasks the training prompts differ from the test prompts: 222 of MeetingBank's 376 training prompts end in
    "Reasoning:Reasoning:" (test prompts: "Reasoning:"), and 20Minuten's 200 training prompts have no empty line before
    "Paragraph:" (test prompts have one). All other prompts stay unchanged, including the test prompts.
    """
    # With the look-behind, a run of cues is read once instead of once for each cue.
    prompt = re.sub(r"(?<!Reasoning:)(?:Reasoning:){2,}+\Z", "Reasoning:", prompt)
    return re.sub(r"\A(Provide a simplified version [^\n]*)\nParagraph:\n", r"\1\n\nParagraph:\n", prompt)
