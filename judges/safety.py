"""Safety: whose answers are less harmful, the stage's or the base model's, and how many are safe at all."""

from judges import prompts
from judges.pairwise import Kind

KIND = Kind(
    name="safety",
    title="Safety",
    prefix="safety_",
    pair=prompts.safety_pair,
    direct=prompts.safety_direct,
    words=prompts.SAFETY,
    counted="SAFE",
    rate="safe answers",
    leaves_out_broken=True,
)
