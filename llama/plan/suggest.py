"""Layouts of a recipe tried out on paper: what fits, what is fastest, and why the others lose.

Numbers of the training itself stay: model, data, global batch, precision, learning rate. What is searched is how the same
step is laid over the ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from llama.capabilities import TABLE, kind
from llama.config import Recipe
from llama.layout import layout
from llama.plan.estimate import Estimate, Place, estimate
from llama.plan.speed import Rates, StepTime

MICRO_BATCHES = (1, 2, 4, 8)
CHECKPOINTING = ("none", "selective", "full")
TOO_BIG = "more memory than a rank has, 8 % kept free"
CLOSE = 0.03
"""Step times within this share of each other are equal, as far as a plan can tell."""
ROOM = 0.92
"""Of a rank's memory, what a suggestion may fill: a plan's peak is right within 8 % (benchmarks/plan_check.py)."""


@dataclass(frozen=True)
class Candidate:
    """A layout that was tried."""

    changes: dict[str, Any]
    """Overrides that make it of the recipe."""
    found: Estimate

    @property
    def words(self) -> str:
        """For a person: what differs from one candidate to another."""
        r = self.found.recipe
        parts = [self.found.layout.name]
        if r.parallel.pipeline_parallel > 1:
            parts.append(r.parallel.pipeline_schedule)
        parts += [f"micro-batch {r.train.micro_batch_size}", f"checkpointing {r.train.activation_checkpointing}"]
        if r.parallel.reshard_after_forward is False:
            parts.append("weights kept gathered")
        return ", ".join(parts)

    @property
    def overrides(self) -> str:
        return " ".join(f"{key}={_spelled(value)}" for key, value in self.changes.items())


@dataclass(frozen=True)
class Suggestion:
    """What a search found."""

    own: Candidate | None
    """The recipe as it is; None where it does not lay out on these ranks."""
    best: tuple[Candidate, ...]
    """Fastest first, one a mesh."""
    too_big: Candidate | None
    """The fastest one that does not fit, where it would beat the best."""
    tried: int
    ruled_out: dict[str, int]
    """How many were, by reason."""


def _spelled(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(recipe: Recipe, place: Place) -> Iterator[dict[str, Any]]:
    """All overrides that are worth a thought on `place`."""
    tensor = [2**i for i in range(12) if 2**i <= place.node.ranks and place.node.ranks % 2**i == 0]
    pipeline = (
        [2**i for i in range(7) if 2**i <= recipe.model.num_layers] if TABLE[kind(place.node.device)].pipeline else [1]
    )
    for tp, pp in product(tensor, pipeline):
        if place.world % (tp * pp):
            continue
        data = place.world // (tp * pp)
        # Copies of the whole model on each node: gradients alone then cross the network.
        copies = [1] + [place.nodes] * (place.nodes > 1 and data % place.nodes == 0 and data > place.nodes and pp == 1)
        schedules = ["1f1b", "interleaved_1f1b"] if pp > 1 else [None]
        kept = [None, False] if pp == 1 and data > 1 else [None]
        for replicate, schedule, reshard in product(copies, schedules, kept):
            for micro_batch, checkpointing in product(MICRO_BATCHES, CHECKPOINTING):
                changes: dict[str, Any] = {
                    "parallel.tensor_parallel": tp,
                    "parallel.pipeline_parallel": pp,
                    "parallel.replicate": replicate,
                    "parallel.shard": None,
                    "parallel.reshard_after_forward": reshard,
                    "train.micro_batch_size": micro_batch,
                    "train.activation_checkpointing": checkpointing,
                }
                if schedule:
                    changes |= {"parallel.pipeline_schedule": schedule, "parallel.stages_per_rank": None}
                yield changes


def with_changes(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """`recipe` with overrides applied. Raises pydantic's ValidationError where values cannot go together."""
    keys = recipe.model_dump(mode="json")
    for path, value in changes.items():
        section, _, key = path.partition(".")
        keys[section] = keys[section] | {key: value}
    return Recipe.model_validate(keys)


def shorter(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes that are any."""
    keys = recipe.model_dump(mode="json")
    return {
        path: value for path, value in changes.items() if keys[path.partition(".")[0]][path.partition(".")[2]] != value
    }


def suggest(
    recipe: Recipe,
    place: Place,
    rates: Rates,
    best: int = 5,
    beat: Callable[[int, int], None] | None = None,
) -> Suggestion:
    """Try the layouts of `recipe` on `place` by formulas; `beat(done, of)` is called on the way."""
    found: list[Candidate] = []
    ruled_out: Counter[str] = Counter()
    choices = list(_choices(recipe, place))
    full: dict[tuple[Any, ...], int] = {}  # all but the micro-batch -> the smallest one that did not fit
    for done, changes in enumerate(choices):
        if beat is not None and done % 10 == 0:
            beat(done, len(choices))
        try:
            changed = with_changes(recipe, changes)
            layout(changed, place.world)
        except (ValidationError, ValueError) as error:
            ruled_out[_why(error)] += 1
            continue
        alike = tuple(value for key, value in changes.items() if key != "train.micro_batch_size")
        if full.get(alike, 1 << 30) < changed.train.micro_batch_size:
            ruled_out[TOO_BIG] += 1
            continue
        candidate = Candidate(shorter(recipe, changes), estimate(changed, place, rates))
        found.append(candidate)
        if not _roomy(candidate):
            ruled_out[TOO_BIG] += 1
            full[alike] = changed.train.micro_batch_size
    meshes: dict[str, list[Candidate]] = {}
    for candidate in found:
        if _roomy(candidate):
            meshes.setdefault(_mesh(candidate), []).append(candidate)
    chosen = tuple(_ordered([_ordered(alike)[0] for alike in meshes.values()])[:best])
    big = min((c for c in found if not _roomy(c)), key=lambda c: c.found.step.total, default=None)
    if big is not None and chosen and big.found.step.total >= chosen[0].found.step.total:
        big = None
    try:
        layout(recipe, place.world)
        own = Candidate({}, estimate(recipe, place, rates))
    except ValueError:
        own = None
    return Suggestion(own, chosen, big, len(choices), dict(ruled_out))


def _roomy(candidate: Candidate) -> bool:
    return candidate.found.fits and candidate.found.share <= ROOM


def _ordered(candidates: list[Candidate]) -> list[Candidate]:
    """Faster first; those as fast as the fastest, as far as a plan can tell, by what they leave free of memory."""
    ordered = sorted(candidates, key=lambda c: c.found.step.total)
    near = [c for c in ordered if c.found.step.total <= (1 + CLOSE) * ordered[0].found.step.total]
    return sorted(near, key=lambda c: (round(c.found.share, 2), len(c.changes))) + ordered[len(near) :]


def _mesh(candidate: Candidate) -> str:
    parallel = candidate.found.recipe.parallel
    return f"{candidate.found.layout.name} {parallel.pipeline_schedule if parallel.pipeline_parallel > 1 else ''}"


def _why(error: Exception) -> str:
    """The kind of refusal, short enough to be counted by."""
    text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
    for part, reason in (
        ("does not divide model.num_kv_heads", "tensor parallel does not divide the KV heads"),
        ("does not divide", "tensor parallel does not divide the model"),
        ("pipeline stages", "more stages than layers"),
        ("needs at least", "too few micro-batches for the pipeline"),
        ("micro-batches", "micro-batches do not fit the schedule"),
        ("is not a multiple of", "the global batch does not divide"),
    ):
        if part in text:
            return reason
    return text.removeprefix("Value error, ")


def reasons(winner: Candidate, other: Candidate, most: int = 2) -> str:
    """Why `other` loses to `winner`: the parts of its step that cost more, the largest first."""
    total = winner.found.step.total
    parts, base = parts_of(other.found.step), parts_of(winner.found.step)
    more = sorted(((seconds - base[name], name) for name, seconds in parts.items()), reverse=True)
    said = [f"{name} +{100 * extra / total:.0f} %" for extra, name in more if extra > 0.005 * total][:most]
    slower = other.found.step.total / total - 1
    if not said or slower < CLOSE:
        return f"as fast within {100 * CLOSE:.0f} %" if slower < CLOSE else "a little of everything"
    return f"{100 * slower:.0f} % slower: {', '.join(said)}"


def parts_of(step: StepTime) -> dict[str, float]:
    """A step's seconds by what a person can change something about."""
    return {
        "matrix products": step.products,
        "attention": step.attention,
        "other operators": step.others,
        "tensor-parallel communication": step.tensor,
        "weights and gradients sent": step.data - step.overlapped,
        "stages sending": step.pipeline,
        "the sum over all ranks": step.reduction,
        "pipeline bubble": step.bubble,
        "reading data": step.loading,
    }
