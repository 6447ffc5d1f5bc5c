"""What cannot be imported or exported is refused before anything is loaded, in one line that names the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from llama import hf
from llama.config import Model
from llama.model.llama import Llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
CONFIG = Model(vocab_size=60, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a random model in several files."""
    folder = tmp_path_factory.mktemp("good") / "model"
    model = Llama(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    hf.save_model(model, folder, "float32", max_shard_size=16_000)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def edit(path: Path, **change: Any) -> None:
    keys = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not ...}))


@pytest.mark.parametrize(
    "change,said",
    [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "mistral", "sliding_window": ...}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_attention_heads": ...}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"rms_norm_eps": 0}, "norm_eps"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_configs_that_the_model_cannot_follow(folder: Path, change: dict[str, Any], said: str) -> None:
    edit(folder / "config.json", **change)
    message = refusal(lambda: hf.model_config(folder))
    assert said in message and "config.json" in message


def test_harmless_keys_are_accepted(folder: Path) -> None:
    edit(folder / "config.json", pretraining_tp=2, is_llama_config=True, rope_interleaved=False, use_cache=False)
    assert hf.model_config(folder) == CONFIG.model_copy(update={"num_kv_heads": 2})


def read(folder: Path, **change: Any) -> Callable[[], object]:
    return lambda: hf.checkpoint_reader(folder, CONFIG.model_copy(update=change))


def test_a_missing_file_of_the_index(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    message = refusal(read(folder))
    assert file.name in message and "fetch" in message


@pytest.mark.parametrize("size", [0, 5, 100, -4])
def test_a_truncated_file(folder: Path, size: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:size])
    message = refusal(read(folder))
    assert file.name in message and "fetch it again" in message


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Make one file of the directory and change its tensors."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight missing" in refusal(read(folder))


def test_a_missing_output_of_a_tied_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "set model.tie_embeddings=true" in refusal(read(folder))


def test_a_tensor_of_a_wrong_shape(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    message = refusal(read(folder))
    assert "model.norm.weight has shape [31] and the model needs [32]" in message


def test_a_tensor_that_has_no_place(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.ones(3)}))
    assert "score.weight" in refusal(read(folder))
    change_tensors(folder, lambda tensors: tensors.pop("score.weight"))
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    read(folder)()


def test_quantised_weights(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is I8" in refusal(read(folder))


@pytest.mark.parametrize(
    "key,value", [("vocab_size", 61), ("num_layers", 3), ("num_heads", 8), ("norm_eps", 1e-6), ("tie_embeddings", True)]
)
def test_a_recipe_of_another_model(folder: Path, key: str, value: Any) -> None:
    message = refusal(read(folder, **{key: value}))
    assert f"set model.{key}={getattr(CONFIG, key)}" in message


def test_another_rotary_base_is_allowed_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(folder, rope_theta=500000.0)()
    assert "model.rope_theta=500000.0" in caplog.text


def test_an_index_that_names_what_its_file_lacks(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=files | {"lm_head.weight": files["model.embed_tokens.weight"]})
    assert "lm_head.weight" in refusal(read(folder))


def test_directories_that_hold_no_weights(tmp_path: Path, folder: Path) -> None:
    assert "config.json" in refusal(lambda: hf.model_config(tmp_path / "nowhere"))
    assert "neither model.safetensors" in refusal(read(tmp_path))
    assert "no such directory" in refusal(read(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in refusal(read(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    assert "convert it" in refusal(read(tmp_path))
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(lambda: hf.model_config(folder))


# ---- export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Llama(CONFIG), tmp_path_factory.mktemp("run") / "step-00000001")


def save(model: Llama, to: Path, value: float = 0.5) -> Path:
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    dcp.save({"model": dict(model.named_parameters())}, checkpoint_id=to, no_dist=True)
    return to


def test_only_an_earlier_export_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    to.mkdir()
    hf.export(checkpoint, CONFIG, to)  # an empty folder is fine
    assert "not empty" in refusal(lambda: hf.export(checkpoint, CONFIG, to))
    hf.export(checkpoint, CONFIG, to, "float32", overwrite=True)
    assert load_file(to / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    (to / "thesis").mkdir()
    assert "not replaced" in refusal(lambda: hf.export(checkpoint, CONFIG, to, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left aside"
    (tmp_path / "file").touch()
    assert "no folder" in refusal(lambda: hf.export(checkpoint, CONFIG, tmp_path / "file", overwrite=True))


def test_values_that_the_type_cannot_hold_leave_no_directory(tmp_path: Path) -> None:
    for value, dtype, said in ((1e5, "float16", "--dtype bfloat16"), (float("nan"), "bfloat16", "diverged")):
        spoilt = save(Llama(CONFIG), tmp_path / f"step-{value}", value)
        assert said in refusal(lambda at=spoilt, kind=dtype: hf.export(at, CONFIG, tmp_path / "out", kind))
        assert not list(tmp_path.glob("out*"))
    assert "int8" in refusal(lambda: hf.export(tmp_path / "step-100000.0", CONFIG, tmp_path / "out", "int8"))


def test_checkpoints_of_another_model_or_damaged(checkpoint: Path, tmp_path: Path) -> None:
    def attempt(at: Path, **change: Any) -> str:
        return refusal(lambda: hf.export(at, CONFIG.model_copy(update=change), tmp_path / "out"))

    assert "model.layers.2.attention" in attempt(checkpoint, num_layers=3)
    assert "model.layers.0.mlp" in attempt(checkpoint, intermediate_size=64)
    assert "no complete checkpoint" in attempt(tmp_path)
    spoilt = Path(shutil.copytree(checkpoint, tmp_path / "step"))
    for file in spoilt.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in attempt(spoilt)
    (spoilt / ".metadata").write_bytes(b"not a pickle")
    assert ".metadata: is damaged" in attempt(spoilt)


def test_a_full_disk_is_noticed_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "GB are free" in refusal(lambda: hf.export(checkpoint, CONFIG, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
