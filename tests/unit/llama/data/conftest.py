"""Token files for the data tests, and megatron-core as oracle of their order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.indexed import IndexedWriter
from tests.oracles import oracle

EOD = 0


@pytest.fixture
def token_file(tmp_path: Path) -> Callable[..., str]:
    """token_file(lengths, name, vocab, dtype) writes documents of random ids that end in EOD; returns the prefix."""

    def write(lengths: Sequence[int], name: str = "text", vocab: int = 1000, dtype: Any = np.uint16) -> str:
        random = np.random.default_rng(len(lengths))
        with IndexedWriter(tmp_path / name, dtype) as writer:
            for length in lengths:
                ids = random.integers(1, vocab, length)
                ids[-1:] = EOD
                writer.add_document(ids)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def megatron() -> SimpleNamespace:
    """The parts of megatron-core's data layer that the tests compare with."""
    gpt = oracle("megatron.core.datasets.gpt_dataset")
    builder = oracle("megatron.core.datasets.blended_megatron_dataset_builder")
    helpers = oracle("megatron.core.datasets.helpers")
    utils = oracle("megatron.core.datasets.utils")

    def config(**options: Any) -> Any:
        base = {
            "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False,
            "create_attention_mask": False,
            "tokenizer": SimpleNamespace(vocab_size=1000, eod=EOD, unique_identifiers={}),
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gpt.GPTDatasetConfig(**(base | options))

    def build(sizes: Sequence[int], **options: Any) -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = builder.BlendedMegatronDatasetBuilder
            return list(kind(gpt.GPTDataset, list(sizes), lambda: True, config(**options)).build())

    return SimpleNamespace(config=config, build=build, gpt=gpt, helpers=helpers, normalize=utils.normalize)
