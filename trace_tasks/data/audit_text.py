"""Prints the report of an audit as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: Key of a finding in the report -> its words.
FINDINGS = {
    "bad_rows": "rows that are left out here since they cannot be used",
    "contradicting": "prompts with different answers",
    "not_offered": "answers that are none of the options",
    "other_variant": "rows of the other variant (asking for reasoning, or not)",
    "doubled_cue": "prompts with the cue for the answer twice",
    "mojibake": "rows with broken characters",
    "white_space": "answers that end in white space",
    "floats": "answers with a number such as 1.4300000000000002",
    "words": "answers that are no number, where most are one",
}


def as_text(report: dict[str, Any]) -> str:
    """The report of `audit` as text: a table for each task, and the findings below it."""
    unit = "tokens" if report["tokenizer"] else "characters"
    lines = [report["source"] + (" (demo data made by this program)" if report["demo"] else "")]
    if report["tokenizer"]:
        lines.append(
            f"Lengths in tokens of {report['tokenizer']}; cut: prompts longer than {report['max_prompt_length']}, "
            f"answers longer than {report['max_answer_length']} with EOS."
        )
    else:
        lines.append("Lengths in characters, as there is no tokenizer at hand (--tokenizer MODEL).")
    for task, found in report["tasks"].items():
        lines += ["", *_table(task, found["splits"], unit), *_findings(found)]
    lines.append("")
    if report["missing"]:
        lines.append(f"Not there: {', '.join(report['missing'])}.")
    lines += [f"Unreadable: {problem}" for problem in report["unreadable"]]
    if report["equal"]:
        lines.append(f"Eval equals test, so nothing may be chosen by it: {', '.join(report['equal'])}.")
    leaked = {task: (len(rows["exact"]), len(rows["near"])) for task, rows in report["leaked"].items()}
    counts = "; ".join(f"{task} {exact} and nearly {near}" for task, (exact, near) in leaked.items() if exact or near)
    lines.append(f"Test rows whose prompt is in the training rows: {counts or 'none'}.")
    none = "" if report["across"] else " none."
    lines.append(f"Test rows whose prompt is in the training rows of another task or data set:{none}")
    lines += [
        f"  {both['test']} test in {both['train']} train: {len(both['exact'])} and nearly {len(both['near'])} of "
        f"{both['rows']}"
        for both in report["across"]
    ]
    return "\n".join(lines)


def _table(task: str, splits: dict[str, dict[str, Any] | None], unit: str) -> Iterator[str]:
    sizes = ["median", "95 %", "max", *(["cut"] if unit == "tokens" else [])]
    head = [f"{field} {sizes[0]}" if i == 0 else name for field in ("prompt", "answer") for i, name in enumerate(sizes)]
    yield f"{task:<22}{'rows':>6}{'prompts':>9} " + "".join(f"{h:>{max(8, len(h) + 2)}}" for h in head) + "  file"
    for split, facts in splits.items():
        if facts is None:
            yield f"  {split:<20}  missing"
            continue
        numbers = [n for field in ("prompt", "answer") for n in facts[field][unit].values()]
        cells = "".join(f"{n:>{max(8, len(h) + 2)}}" for n, h in zip(numbers, head, strict=True))
        official = f"  official: {facts['official']}" if facts["official"] else ""
        yield f"  {split:<20}{facts['rows']:>6}{facts['unique_prompts']:>9} {cells}  {facts['sha256'][:16]}{official}"


def _findings(found: dict[str, Any]) -> Iterator[str]:
    splits = {split: facts for split, facts in found["splits"].items() if facts}
    labels = [
        f"{split} " + ", ".join(f"{label!r} {n}" for label, n in facts["labels"].items())
        for split, facts in splits.items()
        if facts["labels"]
    ]
    if labels:
        yield f"  answers: {'; '.join(labels)}"
    for pair, both in found["overlaps"].items():
        if both["exact"] or both["near"]:
            a, b = pair.split("/")
            same = f"{len(both['exact'])} ({both['exact_prompts']} prompts), nearly {len(both['near'])}"
            yield f"  {pair}: rows of {b} that are in {a}: " + (same if " " not in a else str(len(both["near"])))
    for key, what in FINDINGS.items():
        counts = ", ".join(f"{split} {len(facts[key])}" for split, facts in splits.items() if facts[key])
        if counts:
            first = next(facts[key][0] for facts in splits.values() if facts[key])
            example = {"bad_rows": "problem", "mojibake": "text"}.get(key)
            yield f"  {what}: {counts}" + (f", as {first[example]!r}" if example else "")
