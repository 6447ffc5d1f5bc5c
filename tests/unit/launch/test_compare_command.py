"""`herd compare` as a person or a CI job calls it: exit codes, text, JSON, Markdown, picture."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest

from launch import cli

Herd = Callable[..., tuple[int, str, str]]
FIXTURES = Path(__file__).parents[2] / "fixtures/parity"


@pytest.fixture
def herd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Herd:
    """Runs `herd` with arguments: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["herd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return call


def run(name: str) -> Path:
    return FIXTURES / f"{name}.json"


def test_equal_runs_exit_with_0_and_one_sentence(herd: Herd) -> None:
    code, out, _ = herd("compare", run("reference"), run("bf16_mixed"), "--same-start")
    assert code == 0
    last = out.splitlines()[-1]
    assert last.startswith("PASS: bf16_mixed.json equals reference.json by every rule that counts (steps 41 to 400)")
    assert "would have found: gradients 2 % too large after step 50" in out


def test_a_fault_exits_with_1_and_names_the_rule(herd: Herd) -> None:
    code, out, _ = herd("compare", run("reference"), run("gradients_2_percent"), "--same-start")
    assert code == 1
    assert (
        "FAIL: gradients_2_percent.json differs from reference.json (steps 41 to 400): the gradient norm is apart by +1.9"
        in out
    )


def test_too_little_data_exits_with_3(herd: Herd) -> None:
    code, out, _ = herd("compare", run("seed_2"), run("reference"))
    assert code == 3 and "UNDECIDED" in out


def test_the_worst_of_several_candidates_decides(herd: Herd, tmp_path: Path) -> None:
    arguments = [
        "--reference",
        run("reference"),
        "--same-start",
        "--json",
        "--markdown",
        tmp_path / "new" / "parity.md",
    ]
    code, out, _ = herd("compare", *arguments, run("bf16_sr"), run("no_decay_mask"), "--to", tmp_path / "parity.png")
    assert code == 1
    found = json.loads(out)
    assert found["exit_code"] == 1 and [c["verdict"] for c in found["comparisons"]] == ["pass", "fail"]
    rule = next(r for r in found["comparisons"][1]["rules"] if r["rule"] == "gradient norm")
    assert rule["verdict"] == "fail" and rule["high"] < -0.01
    assert len(found["comparisons"][0]["faults"]) == 6
    report = (tmp_path / "new" / "parity.md").read_text()
    assert "# Parity: fail" in report and "| gradient norm | fail |" in report
    pixels = matplotlib.image.imread(tmp_path / "parity.png")
    assert pixels.shape[:2] == (910, 1430)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "parity.md", "parity.png"]


def test_seeds_of_the_reference_are_a_band_in_text_and_picture(herd: Herd, tmp_path: Path) -> None:
    seeds = ["--reference", run("reference"), "--reference", run("seed_2")]
    code, out, _ = herd("compare", *seeds, run("seed_3"), "--to", tmp_path / "band.svg")
    assert code == 0 and "band of the seeds" in out
    assert "seeds" in (tmp_path / "band.svg").read_text() or (tmp_path / "band.svg").stat().st_size > 10_000


def test_the_pointwise_rule_can_decide(herd: Herd) -> None:
    same = ["compare", run("tail"), run("tail_nearest"), "--same-start"]
    assert herd(*same)[0] == 1
    assert herd(*same, "--decide", "pointwise")[0] == 0
    assert herd(*same, "--decide", "pointwise", "--rtol", "0.005")[0] == 1


def test_a_point_that_is_no_number_is_named_with_its_step(herd: Herd, tmp_path: Path) -> None:
    curves = json.loads(run("reference").read_text())
    curves["reduced_train_loss"]["values"][99] = math.nan
    (tmp_path / "broken.json").write_text(json.dumps(curves))
    code, out, _ = herd("compare", run("reference"), tmp_path / "broken.json", "--same-start", "--json")
    assert code == 1 and "broken.json: loss is nan at step 100" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["good.json"], "is compared with nothing"),
        (["good.json", "good.json"], "is given twice"),
        (["good.json", "other.csv"], "holds no reduced_train_loss or lm loss"),
        (["good.json", "other.csv", "--tag", "accuracies"], "holds no accuracies (found gradient_norm"),
        (["good.json", "short.csv"], "train longer"),
        (["good.json", "empty"], "has no TensorBoard events"),
        (["good.json", "bad.json"], "is no file of curves"),
        (["good.json", "short.csv", "--over", "tokens"], "holds no tokens"),
        (["good.json", "short.csv", "--to", "curves.doc"], "pictures end in .png"),
        (["good.json", "missing"], "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    herd: Herd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("good.json").write_text(run("reference").read_text())
    Path("bad.json").write_text("[1, 2]")
    Path("other.csv").write_text("step,accuracy\n1,0.5\n2,0.6\n")
    Path("short.csv").write_text("step,loss\n" + "".join(f"{i},{5 - i / 10}\n" for i in range(1, 11)))
    code, _, error = herd("compare", *arguments)
    assert code == 2 and says in error
    assert len(error.strip().splitlines()) == 1 or error.startswith("Usage")
