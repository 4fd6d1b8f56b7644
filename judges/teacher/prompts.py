"""What a teacher is told and shown for a task: a YAML file each, the built-in ones in this folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from judges import JudgeError
from judges.prompts import Messages, block
from judges.teacher.paths import path_problem
from trace_tasks import data
from trace_tasks.reasoning import FRAMES, reasoning_answer

FOLDER = Path(__file__).parent

_Text = Annotated[str, Field(pattern=r"\S")]
_CONFIG = ConfigDict(extra="forbid", frozen=True)


@dataclass(config=_CONFIG)
class Demonstration:
    """A row of the task with its reasoning path; the prompt is in the reasoning form."""

    prompt: _Text
    reasoning: _Text
    answer: _Text


@dataclass(config=_CONFIG)
class TeacherPrompt:
    """The file of a task. `shown` is added to the instruction where the right answer is shown."""

    instruction: _Text
    shown: _Text
    demonstrations: Annotated[list[Demonstration], Field(min_length=3, max_length=3)]

    def messages(self, folder: str, prompt: str, answer: str | None) -> Messages:
        """The demonstrations as earlier turns of a chat, then the row's prompt in the reasoning form.

        The right answer is shown where it is given. `neutralise` changes nothing in the official training data but the
        "<s>" before every prompt of Py150. It also breaks "[[", which means nothing here, and an answer copied with one
        space more is close enough.
        """
        messages = []
        for demo in self.demonstrations:
            reply = reasoning_answer(folder, demo.reasoning, demo.answer)
            messages.append(_turn(demo.prompt, None if answer is None else demo.answer))
            messages.append({"role": "assistant", "content": reply})
        told = self.instruction if answer is None else f"{self.instruction}\n\n{self.shown}"
        messages[0]["content"] = f"{told}\n\n{messages[0]['content']}"
        return [*messages, _turn(prompt, answer)]


def _turn(prompt: str, answer: str | None) -> dict[str, str]:
    blocks = [block("TASK", prompt)] + ([] if answer is None else [block("RIGHT ANSWER", answer)])
    return {"role": "user", "content": "\n\n".join(blocks)}


def prompt_files(tasks: Iterable[str], own: Path | None = None) -> dict[str, Path]:
    """The file for each task: that of the user's folder where it has one, or the built-in one.

    Raises:
        JudgeError: if that folder has none, or files for tasks that do not exist.
    """
    names = {task: f"{task.removeprefix('trace_')}.yaml" for task in data.FOLDERS}
    if own and not own.is_dir():
        raise JudgeError(f"--prompts {own} is not a folder. Give one with files such as those in {FOLDER}.")
    given = {file.name for file in own.glob("*.yaml")} if own else set()
    if own and (not given or given - set(names.values())):
        raise JudgeError(
            f"--prompts {own} has the files {', '.join(sorted(given)) or 'none'}. Name them "
            f"{', '.join(names.values())}, as in {FOLDER}, whose files are used for tasks without one."
        )
    return {task: (own if own and names[task] in given else FOLDER) / names[task] for task in tasks}


def read_prompt(file: Path, folder: str) -> TeacherPrompt:
    """Reads and checks the file of a task.

    Raises:
        JudgeError: naming the file, and what is wrong in it.
    """
    try:
        prompt = TypeAdapter(TeacherPrompt).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise JudgeError(f"{file} is not YAML: {e}") from e
    except ValidationError as e:
        error = e.errors()[0]
        found = "" if error["type"] == "missing" else f" (found {error['input']!r:.60})"
        raise JudgeError(
            f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}{found}. Use the keys instruction, shown and "
            "demonstrations, a list of 3 with prompt, reasoning and answer. All are text: put numbers into quotes."
        ) from None
    frame = FRAMES[folder]
    for i, demo in enumerate(prompt.demonstrations, 1):
        problem = path_problem(folder, demo.reasoning, demo.answer)
        if frame.asking not in demo.prompt or not demo.prompt.endswith(frame.reasoning_cue):
            problem = f"the prompt must contain {frame.asking!r} and end in {frame.reasoning_cue!r}"
        if problem:
            raise JudgeError(f"{file}, demonstration {i}: {problem}.")
    return prompt
