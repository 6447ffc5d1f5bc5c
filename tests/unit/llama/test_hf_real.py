"""Real weights: SmolLM2-135M imported, compared with transformers, made to speak, and exported again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

from data_prep.tokenizers import load_tokenizer
from llama import hf
from llama.model.generate import generate
from llama.model.llama import Llama
from llama.parallel.shards import fill_parameters
from tests.material import smollm2_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
TEXT = "Rotary embedding turns each pair of a head by an angle that grows with the position. " * 12


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_checkpoint()


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folder: Path) -> Llama:
    config = hf.model_config(folder)
    loaded = Llama(config)
    fill_parameters(loaded, hf.checkpoint_reader(folder, config))
    return loaded


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, oracle: transformers.PreTrainedModel, model: Llama) -> None:
    ids = torch.tensor([load_tokenizer(folder).encode(TEXT)])
    theirs = oracle(ids).logits
    assert ids.shape[1] > 190
    assert (model(ids) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_it_answers_and_as_transformers_does(folder: Path, oracle: transformers.PreTrainedModel, model: Llama) -> None:
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = auto(CHAT)["input_ids"]
    theirs = oracle.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    ours = list(generate(model, ids, 40, stop=[auto.eos_token_id]))
    assert ours == [number for number in theirs if number != auto.eos_token_id]
    assert "The capital of France is Paris" in load_tokenizer(folder).decode(ours)


@torch.no_grad()
def test_exports_load_in_transformers_and_speak_the_same(
    folder: Path, oracle: transformers.PreTrainedModel, model: Llama, tmp_path: Path
) -> None:
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=tmp_path / "step", no_dist=True)
    ids = torch.tensor([load_tokenizer(folder).encode(TEXT)[:64]])
    before = load_file(folder / "model.safetensors")
    for dtype, limit in (("bfloat16", 10**9), ("float32", 200 * 10**6)):
        out = tmp_path / dtype
        hf.export(tmp_path / "step", model.config, out, dtype, tokenizer=folder, max_shard_size=limit)
        assert len(list(out.glob("*.safetensors"))) == (1 if dtype == "bfloat16" else 3)
        for file in out.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert torch.equal(tensor, before[name].to(getattr(torch, dtype))), name
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert torch.equal(loaded.float()(ids).logits, oracle(ids).logits)
        auto = transformers.AutoTokenizer.from_pretrained(out)
        original = transformers.AutoTokenizer.from_pretrained(folder)
        assert auto(TEXT)["input_ids"] == original(TEXT)["input_ids"]
        assert auto.chat_template == original.chat_template and auto.eos_token_id == original.eos_token_id
