"""A run's recipe, typed and frozen: what each key means, its unit, and which values cannot go together.

A recipe is one YAML file. `base:` names another recipe that it changes; `a.b=c` on the command line changes it last.
Reading files is in llama/recipe.py; this folder is only the meaning, a file a subject, and recipe.py holds them together.
"""

from llama.config.data import BlendKeys, Chat, Data, Source, Sources, Tokens
from llama.config.lora import Lora
from llama.config.model import Model, RopeScaling
from llama.config.parallel import LOOPED, ZERO_BUBBLE, Parallel, ScheduleName
from llama.config.recipe import Recipe
from llama.config.running import Checkpoint, Log, Resilience
from llama.config.section import Count, NonNegative, Section
from llama.config.train import Guard, Optimizer, Precision, Schedule, Train
from llama.config.validation import Validation

__all__ = [
    "LOOPED", "ZERO_BUBBLE", "BlendKeys", "Chat", "Checkpoint", "Count", "Data", "Guard", "Log", "Lora", "Model",
    "NonNegative", "Optimizer", "Parallel", "Precision", "Recipe", "Resilience", "RopeScaling", "Schedule",
    "ScheduleName", "Section", "Source", "Sources", "Tokens", "Train", "Validation",
]  # fmt: skip
