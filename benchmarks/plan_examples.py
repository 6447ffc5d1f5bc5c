"""Writes docs/plan-examples.md anew: the output of every `$ herd plan ...` in it, and the table of others' measured runs.

    python benchmarks/plan_examples.py          # about three minutes on one core

A block of code that begins with `$ herd plan` gets what the command prints now; what stands between the two marks of the
table is counted by formulas. All other text stays.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "plan-examples.md"
BLOCK = re.compile(r"```console\n\$ (herd plan (?:[^\n]*\\\n)*[^\n]*)\n.*?```", re.DOTALL)
TABLE = re.compile(r"(<!-- measured by others -->\n).*?(<!-- end -->)", re.DOTALL)

FULL, SELECTIVE, NONE = (f"train.activation_checkpointing={mode}" for mode in ("full", "selective", "none"))
ALONE = "parallel.tensor_parallel=1"
TITAN, OLDER, MOSAIC = "[torchtitan][]", "[torchtitan][older]", "[llm-foundry][]"
# Who, what in words, recipe, nodes, their type, overrides, tokens/s a GPU (None: their model differs) and MFU in per cent.
MEASURED: tuple[tuple[str, str, str, int, str, tuple[str, ...], int | None, float | None], ...] = (
    (TITAN, "8B 8K, 8 H100 of 500 W, FSDP, selective, compiled", "llama3.1_8b_gpu", 1, "8xh100",
     ("train.micro_batch_size=2", "train.global_batch_size=16"), 6667, None),
    (TITAN, "the same, not compiled", "llama3.1_8b_gpu", 1, "8xh100",
     ("train.micro_batch_size=2", "train.global_batch_size=16", "train.compile=false"), 5762, None),
    (TITAN, "the same on 128, compiled", "llama3.1_8b_gpu", 16, "8xh100",
     ("train.micro_batch_size=2", "train.global_batch_size=256"), 6514, None),
    (OLDER, "8B 8K, 64 A100, FSDP, selective", "llama3.1_8b_gpu", 8, "8xa100", ("train.global_batch_size=64",), 2973, 58.2),
    (OLDER, "70B 8K, 64 A100, FSDP, full", "llama3.1_70b_gpu", 8, "8xa100", (ALONE, "train.global_batch_size=64"), 331, 51.7),
    (OLDER, "405B 8K, 128 H100 of 94 GB, FSDP × TP 8, full, two sequences", "llama3.1_405b_gpu", 16, "8xh100",
     ("train.global_batch_size=32",), 109, None),
    (MOSAIC, "70B 2K, 32 H100, FSDP, full, two sequences", "llama2_70b_gpu", 4, "8xh100",
     ("data.seq_length=2048", "train.global_batch_size=1024", "train.micro_batch_size=2"), None, 36.2),
    (MOSAIC, "70B 2K, 64 H100, FSDP, full, eight sequences", "llama2_70b_gpu", 8, "8xh100",
     ("data.seq_length=2048", "train.global_batch_size=2048", "train.micro_batch_size=8"), None, 42.6),
    (MOSAIC, "7B 2K, 8 H100, FSDP, none, six sequences", "llama2_7b_gpu", 1, "8xh100",
     ("data.seq_length=2048", "train.global_batch_size=48", "train.micro_batch_size=6", NONE), None, 46.4),
    (MOSAIC, "7B 8K, 8 H100, FSDP, full, eight sequences", "llama2_7b_gpu", 1, "8xh100",
     ("data.seq_length=8192", "model.max_position=8192", "train.global_batch_size=128", "train.micro_batch_size=8", FULL),
     None, 37.1),
    (MOSAIC, "7B 64K, 8 H100, FSDP, full", "llama2_7b_gpu", 1, "8xh100",
     ("data.seq_length=65536", "model.max_position=65536", "train.global_batch_size=16", "train.micro_batch_size=1", FULL),
     None, 28.6),
)  # fmt: skip


def printed(match: re.Match[str]) -> str:
    """A block with what its command prints now."""
    command = match[1].replace("\\\n", " ")
    found = subprocess.run(
        [sys.executable, "-m", "launch.cli", *shlex.split(command)[1:]], cwd=HERE.parent, capture_output=True, text=True
    )
    if found.returncode > 1:
        raise SystemExit(f"{command}: {found.stderr.strip()}")
    print(command, flush=True)
    return f"```console\n$ {match[1]}\n{found.stdout.rstrip()}\n```"


def table() -> str:
    """What others measured, beside the plan."""
    from llama import recipe as recipes
    from llama.plan.estimate import Place, estimate
    from llama.plan.nodes import node_type
    from llama.plan.speed import rates_of

    lines = ["| who | what | measured | plan | off |", "|---|---|--:|--:|--:|"]
    for who, what, recipe, nodes, kind, overrides, tokens, mfu in MEASURED:
        node = node_type(kind)
        cost = estimate(recipes.load(recipe, overrides), Place(node, nodes), rates_of(node)).cost
        planned, share = cost.tokens_per_second / (nodes * node.ranks), 100 * cost.mfu_full
        if tokens is None:
            assert mfu is not None
            sides, off = f"MFU {mfu} % | {share:.1f} %", share / mfu - 1
        else:
            sides, off = f"{tokens:,} tokens/s | {planned:,.0f}", planned / tokens - 1
        lines.append(f"| {who} | {what} | {sides} | {100 * off:+.0f} % |")
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    text = TABLE.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(BLOCK.sub(printed, text), encoding="utf-8")


if __name__ == "__main__":
    main()
