"""Comparisons as text, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama.compare.comparison import EXIT, Comparison
from llama.compare.faults import within_reach
from llama.compare.rules import Finding, percent


def overall(comparisons: Sequence[Comparison]) -> str:
    """The worst verdict."""
    said = {comparison.verdict for comparison in comparisons}
    return next(word for word in ("fail", "undecided", "pass") if word in said)


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything but the curves, for a script."""
    verdict = overall(comparisons)
    rows = []
    for c in comparisons:
        rows.append({
            "candidate": c.candidate,
            "references": list(c.references),
            "verdict": c.verdict,
            "sentence": c.sentence,
            "over": c.over,
            "from": c.first,
            "to": c.last,
            "points": c.points,
            "same_start": c.same_start,
            "parted": c.parted,
            "noise": c.noise,
            "recipes_differ_in": list(c.recipes),
            "counted_from_0": list(c.from_zero),
            "pairing": _number(c.pairing),
            "likeness": c.likeness,
            "band": {what: asdict(band) for what, band in c.band.items()},
            "rules": [{key: _number(value) for key, value in asdict(f).items()} for f in c.findings],
            "faults": [
                {"fault": r.fault.what, "rule": r.rule, "effect": r.effect, "detectable": r.detectable, "found": r.found}
                for r in within_reach(c.findings)
            ],
        })  # fmt: skip
    return {"verdict": verdict, "exit_code": EXIT[verdict], "comparisons": rows}


def _number(value: Any) -> Any:
    """As JSON can hold it: no infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def noise_in_words(c: Comparison) -> str:
    """What the noise is, where it comes from, and whether pairing takes it away."""
    if not c.points:
        return "nothing is left to measure it on"
    text = f"the gap's noise from point to point is {percent(c.noise)} of the loss"
    if c.pairing > 1.5:
        times = f"{c.pairing:,.1f}" if c.pairing < 1000 else f"{c.pairing:.0e}"
        text += f", {times} times less than of unrelated curves: they see the same batches (likeness {c.likeness:.3f})"
    else:
        text += f": pairing does not help, their batches differ (likeness {c.likeness:.3f})"
    if c.parted:
        return (
            text + "; the start is the same, but rounding has led the two as far apart as seeds: judged by their band"
        )
    if c.same_start:
        text += "; first weights and batches are the same, so the pair is judged by the tolerances alone"
        apart = (
            f" (for comparison: a seed of the reference ends within ± {percent(c.band['final gap'].half)})"
            if c.band
            else ""
        )
        return text + apart
    if c.band:
        return text + "; beside it stands the band of the references' seeds"
    return text + "; one reference, so noise is the curves' own, and how far seeds lie apart is unknown"


def recipes_in_words(c: Comparison, most: int = 8) -> str:
    """Keys in which the recipes differ, reference first."""
    more = len(c.recipes) - most
    return "; ".join(c.recipes[:most]) + (f"; and {more} more" if more > 0 else "")


def as_text(c: Comparison) -> list[str]:
    """Lines for a terminal or a log, the sentence last."""
    width = max(len(f.rule) for f in c.findings)
    lines = [
        f"{c.candidate} against {' and '.join(c.references)}: {c.points:,} points, {c.over} {c.first:,.0f} to {c.last:,.0f}"
    ]
    lines += [f"  {mark(f):<10} {f.rule:<{width}}  {f.says}" for f in c.findings]
    lines.append(f"  noise: {noise_in_words(c)}")
    if c.recipes:
        lines.append(f"  recipes differ in {recipes_in_words(c)}")
    lines += [f"  {name} numbers its first step 0; here it is step 1, as in other runs" for name in c.from_zero]
    lines += [f"  {reach.says}" for reach in within_reach(c.findings)]
    return [*lines, f"{c.verdict.upper()}: {c.sentence}"]


def mark(finding: Finding) -> str:
    """The verdict of a rule; in brackets where it does not count."""
    word = "-" if finding.verdict == "absent" else finding.verdict
    return word if finding.decisive or finding.verdict == "absent" else f"({word})"


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """A report for a CI job's summary."""
    lines = [f"# Parity: {overall(comparisons)}", ""]
    for c in comparisons:
        lines += [
            f"## {c.candidate}",
            "",
            f"**{c.verdict}**: {c.sentence}.",
            "",
            "| rule | verdict | found |",
            "|---|---|---|",
        ]
        lines += [f"| {f.rule} | {mark(f)} | {f.says} |" for f in c.findings]
        lines += [
            "",
            f"Noise: {noise_in_words(c)}.",
            *([f"Recipes differ in {recipes_in_words(c)}."] if c.recipes else []),
            "",
            "| fault | would have been found | by | effect when planted, at least | enough here |",
        ]
        lines.append("|---|---|---|---|---|")
        lines += [
            f"| {r.fault.what} | {'yes' if r.found else 'no'} | {r.rule} | {percent(r.effect)} | {percent(r.detectable)} |"
            for r in within_reach(c.findings)
        ]
        lines.append("")
    return "\n".join(lines)
