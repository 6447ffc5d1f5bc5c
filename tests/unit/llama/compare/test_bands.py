"""Seeds as a band: what they excuse, what so few of them can blame, and when a pair of one start is judged by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama.compare import Comparison, Options, Run, compare
from llama.compare.events import Curve
from llama.compare.report import noise_in_words
from llama.compare.rules import band_of
from tests.unit.llama.compare.series import wandering

POINTS = 300
STEPS = list(range(1, POINTS + 1))
BATCHES = 2 + 6 * np.arange(1, POINTS + 1) ** -0.4 + np.random.default_rng(0).normal(size=POINTS) * 0.05


def seed(number: int, offset: float = 0.0, noise: float = 0.004, norm: float = 1.0) -> Run:
    """A run whose loss is apart from that of the batches by a share `offset` all along, its gradient norm by a factor."""
    draws = wandering(POINTS, 0.5, number)
    loss = BATCHES * (1 + offset + noise * draws)
    norms = norm * (1 + 0.01 * wandering(POINTS, 0.0, 100 + number))
    curves = {"reduced_train_loss": Curve(STEPS, loss.tolist()), "gradient_norm": Curve(STEPS, norms.tolist())}
    return Run(f"seed{number}", Path(str(number)), curves)


def said(found: Comparison, rule: str) -> str:
    return next(f.verdict for f in found.findings if f.rule == rule)


def test_a_seed_that_is_worse_all_along_is_not_blamed_by_two_others() -> None:
    found = compare([seed(1), seed(2, 0.002)], seed(3, 0.011))
    assert found.verdict == "undecided" and said(found, "final gap") == "undecided"
    assert "give further seeds" in found.sentence


def test_seeds_of_which_some_are_better_all_along_are_hardly_ever_blamed() -> None:
    draws, verdicts = np.random.default_rng(1), []
    for number in range(60):
        offsets = draws.normal(size=4) * 0.004
        runs = [seed(10 * number + i, float(offset)) for i, offset in enumerate(offsets)]
        verdicts += [compare(runs[:size], runs[3]).verdict for size in (2, 3)]
    assert verdicts.count("fail") <= 6, verdicts.count("fail")  # 5 % of 120
    assert verdicts.count("pass") > 60


def test_seeds_blame_what_lies_far_outside() -> None:
    band = [seed(1), seed(2, 0.001), seed(3, -0.001)]
    assert compare(band, seed(4, 0.012)).verdict == "fail"
    assert compare(band[:2], seed(4, 0.05)).verdict == "fail"


def test_a_gradient_norm_that_differs_from_seed_to_seed_holds_up_no_verdict_but_may_blame() -> None:
    references = [seed(1, norm=1.0), seed(2, norm=1.08)]
    found = compare(references, seed(3, norm=1.2))
    assert found.verdict == "pass" and said(found, "gradient norm") == "undecided"
    finding = next(f for f in found.findings if f.rule == "gradient norm")
    assert not finding.decisive and "seeds lie too far apart to show anything" in finding.says
    assert compare(references, seed(3, norm=5.0)).verdict == "fail"


@pytest.mark.parametrize(("apart", "parted"), [(0.0002, False), (0.006, True)])
def test_a_pair_that_rounding_led_as_far_apart_as_seeds_is_judged_by_their_band(apart: float, parted: bool) -> None:
    first, other = seed(1), seed(2, 0.003)
    drifted = np.asarray(first.curves["reduced_train_loss"].values) * (1.0038 + apart * wandering(POINTS, 0.5, 9))
    drifted[:10] = first.curves["reduced_train_loss"].values[:10]
    twin = Run("twin", Path("t"), dict(first.curves) | {"reduced_train_loss": Curve(STEPS, drifted.tolist())})
    found = compare([first, other], twin, Options(same_start=True, tolerance=0.003))
    assert found.same_start and found.parted == parted
    assert found.verdict == ("pass" if parted else "fail")  # 0.38 % is a fault of a pair, and nothing among these seeds
    assert said(found, "opening, loss") == "pass"
    assert ("judged by their band" in noise_in_words(found)) == parted
    assert not compare([first], twin, Options(same_start=True)).parted  # nobody knows how far seeds lie apart


def test_a_band_widens_as_seeds_grow_few() -> None:
    few, many = band_of([0.002, -0.002] * 2, 2), band_of([0.002, -0.002] * 20, 5)
    assert few.spread == pytest.approx(many.spread) and few.outer > 3 * many.outer
    assert few.outer > few.half and many.outer >= many.half
