"""Rates of this machine: measured by real processes, kept, and refused where they do not hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_prep.errors import UserError
from llama.device import find_device
from llama.plan import calibrate, calibration_run
from llama.plan.nodes import node_type
from llama.plan.speed import Rates, rates_of
from tests.dist.harness import run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    return tmp_path


@pytest.fixture
def rates() -> Rates:
    published = rates_of(node_type("8xh100"))
    torch = calibrate.metadata.version("torch")
    return dataclasses.replace(published, device="cpu", host="node-7", torch=torch, processes=2, share=1.0)


def test_a_process_measures_and_its_rates_come_back(cache: Path) -> None:
    measured = calibrate.calibrate(1, seconds=0.1)
    assert measured.host  # of the process, in which nothing is pretended
    assert all(rate > 1e6 for table in measured.products.values() for _, rate in table)
    assert 100e6 < measured.base < 4e9
    path = calibrate.save_rates(dataclasses.replace(measured, host="node-7"))
    assert path == cache / "cache" / "rates" / "node-7-1.json"
    assert calibrate.load_rates(1).products == measured.products


def _measured(rank: int) -> Rates:
    return calibration_run.measure(find_device("cpu"), 1e-4)


def test_processes_measure_together_what_they_tell_each_other() -> None:
    measured, other = run(2, _measured)
    assert {"all_gather 2", "all_reduce 2", "reduce_scatter 2", "send 2"} == set(measured.collectives)
    assert measured.operator["tensor"] > 0 and measured.link > 1e6
    assert measured.strain == other.strain and set(measured.strain) == {"plain", "sharded", "tensor"}
    assert measured.collectives == other.collectives  # the mean of both


def test_what_was_not_measured_is_asked_for(rates: Rates) -> None:
    calibrate.save_rates(rates)
    with pytest.raises(UserError, match=r"not measured with 4 processes \(but with 2\); herd plan --calibrate"):
        calibrate.load_rates(4)


@pytest.mark.parametrize(
    "change, reason",
    [({"host": "node-8"}, "measured on node-8, and this is node-7"), ({"torch": "2.0"}, "measured with torch 2.0")],
)  # fmt: skip
def test_rates_of_another_machine_or_torch_are_refused(rates: Rates, change: dict[str, str], reason: str) -> None:
    path = calibrate.save_rates(rates)
    path.write_text(json.dumps(rates.to_json() | change))
    with pytest.raises(UserError, match=reason) as refused:
        calibrate.load_rates(2)
    assert refused.value.code == 2


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"products": 3}'])
def test_a_damaged_file_is_told(rates: Rates, text: str) -> None:
    calibrate.save_rates(rates).write_text(text)
    with pytest.raises(UserError, match="cannot be read as rates"):
        calibrate.load_rates(2)


def test_a_folder_that_cannot_be_written_is_told(cache: Path, rates: Rates) -> None:
    (cache / "cache").write_text("a file")
    with pytest.raises(UserError, match="set HERD_CACHE"):
        calibrate.save_rates(rates)


def test_this_machine_is_a_node_of_what_was_measured(rates: Rates) -> None:
    calibrate.save_rates(rates)
    node = calibrate.this_node(2)
    assert (node.device, node.ranks) == ("cpu", 2)
    assert node.flops == rates.products["bfloat16"][0][1]


def test_a_process_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_DEVICE", "abacus")
    with pytest.raises(UserError, match=r"calibration failed on rank 0: .*abacus"):
        calibrate.calibrate(1)


def test_of_two_measurements_the_one_that_was_not_disturbed_counts() -> None:
    quiet = rates_of(node_type("8xh100"))
    disturbed = dataclasses.replace(
        quiet,
        products={"bfloat16": ((1.0, 3e13), (8.0, 9e14)), "float32": quiet.products["float32"]},
        operator={kind: 2 * seconds for kind, seconds in quiet.operator.items()},
        link=quiet.link / 2,
    )
    found = calibrate.better(disturbed, quiet)
    assert dict(found.products["bfloat16"]) == {1.0: quiet.products["bfloat16"][0][1], 8.0: 9e14}
    assert found.link == quiet.link and found.operator["plain"] == quiet.operator["plain"]
    assert found == dataclasses.replace(calibrate.better(quiet, disturbed), source=found.source)
