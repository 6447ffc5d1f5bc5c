"""Whether two training runs are equal: reads their curves, aligns them, and decides by stated rules. See docs/compare.md.

`assert_parity(run_a, run_b)` in a test, `herd compare` on the command line.
"""

from __future__ import annotations

from llama.compare.rules import Finding, Options
from llama.compare.testing import assert_parity
from llama.compare.verdict import Comparison, Run, compare, open_run

__all__ = ["Comparison", "Finding", "Options", "Run", "assert_parity", "compare", "open_run"]
