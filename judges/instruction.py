"""Instruction following: the answers of a stage against those of the base model, and refusals of benign requests."""

from judges import prompts
from judges.pairwise import Kind

KIND = Kind(
    name="instruction",
    title="Instruction following",
    prefix="instruct_",
    pair=prompts.instruction_pair,
    direct=prompts.refusal,
    words=prompts.REFUSAL,
    counted="REFUSED",
    rate="over-refusal",
    leaves_out_broken=False,
)
