"""Adapters compute what peft's do: logits, gradients, three AdamW steps; counts; dropout; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.config import Lora, Recipe
from llama.model.llama import Llama
from llama.model.lora import adapt, adapters, initial_a, set_dropout_key
from llama.parallel.adapters import adapters_in_words, with_adapters
from llama.parallel.shards import fill_parameters, trainable
from llama.targets import hf_module
from tests.oracles import oracle

MODEL: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, max_position=64,
    vocab_multiple=64,
)  # fmt: skip


def _recipe(**lora: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": MODEL,
            "data": {"seq_length": 16},
            "train": {"steps": 3, "global_batch_size": 2, "precision": "fp32"},
            "lora": {"rank": 4, "alpha": 10} | lora,
        }
    )


def adapted_pair(recipe: Recipe) -> tuple[Llama, Any]:
    """Our model with adapters and peft's with the same weights; B is made not zero, so that A has gradients too."""
    peft, transformers = oracle("peft"), oracle("transformers")
    torch.manual_seed(1)
    base = Llama(recipe.model)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    from llama.hf.weights import hf_name

    weights = {hf_name(name): p.detach()[: 96 if "norm" not in name and p.shape[0] == 128 and "mlp" not in name else None]
               for name, p in base.named_parameters()}  # fmt: skip
    theirs.load_state_dict(weights)
    values = dict(base.named_parameters())
    adapt(base, recipe.lora, torch.float32)
    fill_parameters(base, with_adapters(recipe, lambda name, box: values[name].detach()[box], torch.float32))
    lora = recipe.lora
    targets = [hf_module(name) for name, _ in adapters(base)]
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, use_dora=lora.dora, target_modules=targets
        ),
    )
    for name, module in adapters(base):
        torch.nn.init.normal_(module.lora_b.data[: 96 if name == "head" else None], std=0.2)
        place = theirs.base_model.model.get_submodule(hf_module(name))
        place.lora_A["default"].weight.data.copy_(module.lora_a)
        place.lora_B["default"].weight.data.copy_(module.lora_b[: place.lora_B["default"].weight.shape[0]])
        if module.magnitude is not None:
            ours, length = module.magnitude, place.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(ours[: len(length)].data, length.data)  # peft measures it before B changes
    return base, theirs


def _their(theirs: Any, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    place = theirs.base_model.model.get_submodule(hf_module(module))
    parts = {"lora_a": "lora_A", "lora_b": "lora_B", "magnitude": "lora_magnitude_vector"}
    weight: torch.Tensor = getattr(place, parts[leaf])["default"].weight
    return weight


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rslora": True, "targets": "all-linear"},
        {"dora": True, "targets": "q,down"},
        {"dora": True, "rslora": True, "targets": "all-linear,lm_head"},
        {"targets": r"lm_head,model\.layers\.1\..*(q|up)_proj"},
    ],
    ids=["lora_qv", "rslora_all", "dora", "dora_all_head", "pattern"],
)
def test_logits_gradients_and_three_steps_are_pefts(lora: dict[str, Any]) -> None:
    ours, theirs = adapted_pair(_recipe(**lora))
    trained = list(trainable(ours))
    assert {name.rpartition(".")[2] for name, _ in trained} <= {"lora_a", "lora_b", "magnitude"}
    assert sum(p.requires_grad for p in theirs.parameters()) == len(trained)
    groups = [[p for _, p in trained], [p for p in theirs.parameters() if p.requires_grad]]
    optimizers = [torch.optim.AdamW(group, lr=1e-2, eps=1e-4) for group in groups]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        tokens = torch.randint(0, 96, (2, 17), generator=generator)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        logits, expected = ours(inputs), theirs(inputs).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
        loss = ours(inputs, labels=labels).sum() / labels.numel()
        loss.backward()
        torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
        for name, parameter in trained:
            gradient = _their(theirs, name).grad
            assert parameter.grad is not None and gradient is not None
            torch.testing.assert_close(parameter.grad[: len(gradient)], gradient, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in trained:
        weight = _their(theirs, name)
        torch.testing.assert_close(parameter[: len(weight)], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["lora.rank=8"], "2,662,400"),
        (["lora.rank=16"], "5,324,800"),
        (["lora.rank=8", "lora.targets=q,k,v,o,gate,up,down,lm_head"], "12,994,560"),
        (["lora.rank=8", "lora.targets=all-linear"], "12,712,960"),
    ],
)
def test_openllama_trains_the_published_counts(overrides: list[str], count: str) -> None:
    recipe = recipes.load("openllama_3b_v2", overrides)
    assert adapters_in_words(recipe)[0].startswith(f"trainable params: {count} || all params: 3,4")
    with torch.device("meta"):
        model = Llama(recipe.model)
        adapt(model, recipe.lora, torch.float32)
    assert sum(p.numel() for _, p in trainable(model)) == int(count.replace(",", ""))


def test_a_starts_kaiming_uniform_by_seed_and_name() -> None:
    a = initial_a("layers.0.attention.q.lora_a", 1, 64, 400)
    assert torch.equal(a, initial_a("layers.0.attention.q.lora_a", 1, 64, 400))
    assert not torch.equal(a, initial_a("layers.1.attention.q.lora_a", 1, 64, 400))
    bound = 400**-0.5
    assert a.abs().max() <= bound and abs(float(a.std()) / (bound / 3**0.5) - 1) < 0.02


def test_dropout_is_a_function_of_seed_step_adapter_and_input() -> None:
    with torch.device("cpu"):
        model = Llama(_recipe().model)
    adapt(model, Lora(rank=4, dropout=0.25, targets=("all-linear",)), torch.float32)
    module = dict(adapters(model))["layers.0.attention.q"]
    x = torch.randn(4, 50, 64)

    def mask(seed: int, cursor: int) -> torch.Tensor:
        set_dropout_key(model, seed, cursor)
        return module.drop(x) == 0

    first = mask(1, 0)
    assert abs(float(first.float().mean()) - 0.25) < 0.02
    assert torch.equal(first, mask(1, 0))
    for other in (mask(2, 0), mask(1, 8)):
        both = float((first & other).float().mean())
        assert abs(both - 0.25**2) < 0.02  # independent of one another
    assert abs(float(first.float().mean(dim=(0, 1)).std())) < 0.06  # no column is favoured
    torch.testing.assert_close(module.drop(x)[~mask(1, 8)], x[~mask(1, 8)] / 0.75)
    model.eval()
    assert module.drop(x) is x


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": {"rank": 0, "quantize": "nf4"}}, "set lora.rank"),
        ({"lora": {"targets": "qq"}}, "names no linear"),
        ({"lora": {"targets": ["q("]}}, "no regular expression"),
        ({"lora": {"targets": "lm_head"}, "model": {"tie_embeddings": True}}, "leave it out"),
        ({"lora": {"targets": r"model\.layers\.1\..*"}, "parallel": {"pipeline_parallel": 2}}, "layer 0 without"),
        ({"lora": {"quantize": "int8"}, "train": {"compile": True}}, "set train.compile=false"),
        ({"lora": {"quantize": "nf4"}, "model": {"intermediate_size": 96}}, "mlp.down do not divide; use lora.quantize=int8"),
        ({"lora": {"quantize": "nf4"}, "parallel": {"tensor_parallel": 2}}, "attention.o do not divide over 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_remedy(keys: dict[str, Any], message: str) -> None:
    whole = _recipe().model_dump(mode="json")
    with pytest.raises(UserError, match=message):
        recipes.build(recipes.merge(whole, keys), "recipe")
