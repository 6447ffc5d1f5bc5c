"""Whether two training runs are equal: reads their curves, aligns them, and decides by stated rules. See docs/compare.md.

`assert_parity(run_a, run_b)` in a test, `herd compare` on the command line.
"""

from __future__ import annotations

from llama.compare.comparison import Comparison
from llama.compare.rules import Finding, Options
from llama.compare.run import Run, open_run
from llama.compare.testing import assert_parity
from llama.compare.verdict import compare

__all__ = ["Comparison", "Finding", "Options", "Run", "assert_parity", "compare", "open_run"]
