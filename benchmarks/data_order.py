"""Seconds to lay out the order of many documents and of a blend: ours beside megatron-core's C++ helpers.

python benchmarks/data_order.py [DOCUMENTS] [BLEND_SAMPLES] prints one JSON line with the machine it ran on.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from data_prep.indexed import IndexedDataset
from llama.data.blend import lay_out, normalized
from llama.data.samples import Samples, cut_samples

SEQ_LENGTH = 8192
MEAN_TOKENS = 1000


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return round(time.perf_counter() - start, 3), result


def main(documents: int, blend_samples: int) -> None:
    lengths = np.random.default_rng(1).exponential(MEAN_TOKENS, documents).astype(np.int32) + 1
    total = int(lengths.sum(dtype=np.int64))
    dataset = cast(IndexedDataset, SimpleNamespace(lengths=lengths, prefix="benchmark"))
    samples = Samples(dataset, (0, documents), SEQ_LENGTH, None, 1)
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "numpy": np.__version__,
        "documents": documents,
        "samples": samples.period,
        "blend_samples": blend_samples,
    }
    report["whole_order_s"], order = seconds(samples.order)
    report["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report["sample_index_s"], ours = seconds(lambda: cut_samples(lengths, order.documents, SEQ_LENGTH, samples.period))
    shares = normalized([0.5, 0.3, 0.15, 0.05])
    report["blend_s"], (sources, _) = seconds(lambda: lay_out(shares, blend_samples))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import helpers
    except ImportError:
        print(json.dumps(report))
        return
    report["megatron_sample_index_s"], theirs = seconds(
        lambda: helpers.build_sample_idx(lengths, order.documents, SEQ_LENGTH, 1, total)
    )
    their_sources, their_samples = np.zeros(blend_samples, np.int16), np.zeros(blend_samples, np.int64)
    report["megatron_blend_s"], _ = seconds(
        lambda: helpers.build_blending_indices(their_sources, their_samples, shares, len(shares), blend_samples, False)
    )
    report["equal"] = bool(np.array_equal(ours, theirs) and np.array_equal(sources, their_sources))
    print(json.dumps(report))


if __name__ == "__main__":
    sizes = [int(float(argument)) for argument in sys.argv[1:]]
    main(*(sizes + [10_000_000, 10_000_000][len(sizes) :]))
