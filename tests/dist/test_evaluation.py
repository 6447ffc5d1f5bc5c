"""What is measured on held-out samples is the same on every layout, and what one process finds by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from llama.chat.dataset import build_chat, chat_samples
from llama.config import Recipe
from llama.data.build import build_data
from llama.device import find_device
from llama.layout import layout
from llama.model.generate import generate
from llama.model.llama import Llama
from llama.parallel.apply import parallelize
from llama.parallel.mesh import build_mesh
from llama.run_folder import RunFolder, complete, step_of
from llama.train import loop
from llama.train.evaluate import Evaluation, Evaluator, Figures
from llama.train.evaluate_samples import Sample, Sampler
from tests.dist import harness
from tests.dist.layouts import mean_loss, reference_model
from tests.dist.runs import Record, run_recipe, spied_train, write_tokens
from tests.unit.llama.chat.chats import chat_recipe, write_tokenizer

TP = {"parallel__tensor_parallel": 2}
PP = {"parallel__pipeline_parallel": 2}
# name -> (ranks, what changes in the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"train__micro_batch_size": 4}),
    "single_padded": (1, {"chat__pack": False, "validation__batches": 20}),
    "fsdp2": (2, {"train__micro_batch_size": 2}),
    "tp2": (2, TP | {"parallel__sequence_parallel": False}),
    "sp2": (2, TP),
    "pp2": (2, PP),
    "pp2_sp2_interleaved": (4, PP | TP | {"parallel__pipeline_schedule": "interleaved_1f1b", "model__num_layers": 4}),
}
PROMPTS = ("abc", "f")


class Setting(NamedTuple):
    folder: Path
    sources: list[dict[str, str]]
    weights: dict[str, torch.Tensor]
    """Of a model that has learnt some of the answers."""
    written: dict[str, str]
    """What one process answers, by the prompt; filled as it is asked."""


def _talk(path: Path, count: int, seed: int, answer: Any) -> str:
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(random.choice(list("abcdef"), random.integers(2, 9)))
            messages = [{"role": "user", "content": word}, {"role": "assistant", "content": answer(word, random)}]
            file.write(json.dumps({"messages": messages * int(random.integers(1, 3))}) + "\n")
    return str(path)


def _recipe(setting: Setting, **changes: Any) -> Recipe:
    keys: dict[str, Any] = dict(
        data__validation=setting.sources, validation__interval=1, validation__accuracy=True, validation__samples=3,
        validation__prompts=PROMPTS, validation__sample_tokens=6, train__global_batch_size=4, validation__batches=9,
    )  # fmt: skip
    return chat_recipe(setting.folder, setting.folder / "train.jsonl", **(keys | changes))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("evaluation")
    write_tokenizer(folder / "tokenizer")

    def first(word: str, _: Any) -> str:
        return "yes" if word[0] in "abcd" else "no"

    def either(_: str, random: Any) -> str:
        return str(random.choice(["yes", "no", "maybe"]))

    _talk(folder / "train.jsonl", 200, 0, first)
    sources = [
        {"path": _talk(folder / "rule.jsonl", 30, 1, first), "name": "rule"},
        {"path": _talk(folder / "chance.jsonl", 30, 2, either)},
    ]
    config = _recipe(Setting(folder, sources, {}, {}))
    model, data = reference_model(config, torch.float32), build_chat(config, 0, 1)[0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(25):
        for batch in data.step(step * 4):
            mean_loss(model, batch, masked=True).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Setting(folder, sources, {name: p.detach() for name, p in model.named_parameters()}, {})


def _measured(rank: int, config: Recipe, weights: dict[str, torch.Tensor] | None) -> tuple[Evaluation, list[Sample]]:
    mesh, device = build_mesh(layout(config, torch.distributed.get_world_size()), "cpu"), find_device("cpu")
    model = parallelize(config, mesh, device, read=weights and (lambda name, box: weights[name][box]))
    _, data = build_data(config, mesh.data_rank, mesh.layout.data)
    assert data is not None
    evaluator = Evaluator(config, device, model, data, lambda what: None, lambda: False)
    found = evaluator.run("validation")
    assert found is not None
    return found, Sampler(config, device, model, data, lambda what: None).run("samples") if config.chat else []


@pytest.fixture(scope="module")
def alone(setting: Setting) -> dict[str, list[float]]:
    """Of each source: summed loss and tokens by torch's cross-entropy, answers that greedy generation gives, answers."""
    config = _recipe(setting)
    model = Llama(config.model)
    model.load_state_dict(setting.weights)
    samples = chat_samples(config)[1]
    assert samples is not None
    encoded, files = samples.encoded, [Path(file).name for file in samples.encoded.facts["files"]]
    file_of = np.repeat(files, encoded.facts["conversations_of"])
    sums = {name: [0.0] * 4 for name in ("chance.jsonl", "rule.jsonl")}
    for conversation, name in enumerate(file_of):
        example = conversation  # nothing is split here
        ids = torch.from_numpy(encoded.tokens.get(example).astype("int64"))
        trained = torch.from_numpy(encoded.trained.get(example).astype(bool))
        with torch.no_grad():
            logits = model(ids[None, :-1])[0]
        labels = ids.masked_fill(~trained, -100)[1:]
        sums[name][0] += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        sums[name][1] += int((labels != -100).sum())
        begin = int((~trained).nonzero()[-1]) + 1
        written = list(generate(model, ids[:begin].tolist(), len(ids) - begin))
        sums[name][2] += written == ids[begin:].tolist()
        sums[name][3] += 1
    return {"rule": sums["rule.jsonl"], "chance": sums["chance.jsonl"]}


def _answered(setting: Setting, prompt: str, end: str = "<|im_end|>") -> str:
    """What the generator of one process writes."""
    if prompt in setting.written:
        return setting.written[prompt]
    from data_prep.tokenizers import load_tokenizer

    config, tokenizer = _recipe(setting), load_tokenizer(setting.folder / "tokenizer")
    model = Llama(config.model)
    model.load_state_dict(setting.weights)
    ids = list(generate(model, tokenizer.encode(prompt, special=True), 6, [tokenizer.control[end]]))
    setting.written[prompt] = tokenizer.decode(ids) + (end if len(ids) < 6 else "")
    return setting.written[prompt]


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_accuracy_and_samples_of_every_layout_are_those_of_one_process(
    setting: Setting, alone: dict[str, list[float]], name: str
) -> None:
    world, changes = LAYOUTS[name]
    config, wanted = _recipe(setting, **changes), alone
    assert 0 < wanted["chance"][2] < wanted["chance"][3] and wanted["rule"][2] > wanted["chance"][2]
    for found, samples in harness.run(world, _measured, config, setting.weights):
        for source, (loss, tokens, right, answers) in wanted.items():
            figures = found.sources[source]
            assert figures.loss_sum == pytest.approx(loss, rel=1e-5)
            assert (figures.tokens, figures.right, figures.answers) == (tokens, right, answers)
        assert found.whole.loss == pytest.approx(
            sum(row[0] for row in wanted.values()) / sum(row[1] for row in wanted.values()), rel=1e-5
        )
        assert found.baseline is not None and 0.3 < found.baseline.accuracy < 0.7
        assert len(samples) == 5 and samples[3].prompt == "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
        for sample in samples:
            assert sample.answer == _answered(setting, sample.prompt), sample
        assert all(sample.wanted in ("yes<|im_end|>", "no<|im_end|>", "maybe<|im_end|>") for sample in samples[:3])


def test_each_token_file_has_its_own_loss(tmp_path: Path) -> None:
    """Of a blend whose held-out part is cut off by data.split; their sum is the whole on each layout."""
    sources = [{"path": write_tokens(tmp_path, seed=0), "name": "web"}, {"path": write_tokens(tmp_path, seed=1)}]
    keys = dict(data__train=sources, data__split="60,40,0", validation__interval=1, validation__batches=2)
    config = run_recipe(tmp_path, "", **keys)
    model, (_, data) = reference_model(config, torch.float32), build_data(config, 0, 1)
    assert data is not None
    wanted = {"web": [0.0, 0], "tokens1": [0.0, 0]}
    for i in range(2 * config.train.global_batch_size):
        row = torch.from_numpy(data.samples[i])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        of = wanted["web" if data.samples.source(i) == sources[0]["path"] else "tokens1"]
        of[0] += float(loss)
        of[1] += len(row) - 1
    for world, changes in ((1, {}), (2, {"train__micro_batch_size": 2}), (2, TP), (2, PP)):
        for found, _ in harness.run(world, _measured, run_recipe(tmp_path, "", **keys, **changes), None):
            assert {name: (f.loss_sum, f.tokens) for name, f in found.sources.items()} == {
                name: (pytest.approx(loss, rel=1e-5), tokens) for name, (loss, tokens) in wanted.items()
            }
            assert found.whole.accuracy is None


class Scripted(Evaluator):
    """Finds the losses that a test wants, by the validation's step."""

    losses: ClassVar[dict[int, float]] = {}

    def run(self, what: str) -> Evaluation:
        return Evaluation(Figures(self.losses.get(int(what.split()[-1]), 9.0), 1))


def _scripted(rank: int, config: Recipe, losses: dict[int, float]) -> Record:
    Scripted.losses = losses
    loop.Evaluator = Scripted  # type: ignore[misc]
    return spied_train(rank, config)


def _kept(folder: Path) -> list[int]:
    return [step_of(checkpoint) for checkpoint in complete(folder)]


def test_the_best_checkpoint_is_kept_and_a_run_that_no_longer_improves_ends_and_stays_ended(tmp_path: Path) -> None:
    prefix, run = write_tokens(tmp_path), tmp_path / "run"
    keys: dict[str, Any] = dict(
        train__steps=20, checkpoint__interval=3, checkpoint__keep_last=1, checkpoint__keep_best=True,
        validation__interval=2, validation__patience=3, validation__at_start=True,
    )  # fmt: skip
    # Step 0 is the untouched model's: neither kept nor waited for.
    losses = {0: 0.5, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 10: 2.4, 12: 1.0}
    first = harness.run(2, _scripted, run_recipe(run, prefix, **keys, data__order_samples=160), losses)
    for record in first:
        assert record.error is None and record.outcome is not None
        assert (record.outcome.step, record.outcome.stopped_by) == (10, None)
        assert "in 3 validations in a row" in str(record.outcome.given_up)
    assert _kept(run) == [4, 10] and RunFolder(run).best() == (4, 2.0)
    events = list(RunFolder(run).history())
    assert [e["step"] for e in events if e["event"] == "validation"] == [0, 2, 4, 6, 8, 10]
    assert [e["step"] for e in events if e["event"] == "best"] == [2, 4]
    assert [e["step"] for e in events if e["event"] == "save"] == [2, 3, 4, 6, 9, 10]
    assert events[-1]["outcome"] == "finished" and "step 4" in events[-1]["reason"]
    again = harness.run(1, _scripted, run_recipe(run, prefix, **keys, data__order_samples=160), losses)[0]
    assert again.outcome is not None and again.outcome.step == 10 and not again.reports
    more = run_recipe(run, prefix, **{**keys, "validation__patience": 4, "train__steps": 12}, data__order_samples=160)
    longer = harness.run(1, _scripted, more, losses)[0]
    assert longer.outcome is not None and (longer.outcome.step, longer.outcome.given_up) == (12, None)
    assert _kept(run) == [12] and RunFolder(run).best() == (12, 1.0)
