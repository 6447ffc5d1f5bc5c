"""Encoding on many ranks: the first does it, the others wait and map what it wrote."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from data_prep.errors import UserError
from llama.chat.encoded import cache_of, open_encoded
from llama.config import Recipe

PATIENCE = 60.0  # seconds that a network's file system may take to show another node's folder


def encode_together(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Make sure that every rank finds the recipe's conversations encoded; nothing for token files. Collective.

    Raises the first rank's UserError on all.
    """
    if recipe.chat is None:
        return
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            sets = [recipe.data.train]
            if recipe.data.validation and recipe.validation.interval:
                sets.append(recipe.data.validation)
            told = [("ok", [open_encoded(recipe, sources, say=say).folder.name for sources in sets])]
        except UserError as error:
            told = [(str(error), error.code)]
    dist.broadcast_object_list(told, src=0)
    message, rest = told[0]
    if message != "ok":
        raise UserError(message, rest)
    wanted = [cache_of(recipe) / name / "facts.json" for name in rest]
    deadline = time.monotonic() + PATIENCE
    while missing := [path for path in wanted if not path.is_file()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0].parent} was encoded by the first rank and is not seen here; set chat.cache to a folder "
                "that all nodes see"
            )
        time.sleep(0.2)
