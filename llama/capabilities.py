"""What each kind of device can do: the one table. What a recipe may ask of a device, the docs and herd submit go by it.

Trainium's column is AWS's word on TorchNeuron (Neuron 2.33: torch.compile backend reference, release notes) and hazards seen
in public code; nobody here has run it. Needs no torch: what a node cannot do is refused where there is none of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from data_prep.errors import UserError
from llama.config import ZERO_BUBBLE, Recipe

Kind = Literal["cpu", "cuda", "neuron"]


@dataclass(frozen=True)
class Abilities:
    """A column of the table; ROWS names the fields for people."""

    pipeline: bool
    zero_bubble: bool
    compile_backend: str
    dynamic_shapes: bool
    fused_adamw: bool
    float64: bool
    rounds_itself: bool
    skips_untrained: bool
    documents: str
    quantized: str
    sequence_multiple: int


TABLE: dict[Kind, Abilities] = {
    "cpu": Abilities(
        pipeline=True, zero_bubble=True, compile_backend="inductor", dynamic_shapes=True, fused_adamw=True, float64=True,
        rounds_itself=False, skips_untrained=True, documents="one after another", quantized="yes", sequence_multiple=1,
    ),
    "cuda": Abilities(
        pipeline=True, zero_bubble=True, compile_backend="inductor", dynamic_shapes=True, fused_adamw=True, float64=True,
        rounds_itself=False, skips_untrained=True, documents="in one kernel", quantized="yes", sequence_multiple=1,
    ),
    "neuron": Abilities(
        pipeline=False, zero_bubble=False, compile_backend="neuron", dynamic_shapes=False, fused_adamw=False, float64=False,
        rounds_itself=True, skips_untrained=False, documents="by a mask", quantized="untried", sequence_multiple=2048,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Objection:
    """Why a recipe does not suit a device."""

    key: str
    """The recipe's key that would have to change."""
    reason: str
    remedy: str
    fatal: bool
    """It cannot run; else it is slow, or nobody has tried it."""

    def __str__(self) -> str:
        return f"{self.key} {self.reason}; {self.remedy}"


def kind(name: str) -> Kind:
    """The column for a type of device, or of node as slurm/env.sh names them: trn2, trn3, gpu, cpu."""
    return "neuron" if name.startswith(("trn", "neuron")) else "cuda" if name in ("gpu", "cuda") else "cpu"


def objections(recipe: Recipe, device: Kind, able: Abilities | None = None) -> list[Objection]:
    """What speaks against `recipe` on `device`, the fatal things first. `able`: the device at hand, where it is known better."""
    able = able or TABLE[device]
    p, found = recipe.parallel, []
    if p.pipeline_parallel > 1 and not able.pipeline:
        found.append(Objection(
            f"parallel.pipeline_parallel={p.pipeline_parallel}",
            f"needs ranks to send to each other, which nobody has shown on {device}",
            "set parallel.pipeline_parallel=1 and let FSDP shard over those ranks", True,
        ))  # fmt: skip
    elif p.pipeline_parallel > 1 and p.pipeline_schedule in ZERO_BUBBLE and not able.zero_bubble:
        found.append(Objection(
            f"parallel.pipeline_schedule={p.pipeline_schedule}", "needs torch 2.13 or newer",
            "use interleaved_1f1b, or another torch", True,
        ))  # fmt: skip
    if recipe.lora.quantize and able.quantized != "yes":
        found.append(Objection(
            f"lora.quantize={recipe.lora.quantize}", f"was never tried on {device}, and its unpacking is not compiled",
            "lora.quantize=null holds the base in bf16, sharded over all ranks", False,
        ))  # fmt: skip
    length, multiple = recipe.data.seq_length, able.sequence_multiple
    if length % multiple:
        near = max(multiple, length // multiple * multiple)
        found.append(Objection(
            f"data.seq_length={length}", f"keeps attention on {device} from its fast kernel, which takes multiples of {multiple}",
            f"use {near}" + (f" or {near + multiple}" if near < length else ""), False,
        ))  # fmt: skip
    if recipe.data.document_mask and device == "neuron":
        found.append(Objection(
            "data.document_mask=true", f"keeps attention on {device} from its fast kernel: a mask of {length} x {length} for "
            "each sequence", "chat.pack=false needs none, nor do token files", False,
        ))  # fmt: skip
    if device == "neuron" and not recipe.train.compile:
        found.append(Objection(
            "train.compile=false", f"runs {device} operator by operator", "set train.compile=true, as the _trn2 recipes do",
            False,
        ))  # fmt: skip
    return sorted(found, key=lambda objection: not objection.fatal)


def check(recipe: Recipe, device: Kind, able: Abilities | None = None) -> list[str]:
    """Refuse what `device` cannot do; what is merely doubtful, in words. Raises UserError with the remedy."""
    found = objections(recipe, device, able)
    for objection in found:
        if objection.fatal:
            raise UserError(f"recipe {recipe.name}: {objection}", 2)
    return [f"recipe {recipe.name}: {objection}" for objection in found]


ROWS: dict[str, str] = {
    "pipeline": "pipeline stages (`parallel.pipeline_parallel`)",
    "zero_bubble": "zero-bubble schedules (torch 2.13)",
    "compile_backend": "`torch.compile`, default mode",
    "dynamic_shapes": "shapes that differ from batch to batch",
    "fused_adamw": "AdamW in one kernel, else foreach",
    "float64": "64-bit numbers, else silently 32-bit",
    "rounds_itself": "`bf16_sr` rounded by the runtime, else by our optimizer",
    "skips_untrained": "no logits for positions without a label",
    "documents": "packed documents kept apart (`data.document_mask`)",
    "quantized": "frozen weights in 4 or 8 bits (`lora.quantize`)",
    "sequence_multiple": "`data.seq_length` for the fast attention kernel",
}
"""What the fields are called in the table of docs/trainium.md."""


def table() -> str:
    """The table in Markdown, as docs/trainium.md has it."""
    assert [field.name for field in fields(Abilities)] == list(ROWS)
    lines = ["| | cpu | cuda | neuron |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        lines.append(f"| {row} | " + " | ".join(_said(getattr(able, name)) for able in TABLE.values()) + " |")
    return "\n".join(lines)


def _said(value: bool | str | int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else "any" if value == 1 else f"multiples of {value:,}"
