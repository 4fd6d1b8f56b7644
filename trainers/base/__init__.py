"""What every method is made of: a configuration, a trainer for one stage, and the loop over the stages.

stages        `main`, and the loop over the stages
config        CLConfig: options and their checks
options       checks of LoRA, the optimizer and its schedule
tuned         tables of methods' settings
preflight     refuses what cannot work before the first stage
trainer       CLTrainer: the hooks of a method
gradients     losses and gradients
checkpoints   what a stage saves and resumes from
progress      progress bar, progress file and logs
rows          chooses the rows of a task that are remembered
sampler       batches of rows of similar length
blocks        the blocks of a decoder
writing       answers that a model of the run writes between stages
answering     the process that generates them
sampling      answers that the model samples while it is trained
"""

from trainers.base.blocks import adapted_parameters, count, decoder_blocks, shape, text_model
from trainers.base.checkpoints import save_tensors, sort_names
from trainers.base.config import CLConfig, ConfigError, option, refuse_losses, refuse_reentrant
from trainers.base.gradients import divergences, of_tokens
from trainers.base.preflight import causal_config, empty_adapted, refuse_shards, require_context
from trainers.base.rows import CHOICES, choose_rows, ranked_rows
from trainers.base.sampler import LengthGrouped
from trainers.base.sampling import sampled
from trainers.base.stages import main, train
from trainers.base.trainer import CLTrainer, frozen_in_bf16
from trainers.base.writing import check_scores

__all__ = [
    "CHOICES",
    "CLConfig",
    "CLTrainer",
    "ConfigError",
    "LengthGrouped",
    "adapted_parameters",
    "causal_config",
    "check_scores",
    "choose_rows",
    "count",
    "decoder_blocks",
    "divergences",
    "empty_adapted",
    "frozen_in_bf16",
    "main",
    "of_tokens",
    "option",
    "ranked_rows",
    "refuse_losses",
    "refuse_reentrant",
    "refuse_shards",
    "require_context",
    "sampled",
    "save_tensors",
    "shape",
    "sort_names",
    "text_model",
    "train",
]
