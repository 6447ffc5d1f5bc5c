"""The model card: what the Hub reads of it, what it tells of a run, and that a person's words are never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama import recipe as recipes
from llama.config import Recipe
from llama.hf.card import CARD, describe, front_matter_of, hub_name, is_ours, training_of, write_card
from llama.run_folder import RunFolder, write_json
from tests.oracles import oracle

MODEL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_position=64)


def _recipe(folder: Path, **sections: Any) -> Recipe:
    keys: dict[str, Any] = {
        "name": "tuned",
        "run_dir": str(folder / "run"),
        "model": MODEL,
        "data": {"seq_length": 32, "train": [{"path": "data/code", "weight": 3}, {"path": "data/web", "weight": 1}]},
        "train": {"steps": 9, "global_batch_size": 4, "init_from": str(folder / "SmolLM2-135M")},
    }
    return recipes.build(keys | sections, "test")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of step 6 of a run that was validated at 3, 6 and 9, beside its base with a card of its own."""
    run = RunFolder(tmp_path / "run")
    found = run.path / "checkpoints" / "step-00000006"
    found.mkdir(parents=True)
    (found / "herd.json").write_text(json.dumps({"state": {"step": 6, "consumed_samples": 24, "trained_tokens": 700}}))
    write_json(run.path / "environment.json", {"packages": {"torch": "2.13.0"}, "python": "3.12.1 (main)"})
    run.record("start", 1, version="c0ffee", layout="fsdp2", ranks=2, device="H100")
    web = {"loss": 1.0, "accuracy": 0.5}
    for step, loss in ((3, 1.0), (6, 2.0), (9, 3.0)):
        run.record("validation", 1, step=step, loss=loss, accuracy=0.25, sources={"web|en": web} if step == 6 else None)
    base = tmp_path / "SmolLM2-135M"
    base.mkdir()
    (base / CARD).write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [theirs]\n---\n# SmolLM2\n")
    return found


def test_the_hub_reads_base_library_tags_and_the_bases_license(checkpoint: Path, tmp_path: Path) -> None:
    lora = {"rank": 8, "quantize": "int8", "targets": "q,v"}
    cards = oracle("huggingface_hub").ModelCard
    text = describe(_recipe(tmp_path, lora=lora), "adapter", checkpoint)
    data = cards(text).data
    assert (data.base_model, data.library_name, data.license) == ("SmolLM2-135M", "peft", "apache-2.0")
    assert data.pipeline_tag == "text-generation" and set(data.tags) == {"herd", "llama", "lora", "qlora"}
    assert data.to_dict()["base_model_relation"] == "adapter"
    merged = cards(describe(_recipe(tmp_path, lora=lora), "merged", checkpoint)).data
    assert (merged.library_name, merged.to_dict()["base_model_relation"]) == ("transformers", "finetune")
    (tmp_path / "SmolLM2-135M" / CARD).unlink()
    assert cards(describe(_recipe(tmp_path), "model", checkpoint)).data.license is None
    fresh = _recipe(tmp_path, train={"steps": 9, "global_batch_size": 4})
    assert "base_model" not in cards(describe(fresh, "model", checkpoint)).data.to_dict()


def test_what_the_run_was_is_told(checkpoint: Path, tmp_path: Path) -> None:
    text = describe(_recipe(tmp_path), "model", checkpoint)
    for line in (
        "| step | 6 of 9 |",
        "| tokens read | 768 |",
        "| tokens with a label | 700 |",
        "| layout | fsdp2: 2 × H100 |",
        "| code | 75.0% |",
        "| here, step 6 | all | 2.0000 | 7.389 | 25.0% |",
        "| here, step 6 | web\\|en | 1.0000 | 2.718 | 50.0% |",
        "| best, step 3 | all | 1.0000 | 2.718 | 25.0% |",
        "herd c0ffee, torch 2.13.0, Python 3.12.1; 20",
        'AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        "global_batch_size: 4",
    ):
        assert line in text, line
    assert "step 9 |" not in text
    chat = _recipe(tmp_path, chat={"template": "alpaca"}, data={"seq_length": 32, "train": ["a.json", "b.json"]})
    told = describe(chat, "model", checkpoint)
    assert "herd chat DIRECTORY --template alpaca" in told and "| a.json | all of it |" in told


def test_an_export_without_records_has_a_card_all_the_same(tmp_path: Path) -> None:
    text = describe(_recipe(tmp_path), "model", tmp_path / "run" / "checkpoints" / "step-00000006")
    assert "### Validation" not in text and "| precision | bf16_mixed |" in text


def test_a_card_that_a_person_wrote_or_changed_stays(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    write_card(new, "# First\n", old)
    assert is_ours((new / CARD).read_text())
    write_card(old, "# Second\n", new)  # our own gives way
    assert "Second" in (old / CARD).read_text()
    (old / CARD).write_text((old / CARD).read_text().replace("Second", "Second, by me"))
    write_card(new, "# Third\n", old)
    assert "Second, by me" in (new / CARD).read_text() and not is_ours((new / CARD).read_text())


def test_a_merged_model_tells_what_its_adapters_card_tells(checkpoint: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, lora={"rank": 8})
    write_card(tmp_path, describe(recipe, "adapter", checkpoint), tmp_path / "none")
    said = training_of(tmp_path / CARD)
    assert said.startswith("## Training") and "<!--" not in said
    merged = describe(recipe, "merged", None, said=said)
    assert "| step | 6 of 9 |" in merged and "adapter folded in" in merged and "PeftModel" not in merged
    assert training_of(tmp_path / "SmolLM2-135M" / CARD) == training_of(tmp_path / "none") == ""


def test_names_of_bases_and_odd_cards(tmp_path: Path) -> None:
    assert hub_name(Path("/c/hub/models--meta-llama--Llama-3.2-1B/snapshots/0a1b")) == "meta-llama/Llama-3.2-1B"
    assert hub_name(Path("weights/SmolLM2-135M/")) == "SmolLM2-135M"
    for text in ("", "# No front matter", "---\n- a\n---\n", "---\n{[\n---\n", "---\nlicense"):
        (tmp_path / CARD).write_text(text)
        assert front_matter_of(tmp_path) == {}
