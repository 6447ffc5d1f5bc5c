"""Hugging Face in and out: every family computes what transformers computes, and its bytes survive the way round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

from llama import hf
from llama.config import Model
from llama.model.llama import Llama
from llama.model.rope import inverse_frequencies
from llama.parallel.shards import fill_parameters

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # small, so that a short sequence crosses it
}


@dataclass(frozen=True)
class Family:
    """A checkpoint as one house publishes it, made small."""

    kind: str
    keys: dict[str, object]
    max_shard_size: str = "5GB"

    def config(self) -> transformers.PreTrainedConfig:
        shape = {"vocab_size": 203, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
        return transformers.AutoConfig.for_model(self.kind, **(shape | self.keys))


FAMILIES = {
    "llama2": Family("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3.1": Family(
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
        "40KB",
    ),
    "llama3.2": Family(
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,  # wider than hidden / heads, as the 3B's is not but the code must bear
            "rope_parameters": LLAMA3_ROPE | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        "40KB",
    ),
    "openllama": Family("llama", {"num_attention_heads": 3, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "mistral": Family(
        "mistral",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None, "head_dim": 8},
        "60KB",
    ),
    "smollm2": Family(
        "llama",
        {
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 72,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}
Oracle = transformers.PreTrainedModel
Saved = Callable[[str], tuple[Oracle, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A family's random model in transformers, and the directory that save_pretrained made of it."""
    made: dict[str, tuple[Oracle, Path]] = {}

    def make(name: str) -> tuple[Oracle, Path]:
        if name not in made:
            torch.manual_seed(7)
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            oracle = transformers.AutoModelForCausalLM.from_config(family.config(), attn_implementation="eager")
            for parameter in oracle.parameters():  # norms of one and tiny weights would hide mistakes
                torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
            oracle.save_pretrained(folder, max_shard_size=family.max_shard_size)
            made[name] = (oracle, folder)
        return made[name]

    return make


def load(folder: Path, config: Model | None = None) -> Llama:
    config = config or hf.model_config(folder)
    model = Llama(config)
    fill_parameters(model, hf.checkpoint_reader(folder, config))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_logits_and_gradients_are_those_of_transformers(saved: Saved, name: str) -> None:
    oracle, folder = saved(name)
    model = load(folder)
    tokens = torch.randint(0, 203, (2, 96), generator=torch.Generator().manual_seed(1))
    logits = oracle(tokens).logits
    assert (model(tokens) - logits).abs().max() < 1e-5 * logits.abs().max()

    labels = tokens.roll(-1, 1)
    oracle.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(tokens, labels=labels).sum().backward()
    theirs = dict(oracle.named_parameters())
    for ours, parameter in model.named_parameters():
        expected = theirs[hf.hf_name(ours)].grad
        assert parameter.grad is not None and expected is not None
        assert relative(parameter.grad[: len(expected)], expected) < 1e-5, ours
        assert not parameter.grad[len(expected) :].any(), f"padded rows of {ours} have a gradient"


def save_checkpoint(model: Llama, folder: Path) -> Path:
    """What a training run leaves: the model's parameters, and other things that an export must not need."""
    state = {"model": dict(model.named_parameters()), "optimizer": {"step": torch.tensor(3)}, "train": {"tokens": 5}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_gives_back_the_imported_bytes(saved: Saved, tmp_path: Path, name: str, dtype: str) -> None:
    oracle, folder = saved(name)
    if dtype != "float32":
        folder = tmp_path / "imported"
        type(oracle).from_pretrained(saved(name)[1], dtype=getattr(torch, dtype)).save_pretrained(folder)
    checkpoint = save_checkpoint(load(folder), tmp_path / "step")
    config = hf.model_config(folder)
    hf.export(checkpoint, config, tmp_path / "out", dtype, max_shard_size=60_000)

    before, after = stored_tensors(folder), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == getattr(torch, dtype), key
        assert torch.equal(bits(after[key]), bits(tensor)), key
    assert hf.model_config(tmp_path / "out") == config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(loaded) is type(oracle)
    assert loaded.dtype == getattr(torch, dtype)
    tokens = torch.arange(96)[None]
    if dtype == "float32":
        assert torch.equal(loaded(tokens).logits, oracle(tokens).logits)


def test_files_stay_under_the_limit_and_the_index_names_every_tensor(saved: Saved, tmp_path: Path) -> None:
    model = load(saved("llama3.1")[1])
    hf.save_model(model, tmp_path / "one")
    hf.save_model(model, tmp_path / "many", max_shard_size=20_000)
    assert [path.name for path in (tmp_path / "one").glob("*safetensors*")] == ["model.safetensors"]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 2 * sum(p[:203].numel() for p in model.parameters())
    for file in files:
        assert file.stat().st_size < 22_000 or len(load_file(file)) == 1
    one, many = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert all(torch.equal(one[key], many[key]) for key in one) and one.keys() == many.keys()


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_any_box_of_any_parameter_can_be_read_alone(saved: Saved, name: str) -> None:
    _, folder = saved(name)
    config = hf.model_config(folder).model_copy(update={"vocab_multiple": 64})
    model, read = load(folder, config), hf.checkpoint_reader(folder, config)
    for key, parameter in model.state_dict().items():
        for parts in (1, 3, 4):
            for dim in range(parameter.ndim):
                start = 0
                for piece in parameter.chunk(parts, dim):
                    box = [slice(0, size) for size in parameter.shape]
                    box[dim] = slice(start, start := start + piece.shape[dim])
                    assert torch.equal(read(key, tuple(box)), piece), (key, box)
    assert config.padded_vocab_size == 256
    assert not model.head.weight[203:].any(), "the vocabulary's padding is zero"


@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_a_pipeline_stage_reads_only_what_it_holds(saved: Saved, layers: tuple[int, ...]) -> None:
    for name in ("llama2", "llama3.2"):
        _, folder = saved(name)
        config = hf.model_config(folder)
        whole, stage = load(folder), Llama(config, layers)
        fill_parameters(stage, hf.checkpoint_reader(folder, config))
        for key, parameter in stage.named_parameters():
            assert torch.equal(parameter, whole.state_dict()[key]), key


@pytest.mark.parametrize("head_dim,factor,original", [(128, 8.0, 8192), (64, 32.0, 8192), (16, 8.0, 16)])
def test_stretched_rotary_frequencies_are_those_of_transformers(head_dim: int, factor: float, original: int) -> None:
    rope = LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": original}
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope, hidden_size=4 * head_dim)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    scaling = hf.config.RopeScaling(factor=factor, original_max_position=original)
    assert torch.equal(inverse_frequencies(head_dim, 500000.0, scaling, torch.device("cpu")), theirs)


def test_both_spellings_of_rotary_parameters_are_read(tmp_path: Path) -> None:
    """config.json as the Llama 3.1 repository has it, and as transformers 5 rewrites it."""
    old = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
        | {"original_max_position_embeddings": 8192},
        "attention_bias": False,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = hf.model_config(tmp_path)
    assert read.rope_theta == 500000.0 and read.rope_scaling == hf.config.RopeScaling()
    assert (read.head_size, read.kv_heads, read.vocab_size, read.norm_eps) == (128, 8, 128256, 1e-5)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    assert "rope_parameters" in json.loads((tmp_path / "new/config.json").read_text())
    assert hf.model_config(tmp_path / "new") == read


def test_what_a_config_leaves_out_has_the_default_of_transformers(tmp_path: Path) -> None:
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    for kind in ("llama", "mistral"):
        keys = shape | {"num_attention_heads": 8, "model_type": kind, "sliding_window": None}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        ours, theirs = hf.model_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.max_position == theirs.max_position_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_embeddings == theirs.tie_word_embeddings
