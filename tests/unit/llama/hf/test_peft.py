"""PEFT's adapter files in and out, and merging: peft loads what herd writes, and the other way round, to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from launch.merge import command as herd_merge
from llama import hf
from llama.config import Recipe
from llama.hf.merge import compare, merge
from llama.hf.peft import adapter_config, adapter_lora, peft_key
from llama.model.llama import Llama
from llama.model.lora import adapt
from llama.parallel.adapters import ADAPTER, adapter_shapes, with_adapters
from llama.parallel.shards import Box, fill_parameters
from llama.targets import adapted
from tests.oracles import oracle

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
TOKENS = torch.arange(40).view(2, 20) * 7 % 90
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora_pattern": {"rslora": True, "targets": [r"model\.layers\.1\..*", "lm_head"]},
    "dora_head": {"dora": True, "targets": "all-linear,lm_head"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a Hugging Face directory in fp32; its vocabulary is padded inside herd."""
    transformers = oracle("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _recipe(base: Path, **lora: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": hf.model_config(base).model_dump(),
            "data": {"seq_length": 16},
            "train": {"steps": 3, "global_batch_size": 2, "precision": "fp32", "init_from": str(base)},
            "lora": {"rank": 4, "alpha": 6} | lora,
        }
    )


def _peft_model(base: Path, adapter: Path | None, recipe: Recipe | None = None) -> Any:
    peft, transformers = oracle("peft"), oracle("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, adapter).eval()
    assert recipe is not None
    config = adapter_config(recipe, str(base))
    lora = peft.LoraConfig(**{key: config[key] for key in config if key not in ("peft_type", "inference_mode")})
    return peft.get_peft_model(model, lora)


def _ours(recipe: Recipe, base: Path, adapter: Path) -> Llama:
    model = Llama(recipe.model)
    adapt(model, recipe.lora, torch.float32)
    read = with_adapters(
        recipe, hf.checkpoint_reader(base, recipe.model), torch.float32, hf.adapter_reader(adapter, recipe)
    )
    fill_parameters(model, read)
    return model.eval()


def _checkpoint(recipe: Recipe, folder: Path) -> Path:
    """A checkpoint of random adapters, none of them zero, rows of the padded vocabulary included."""
    generator, state = torch.Generator().manual_seed(3), {}
    for name, shape in adapter_shapes(recipe).items():
        rows = recipe.model.padded_vocab_size if name in ("head.lora_b", "head.magnitude") else shape[0]
        value = torch.randn(rows, *shape[1:], generator=generator) * 0.3
        state[f"model.{name}"] = value.abs() + 1 if name.endswith("magnitude") else value
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_an_exported_adapter_and_merges_it_alike(kind: str, base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, **KINDS[kind])
    hf.export_adapter(_checkpoint(recipe, tmp_path / "step"), recipe, tmp_path / "adapter")
    theirs = _peft_model(base, tmp_path / "adapter")
    with torch.no_grad():
        logits = _ours(recipe, base, tmp_path / "adapter")(TOKENS)
        torch.testing.assert_close(logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(TOKENS).logits - logits).abs().max() > 0.5

    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in saved.items()}
    assert all(torch.equal(written[key], saved[key]) for key in saved)

    read, adapter = hf.checkpoint_reader(base, recipe.model), hf.adapter_reader(tmp_path / "adapter", recipe)
    merge(recipe, read, adapter, tmp_path / "merged", "float32", None, False)
    merged, expected = load_file(tmp_path / "merged/model.safetensors"), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(merged[key], weight, rtol=1e-4, atol=1e-5, msg=key)
    found = compare(recipe, read, adapter, tmp_path / "merged", TOKENS.tolist())
    assert found.difference < 1e-3 and found.same == 1 and found.effect > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_read_back(kind: str, base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, **KINDS[kind])
    theirs = _peft_model(base, None, recipe)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    lora = adapter_lora(tmp_path)
    assert adapted(lora.targets, 2) == adapted(recipe.lora.targets, 2)
    assert (lora.rank, lora.alpha, lora.dora, lora.rslora) == (4, 6, recipe.lora.dora, recipe.lora.rslora)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        found = _ours(recipe.model_copy(update={"lora": lora}), base, tmp_path)(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keys_and_targets_are_pefts(base: Path) -> None:
    assert peft_key("layers.0.attention.q.lora_a") == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert peft_key("head.magnitude") == "base_model.model.lm_head.lora_magnitude_vector"
    config = adapter_config(_recipe(base, targets="v,lm_head,q"), "b")
    assert config["target_modules"] == ["q_proj", "v_proj", "lm_head"] and config["lora_alpha"] == 6
    pattern = adapter_config(_recipe(base, targets=[r".*layers\.0.*down_proj"]), "b")
    assert pattern["target_modules"] == ["model.layers.0.mlp.down_proj"]


def test_herd_merge_says_how_near_the_logits_are(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base)
    hf.export_adapter(_checkpoint(recipe, tmp_path / "step"), recipe, tmp_path / "adapter")
    arguments = [str(base), str(tmp_path / "adapter"), "--to", str(tmp_path / "merged"), "--dtype", "bfloat16"]
    done = CliRunner().invoke(herd_merge, arguments)
    assert done.exit_code == 0, done.output
    assert "in bfloat16" in done.output and "of next tokens the same" in done.output
    again = CliRunner().invoke(herd_merge, arguments)
    assert isinstance(again.exception, UserError) and "is not empty" in str(again.exception)


def test_what_bf16_rounds_away_of_an_adapter_is_told(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base)
    hf.export_adapter(_checkpoint(recipe, tmp_path / "step"), recipe, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k: v * 1e-3 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    for kind, told in (("bfloat16", True), ("float32", False)):
        arguments = [str(base), str(tmp_path / "adapter"), "--to", str(tmp_path / kind), "--dtype", kind]
        done = CliRunner().invoke(herd_merge, arguments)
        assert done.exit_code == 0 and ("rounds most of what this adapter changes away" in done.output) == told


def _break_config(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 8}, "set lora.rank=8"),
        ({"use_dora": True}, "set lora.dora=True"),
        ({"lora_alpha": 16}, "set lora.alpha=16"),
        ({"alpha_pattern": {"q_proj": 4}}, "herd does not know"),
        ({"bias": "all"}, "bias=all"),
        ({"peft_type": "IA3"}, "is no LoRA adapter"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(
    keys: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    recipe = _recipe(base)
    hf.export_adapter(_checkpoint(recipe, tmp_path / "step"), recipe, tmp_path / "adapter")
    _break_config(tmp_path / "adapter", **keys)
    with pytest.raises(UserError, match=message):
        hf.adapter_reader(tmp_path / "adapter", recipe)


def test_other_targets_and_damaged_files_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base)
    hf.export_adapter(_checkpoint(recipe, tmp_path / "step"), recipe, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"make lora.targets those of"):
        hf.adapter_reader(tmp_path / "adapter", _recipe(base, targets="q"))
    with pytest.raises(UserError, match=r"k_proj.lora_A.weight and 1 more missing"):
        hf.adapter_reader(tmp_path / "adapter", _recipe(base, targets="q,k,v"))
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        hf.adapter_reader(base, recipe)
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="fetch it again"):
        hf.adapter_reader(tmp_path / "adapter", recipe)


def test_a_diverged_adapter_is_not_exported(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base)
    state = {f"model.{n}": torch.full(s, torch.nan) for n, s in adapter_shapes(recipe).items()}
    dcp.save(state, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(UserError, match="NaN or infinity"):
        hf.export_adapter(tmp_path / "step", recipe, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_values_beside_the_adapter_come_from_the_base(base: Path) -> None:
    recipe = _recipe(base, dora=True)
    weights = hf.checkpoint_reader(base, recipe.model)
    read = with_adapters(recipe, weights, torch.float32)
    box: Box = (slice(3, 9), slice(0, 64))
    assert torch.equal(read("layers.0.mlp.up.weight", box), weights("layers.0.mlp.up.weight", box))
    lengths = read("layers.0.attention.q.magnitude", (slice(3, 9),))
    torch.testing.assert_close(lengths, weights("layers.0.attention.q.weight", box).norm(dim=1))
    assert set(ADAPTER) == {"lora_a", "lora_b", "magnitude"}
