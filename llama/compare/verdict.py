"""One candidate against its reference: align, apply every rule, decide."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from llama.compare import rules
from llama.compare.align import Line, Over, align, axis_for, counted_from, line
from llama.compare.comparison import Comparison, sentence
from llama.compare.events import find_tag, need_tag
from llama.compare.rules import Band, Finding, Options
from llama.compare.run import Run, differing, same_start
from llama.compare.statistics import Estimate, Series, jitter, noise

COMPARED = ("loss", "gradient norm", "parameter norm")
FEWEST_POINTS = 20
"""Points that must be left to judge."""
PARTED = 0.5
"""Noise of a pair's gap, as a share of that between seeds, from which on it is judged as one of seeds."""
ALIKE = 0.5
"""Likeness of two curves' noise from which on they are taken to see the same batches."""


def compare(
    references: Sequence[Run],
    candidate: Run,
    options: Options | None = None,
    over: Over = "auto",
    tags: Sequence[str] = (),
) -> Comparison:
    """Judge `candidate` by its references: one, or several seeds of one recipe, whose spread is a band.

    Where a reference has the candidate's first weights and batches, the two are a pair, and gaps are taken to that one;
    otherwise, and where their paths have parted, to the mean of the references. Raises UserError for runs that cannot be compared.
    """
    options = options or Options()
    everyone = {run.name: run for run in (*references, candidate)}
    if len(everyone) <= len(references):
        raise UserError(f"{candidate.name}: is given twice; a run compared with itself says nothing", 2)
    axis = axis_for({name: run.curves for name, run in everyone.items()}, over)
    curves = {what: _lines([*references, candidate], what, axis, tags) for what in COMPARED}
    twin = _twin(references, candidate, options)
    parted = twin is not None and _parted(curves["loss"], references, twin, candidate)
    pair = None if parted else twin
    against = [pair] if pair else list(references)

    finite = rules.finite([(name, what, curves[what][name]) for what in COMPARED[:2] for name in curves[what]], axis)
    try:
        whole, all_a, all_b = _together(curves["loss"], against, candidate, axis)
        start = options.start if options.start is not None else float(whole[0] + 0.1 * (whole[-1] - whole[0]))
        kept = whole >= start
        if kept.sum() < FEWEST_POINTS:
            raise UserError(
                f"{candidate.name} and {against[0].name} share {int(kept.sum())} points from {axis} {start:,.0f} on (up to "
                f"{whole[-1]:,.0f}); {FEWEST_POINTS} are needed: train longer, log more often, or lower --from",
                2,
            )
    except UserError:
        if finite.verdict == "fail":  # what is left of a run that broke may be too short to look at
            return _broken(candidate, against, finite, axis, curves["loss"])
        raise
    x, a, b = whole[kept], all_a[kept], all_b[kept]
    if not (a > 0).all():
        at = x[np.flatnonzero(a <= 0)[0]]
        raise UserError(
            f"{against[0].name}: its loss is {a[a <= 0][0]:g} at {axis} {at:,.0f}; gaps are shares of the loss, which must be "
            "above 0: name another curve with --tag",
            2,
        )
    bands = _bands(curves, references, axis, start)
    likeness = _likeness(a, b)
    known = twin is not None or (
        bool(bands) and not likeness < ALIKE <= _likeness_of_references(curves["loss"], references)
    )

    def judged(rule: str, says: str, estimate: Estimate, tolerance: float) -> Finding:
        band = None if pair else bands.get(rule)
        return rules.judged(rule, says, estimate, tolerance, band, options, known, witness=rule.endswith("norm"))

    first = twin or references[0]

    exact = all(run.recipe.get("train", {}).get("precision") == "fp32" for run in (first, candidate))
    bounds = rules.OPENING_BOUNDS["fp32" if exact else "bf16"]
    findings = [
        finite,
        rules.pointwise(a, b, options),
        _opening("loss", first, candidate, tags, bounds[0], twin is not None),
        judged("final gap", "the loss of the last quarter is apart by", rules.gap(a, b), options.tolerance),
        judged("drift", "over the last half the gap grows by", rules.drift(x, a, b), options.drift_tolerance),
    ]
    norms = _positive(curves["gradient norm"], against, candidate, axis)
    if norms is None:
        findings.append(Finding("gradient norm", "absent", _missing("gradient norm", candidate, against)))
    else:
        findings.append(_opening("gradient norm", first, candidate, (), bounds[1], twin is not None))
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
        pairing=apart / gap_noise if gap_noise else math.inf, likeness=likeness, same_start=twin is not None,
        noise=gap_noise / float(a.mean()), band=bands, x=x, reference_loss=a, candidate_loss=b, norms=norms,
        spread=_spread(curves["loss"], references, x),
        parted=parted, recipes=tuple(differing(first, candidate)),
        from_zero=tuple(name for name, run in everyone.items() if axis == "steps" and not counted_from(run.curves)),
    )  # fmt: skip
    return replace(result, sentence=sentence(result))


def _opening(what: str, first: Run, candidate: Run, tags: Sequence[str], bound: float, claimed: bool) -> Finding:
    """The rule of the first steps, over steps whatever the others are over."""
    lines = _lines([first, candidate], what, "steps", tags)
    steps, a, b = align(lines[first.name], lines[candidate.name], (first.name, candidate.name), "steps")
    return rules.opening(what, steps, a, b, bound, claimed)


def _broken(
    candidate: Run, against: Sequence[Run], finite: Finding, axis: str, lines: Mapping[str, Line]
) -> Comparison:
    """The verdict where points that are no numbers left too little to compare."""
    none, last = np.zeros(0), float(lines[candidate.name].x[-1])
    result = Comparison(
        candidate=candidate.name, references=tuple(run.name for run in against), verdict="fail", sentence="",
        findings=(finite,), over=axis, first=float(lines[candidate.name].x[0]), last=last, points=0, pairing=1.0,
        likeness=0.0, same_start=False, noise=0.0, band={}, x=none, reference_loss=none, candidate_loss=none, norms=None,
        spread=None,
    )  # fmt: skip
    return replace(result, sentence=sentence(result))


def _twin(references: Sequence[Run], candidate: Run, options: Options) -> Run | None:
    """The reference with the candidate's first weights and batches."""
    if options.same_start is None:
        return next((run for run in references if same_start(run, candidate)), None)
    return references[0] if options.same_start else None


def _parted(lines: Mapping[str, Line], references: Sequence[Run], twin: Run, candidate: Run) -> bool:
    """Whether rounding has parted a candidate's path from its twin's about as far as another seed's lies.

    Then their gap is as much a matter of chance as that of two seeds. Read off the noise of the gaps over the last half;
    unknown, and taken for no, with one reference.
    """
    if len(references) < 2:
        return False

    def apart(one: str, other: str) -> float:
        _, a, b = align(lines[one], lines[other], (one, other), "steps")
        return noise((b - a)[len(a) // 2 :])

    seeds = [apart(one.name, other.name) for one, other in combinations(references, 2)]
    return apart(twin.name, candidate.name) > PARTED * float(np.mean(seeds))


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
