"""`herd plot` on real TensorBoard events: every point is read, a resumed run is one curve, the picture shows them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from launch import cli, plot

Herd = Callable[..., tuple[int, str, str]]


def write_run(folder: Path, steps: range, purge_step: int | None = None, offset: float = 0.0) -> Path:
    """Points of a run as llama/train/metrics.py writes them."""
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
    for step in steps:
        values = {
            "reduced_train_loss": 4 + 4 / step + offset,
            "lr": 1e-3 * min(1, step / 10),
            "gradient_norm": 1 / step,
            "consumed_tokens": 512 * step,
        }
        for tag, value in values.items():
            board.add_scalar(tag, value, step)
        if step % 10 == 0:
            board.add_scalar("val_loss", 4.5 + 4 / step, step)
    board.close()
    return folder


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


def test_every_point_is_read_however_many_there_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", range(1, 12_001))  # TensorBoard itself keeps a sample of 10,000
    loss = plot.read_scalars(run)["reduced_train_loss"]
    assert loss.steps == list(range(1, 12_001))
    assert loss.values[0] == pytest.approx(8.0)


def test_a_resumed_run_is_one_curve_without_the_part_that_was_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "resumed", range(1, 31))
    write_run(run, range(21, 26), purge_step=21, offset=1.0)
    loss = plot.read_scalars(run)["reduced_train_loss"]
    assert loss.steps == list(range(1, 26))
    assert loss.values[-1] == pytest.approx(5 + 4 / 25)


def test_the_picture_holds_every_run_and_the_line_says_first_and_last_loss(herd: Herd, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", range(1, 41)) for name in "ab"]
    code, out, _ = herd("plot", *runs, "--to", tmp_path / "new" / "curves.png")
    assert code == 0
    assert "a/run: 40 points, loss 8.0000 at step 1 -> 4.1000 at step 40, validation 4.6000" in out
    pixels = matplotlib.image.imread(tmp_path / "new" / "curves.png")
    for colour in plot.COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(axis=-1) < 0.01).sum() > 200, f"no line of colour {colour}"
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "curves.png"]


def test_over_tokens_the_curve_ends_at_the_tokens_consumed(
    herd: Herd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    run = write_run(tmp_path / "run", range(1, 41))
    assert herd("plot", run, "--to", tmp_path / "c.svg", "--over", "tokens")[0] == 0
    (figure,) = drawn
    assert [max(line.get_xdata()) for axes in figure.axes for line in axes.get_lines()] == [512 * 40] * 6


def test_smoothing_starts_at_the_first_value_and_passes_over_what_is_not_a_number() -> None:
    assert plot.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert plot.smooth([math.nan, 2.0, math.inf, 2.0])[1:] == pytest.approx([2.0] * 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["empty"], "has no TensorBoard events"),
        (["gone"], "does not exist"),
        (["foreign"], "holds no reduced_train_loss (found accuracy)"),
        (["good", "--to", "curves.doc"], "pictures end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    herd: Herd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    board = SummaryWriter("foreign")
    board.add_scalar("accuracy", 1.0, 1)
    board.close()
    write_run(Path("good"), range(1, 5))
    code, _, error = herd("plot", *arguments)
    assert code in (1, 2) and says in error
    assert not Path("curves.doc").exists()
