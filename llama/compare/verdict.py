"""One candidate against its reference: align, apply every rule, decide."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data_prep.errors import UserError
from llama.compare import rules
from llama.compare.align import Line, Over, align, axis_for, line
from llama.compare.events import Curve, find_tag, need_tag, read_run
from llama.compare.rules import Band, Finding, Options
from llama.compare.statistics import Estimate, Series, jitter, noise

COMPARED = ("loss", "gradient norm", "parameter norm")
FEWEST_POINTS = 20
"""Points that must be left to judge."""
ALIKE = 0.5
"""Likeness of two curves' noise from which on they are taken to see the same batches."""
EXIT = {"pass": 0, "fail": 1, "undecided": 3}
"""Exit codes of verdicts; 2 is wrong use."""


@dataclass(frozen=True)
class Run:
    """A run to compare: its name, where it lies, its scalars by tag."""

    name: str
    path: Path
    curves: Mapping[str, Curve]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Of our own run folders."""


@dataclass(frozen=True)
class Comparison:
    """What was found of one candidate."""

    candidate: str
    references: tuple[str, ...]
    verdict: str
    """pass, fail or undecided."""
    sentence: str
    findings: tuple[Finding, ...]
    over: str
    first: float
    last: float
    """The part of the axis that was judged."""
    points: int
    pairing: float
    """How many times smaller the noise of the gap is than that of two unrelated curves; 1 when pairing does not help."""
    likeness: float
    """Correlation of the two curves' noise from point to point."""
    same_start: bool
    noise: float
    """Noise of the gap from point to point, as a share of the loss."""
    band: Mapping[str, Band]
    """By statistic; empty with one reference."""
    x: Series
    reference_loss: Series
    candidate_loss: Series
    norms: NDArray[np.float64] | None
    """x, gradient norm of the reference and of the candidate, (3, n)."""
    spread: Series | None
    """Half the distance between the lowest and the highest reference at each x."""

    @property
    def exit_code(self) -> int:
        return EXIT[self.verdict]


def open_run(path: Path, name: str | None = None) -> Run:
    """Read a run from where it lies. Raises UserError."""
    recipe: dict[str, Any] = {}
    file = path / "recipe.yaml"
    if path.is_dir() and file.is_file():
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
            recipe = found if isinstance(found, dict) else {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            recipe = {}
    return Run(name or path.name, path, read_run(path), recipe)


def same_start(a: Run, b: Run) -> bool:
    """Whether the recipes of both runs give the same first weights and the same batches in the same order."""
    if not a.recipe or not b.recipe:
        return False

    def start(recipe: Mapping[str, Any]) -> list[Any]:
        train, data = recipe.get("train", {}), recipe.get("data", {})
        order = data.get("order_samples") or train.get("steps", 0) * train.get("global_batch_size", 0)
        kept = {key: value for key, value in data.items() if key not in ("prefetch", "tokenizer", "order_samples")}
        weights = [train.get(key) for key in ("seed", "init_from", "global_batch_size")]
        return [weights, recipe.get("model"), recipe.get("chat"), recipe.get("lora"), kept, order]

    return start(a.recipe) == start(b.recipe)


def compare(
    references: Sequence[Run],
    candidate: Run,
    options: Options | None = None,
    over: Over = "auto",
    tags: Sequence[str] = (),
) -> Comparison:
    """Judge `candidate` by its references: one, or several seeds of one recipe, whose spread is a band.

    Where a reference has the candidate's first weights and batches, the two are a pair, and gaps are taken to that one;
    otherwise to the mean of the references. Raises UserError for runs that cannot be compared.
    """
    options = options or Options()
    everyone = {run.name: run for run in (*references, candidate)}
    if len(everyone) <= len(references):
        raise UserError(f"{candidate.name}: is given twice; a run compared with itself says nothing", 2)
    axis = axis_for({name: run.curves for name, run in everyone.items()}, over)
    curves = {what: _lines([*references, candidate], what, axis, tags) for what in COMPARED}
    twin = _twin(references, candidate, options)
    against = [twin] if twin else list(references)

    whole, all_a, all_b = _together(curves["loss"], against, candidate, axis)
    start = options.start if options.start is not None else float(whole[0] + 0.1 * (whole[-1] - whole[0]))
    kept = whole >= start
    if kept.sum() < FEWEST_POINTS:
        raise UserError(
            f"{candidate.name} and {against[0].name} share {int(kept.sum())} points from {axis} {start:,.0f} on (up to "
            f"{whole[-1]:,.0f}); {FEWEST_POINTS} are needed: train longer, log more often, or lower --from",
            2,
        )
    x, a, b = whole[kept], all_a[kept], all_b[kept]
    bands = _bands(curves, references, axis, start)
    likeness = _likeness(a, b)
    known = bool(twin) or (bool(bands) and not likeness < ALIKE <= _likeness_of_references(curves["loss"], references))

    def judged(rule: str, says: str, estimate: Estimate, tolerance: float) -> Finding:
        return rules.judged(rule, says, estimate, tolerance, None if twin else bands.get(rule), options, known)

    exact = all(run.recipe.get("train", {}).get("precision") == "fp32" for run in (*against, candidate))
    bounds = rules.OPENING_BOUNDS["fp32" if exact else "bf16"]
    findings = [
        rules.finite([(name, what, curves[what][name]) for what in COMPARED[:2] for name in curves[what]], axis),
        rules.pointwise(a, b, options),
        rules.opening("loss", all_a, all_b, bounds[0], bool(twin)),
        judged("final gap", "the loss of the last quarter is apart by", rules.gap(a, b), options.tolerance),
        judged("drift", "over the last half the gap grows by", rules.drift(x, a, b), options.drift_tolerance),
    ]
    norms = _positive(curves["gradient norm"], against, candidate, axis)
    if norms is None:
        findings.append(Finding("gradient norm", "absent", _missing("gradient norm", candidate, against)))
    else:
        findings.append(rules.opening("gradient norm", norms[1], norms[2], bounds[1], bool(twin)))
        norms = norms[:, norms[0] >= start]
        level = rules.level(norms[1], norms[2])
        findings.append(judged("gradient norm", "the gradient norm is apart by", level, options.norm_tolerance))
    sizes = _positive(curves["parameter norm"], against, candidate, axis)
    if sizes is None:
        findings.append(Finding("parameter norm", "absent", _missing("parameter norm", candidate, against)))
    else:
        sizes = sizes[:, sizes[0] >= start]
        level = rules.last_level(sizes[1], sizes[2])
        says = "the norm of the weights ends apart by"
        findings.append(judged("parameter norm", says, level, options.parameter_tolerance))

    weighed = tuple(_weighed(finding, options) for finding in findings)
    gap_noise, apart = noise(b - a), float(np.hypot(noise(a), noise(b)))
    result = Comparison(
        candidate=candidate.name, references=tuple(run.name for run in against), verdict=_verdict(weighed), sentence="",
        findings=weighed, over=axis, first=float(x[0]), last=float(x[-1]), points=len(x),
        pairing=apart / gap_noise if gap_noise else math.inf, likeness=likeness, same_start=bool(twin),
        noise=gap_noise / float(a.mean()), band=bands, x=x, reference_loss=a, candidate_loss=b, norms=norms,
        spread=_spread(curves["loss"], references, x),
    )  # fmt: skip
    return replace(result, sentence=sentence(result))


def _twin(references: Sequence[Run], candidate: Run, options: Options) -> Run | None:
    """The reference with the candidate's first weights and batches."""
    if options.same_start is None:
        return next((run for run in references if same_start(run, candidate)), None)
    return references[0] if options.same_start else None


def _positive(
    lines: Mapping[str, Line], against: Sequence[Run], candidate: Run, axis: str
) -> NDArray[np.float64] | None:
    """x, references' mean and candidate (3, n) where both are above 0; None when a run lacks the curve, or most of it."""
    if any(run.name not in lines or not np.isfinite(lines[run.name].y).any() for run in (*against, candidate)):
        return None
    together = np.stack(_together(lines, against, candidate, axis))
    together = together[:, (together[1:] > 0).all(axis=0)]
    return together if together.shape[1] >= FEWEST_POINTS else None


def _lines(runs: Sequence[Run], what: str, axis: str, tags: Sequence[str]) -> dict[str, Line]:
    """A curve of each run by name; runs without a norm are left out, without a loss refused."""
    found = {}
    for run in runs:
        if what == "loss":
            found[run.name] = line(run.curves, need_tag(run.curves, what, run.path, tags), axis, str(run.path))
        elif name := find_tag(run.curves, what):
            with contextlib.suppress(UserError):  # it lies nowhere on this axis
                found[run.name] = line(run.curves, name, axis, str(run.path))
    return found


def _together(
    lines: Mapping[str, Line], against: Sequence[Run], candidate: Run, axis: str
) -> tuple[Series, Series, Series]:
    """x, the mean of the references there, the candidate there."""
    x, a, b = align(lines[against[0].name], lines[candidate.name], (against[0].name, candidate.name), axis)
    for i, run in enumerate(against[1:], 1):
        at, more, _ = align(lines[run.name], Line(x, b), (run.name, candidate.name), axis)
        inside = np.isin(x, at)
        if len(at) != inside.sum():
            raise UserError(f"{run.name}: logs other {axis} than {against[0].name}; seeds of a reference log alike", 2)
        x, a, b = at, (a[inside] * i + more) / (i + 1), b[inside]
    return x, a, b


def _bands(
    curves: Mapping[str, Mapping[str, Line]], references: Sequence[Run], axis: str, start: float
) -> dict[str, Band]:
    """How far the references lie apart, by rule; empty with one."""
    values: dict[str, list[float]] = {}
    for one, other in combinations(references, 2):
        for what, lines in curves.items():
            if one.name not in lines or other.name not in lines:
                continue
            x, a, b = align(lines[one.name], lines[other.name], (one.name, other.name), axis)
            keep = (x >= start) & (a > 0) & (b > 0)
            if keep.sum() < FEWEST_POINTS:
                raise UserError(f"{one.name} and {other.name}: too short for a band from {axis} {start:,.0f} on", 2)
            parts = _parts(np.log(b[keep] / a[keep]))
            values.setdefault("final gap" if what == "loss" else what, []).extend(parts)
            if what == "loss":  # a half is two quarters, whose means lie half of it apart
                values.setdefault("drift", []).extend(2 * float(step) for step in np.diff(parts))
    return {what: rules.band_of(found, len(references), what == "parameter norm") for what, found in values.items()}


def _parts(series: Series) -> list[float]:
    """Means of its quarters."""
    return [float(part.mean()) for part in np.array_split(series, rules.BLOCKS)]


def _spread(lines: Mapping[str, Line], references: Sequence[Run], x: Series) -> Series | None:
    """Half the distance between the lowest and the highest reference at each x; None with one."""
    if len(references) < 2:
        return None
    found = []
    for run in references:
        curve = lines[run.name]
        good = np.isfinite(curve.y)
        found.append(np.interp(x, curve.x[good], curve.y[good]))
    stack = np.stack(found)
    half: Series = (stack.max(axis=0) - stack.min(axis=0)) / 2
    return half


def _likeness(a: Series, b: Series) -> float:
    """Correlation of the noise of two curves."""
    one, other = jitter(a), jitter(b)
    return float(np.corrcoef(one, other)[0, 1]) if one.any() and other.any() else 0.0


def _likeness_of_references(lines: Mapping[str, Line], references: Sequence[Run]) -> float:
    """The smallest among pairs of references."""
    found = []
    for one, other in combinations(references, 2):
        _, a, b = align(lines[one.name], lines[other.name], (one.name, other.name), "")
        found.append(_likeness(a, b))
    return min(found)


def _missing(what: str, candidate: Run, against: Sequence[Run]) -> str:
    who = next((run for run in (candidate, *against) if find_tag(run.curves, what) is None), candidate)
    return f"{who.name} logs no {what}"


def _weighed(finding: Finding, options: Options) -> Finding:
    """With `decisive` as the options have it."""
    if finding.rule == "finite" or finding.verdict == "absent":
        return finding
    counts = options.decide == "both" or (options.decide == "pointwise") == (finding.rule == "pointwise")
    return replace(finding, decisive=finding.decisive and counts)


def _verdict(findings: Sequence[Finding]) -> str:
    said = {finding.verdict for finding in findings if finding.decisive}
    return next((word for word in ("fail", "undecided") if word in said), "pass")


def sentence(c: Comparison) -> str:
    """The verdict for people."""
    against = " and ".join(c.references)
    counted = [finding for finding in c.findings if finding.decisive and finding.verdict == c.verdict]
    span = f"{c.over} {c.first:,.0f} to {c.last:,.0f}"
    if c.verdict == "fail":
        why = "; ".join(f"{f.rule}: {f.says}" for f in counted)
        return f"{c.candidate} is not {against}: over {span}, {why}"
    if c.verdict == "undecided":
        why = "; ".join(f"{f.rule}: {f.says}" for f in counted)
        return f"{c.candidate} against {against} is undecided over {span}: {why}{more_in_words(c, counted)}"
    gap = next((f for f in counted if f.rule == "final gap"), None)
    shown = f"; {gap.says}" if gap else ""
    return f"{c.candidate} equals {against} by every rule that counts over {span}{shown}"


def more_in_words(c: Comparison, undecided: Sequence[Finding]) -> str:
    """How much longer the run would have to be."""
    if not c.same_start and any(f.more is None for f in undecided):
        return (
            "; give further seeds with --reference, of the same batches if the candidate's are, or --same-start if the runs "
            "have one"
        )
    wanted = [f.more for f in undecided if f.more is not None]
    if not wanted:
        return ""
    times = max(wanted)
    if times > 20:
        return "; no length within reason decides: the gap lies on the edge of the tolerance"
    longer = max(times - 1, 0.1) * (c.last - c.first)
    return f"; about {longer:,.0f} more {c.over} would decide, if it goes on like this"
