"""Parity as an assertion for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama.compare.align import Over
from llama.compare.comparison import Comparison
from llama.compare.rules import Options
from llama.compare.run import open_run
from llama.compare.verdict import compare


def assert_parity(
    reference: str | Path | Sequence[str | Path],
    candidate: str | Path,
    *,
    over: Over = "auto",
    tags: Sequence[str] = (),
    allow_undecided: bool = False,
    **options: Any,
) -> Comparison:
    """Assert that the run in `candidate` equals its reference, or its references: seeds of one recipe.

    `options` are the fields of llama.compare.Options, such as tolerance=0.01. Raises AssertionError with the verdict and
    what each rule said, UserError for runs that cannot be compared. Returns the comparison.
    """
    given = [reference] if isinstance(reference, str | Path) else list(reference)
    references = [open_run(Path(path), str(path)) for path in given]
    result = compare(references, open_run(Path(candidate), str(candidate)), Options(**options), over, tags)
    if result.verdict != "pass" and not (allow_undecided and result.verdict == "undecided"):
        said = "\n".join(f"  {finding.rule}: {finding.verdict}: {finding.says}" for finding in result.findings)
        raise AssertionError(f"{result.sentence}\n{said}")
    return result
