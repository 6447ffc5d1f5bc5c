"""Engines that encode text faster than the official tokenizers, used only where they give the same ids.

An engine is a library that reads a tokenizer.json: fastokens, or gigatoken where it is installed. `choose` certifies
each on a sample of the real text and on texts that are made to be hard; whoever uses one goes on checking a share of
its work with `check`. "official" is the tokenizer itself. Every engine works on one thread: processes are the
parallelism.
"""

from data_prep.engines.choice import Choice, check, choose
from data_prep.engines.kinds import ENGINES, Engine, load_engine

__all__ = ["ENGINES", "Choice", "Engine", "check", "choose", "load_engine"]
