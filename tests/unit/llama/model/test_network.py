"""The network: documents apart, rotary embedding, generation with a cache, counts of parameters and FLOPs."""

from __future__ import annotations

import math

import pytest
import torch

from llama.config import Model, RopeScaling
from llama.model.generate import generate
from llama.model.llama import Llama, count_parameters, flops_per_token
from llama.model.rope import inverse_frequencies, rotate, rotation
from tests.dist.layouts import VOCAB, recipe, reference_model

LLAMA3_8B = Model(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    max_position=8192, rope_theta=500000.0,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Llama:
    return reference_model(recipe(), torch.float64).eval()


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def test_packed_documents_come_out_as_each_alone(model: Llama) -> None:
    tokens, lengths = _tokens(1, 31), (5, 1, 14, 11)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None].int()
    packed = model(tokens, positions, documents)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-6)  # the rotation's angles are fp32
    assert not torch.allclose(packed, model(tokens), atol=1e-2)  # without the mask they do see each other


def test_a_document_number_that_comes_back_in_another_row_is_another_document(model: Llama) -> None:
    tokens = _tokens(2, 12)
    documents = torch.tensor([[0] * 6 + [1] * 6, [0] * 12]).int()
    both = model(tokens, None, documents)
    assert torch.allclose(both[1:], model(tokens[1:]), atol=1e-9)


def test_nothing_of_the_future_is_seen(model: Llama) -> None:
    tokens = _tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % VOCAB
    assert torch.equal(model(tokens)[:, :12], model(changed)[:, :12])


def test_padding_of_the_vocabulary_is_not_among_the_logits(model: Llama) -> None:
    assert model.config.padded_vocab_size > VOCAB
    assert model(_tokens(1, 3)).shape == (1, 3, VOCAB)


def test_greedy_generation_with_a_cache_is_what_whole_forwards_pick(model: Llama) -> None:
    prompt = _tokens(7).tolist()
    found = list(generate(model, prompt, 12))
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert found == expected[7:]


def test_sampling_is_a_function_of_the_seed(model: Llama) -> None:
    def sample(seed: int, **options: float) -> list[int]:
        return list(generate(model, [1, 2, 3], 16, temperature=1.0, seed=seed, **options))  # type: ignore[arg-type]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_p=1e-9) == list(generate(model, [1, 2, 3], 16))  # only the likeliest id is left


def test_generation_ends_at_a_stop_id_and_at_the_models_last_position(model: Llama) -> None:
    free = list(generate(model, [1, 2, 3], 10))
    assert list(generate(model, [1, 2, 3], 10, stop=[free[4]])) == free[: free.index(free[4])]
    assert len(list(generate(model, [1] * 60, 99))) == 64 - 60


def test_scores_depend_on_how_far_apart_positions_are_alone() -> None:
    frequencies = inverse_frequencies(64, 10000.0, None, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=generator).unbind(0)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, *rotation(torch.tensor([[p]]), frequencies)) for x, p in ((q, at_q), (k, at_k))
        ]  # fmt: skip
        return float((turned[0] * turned[1]).sum())

    assert score(17, 4) == pytest.approx(score(1013, 1000), abs=1e-3)
    assert score(17, 4) != pytest.approx(score(17, 5), abs=1e-2)
    turned = rotate(q, *rotation(torch.tensor([[123]]), frequencies))
    assert turned.norm().item() == pytest.approx(q.norm().item(), rel=1e-6)
    assert torch.equal(rotate(q, *rotation(torch.tensor([[0]]), frequencies)), q)


def test_element_i_turns_with_element_i_plus_half_in_the_stated_type() -> None:
    frequencies = inverse_frequencies(4, 10000.0, None, CPU)
    assert frequencies.tolist() == pytest.approx([1.0, 0.01])
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    out = rotate(x, *rotation(torch.tensor([[2]]), frequencies)).flatten().tolist()
    assert out == pytest.approx([math.cos(2), -math.sin(0.02), math.sin(2), math.cos(0.02)])
    assert rotate(x.bfloat16(), *rotation(torch.tensor([[2]]), frequencies)).dtype == torch.bfloat16


def test_llama_3_1_scaling_keeps_29_blends_6_and_divides_29_frequencies() -> None:
    plain = inverse_frequencies(128, 500000.0, None, CPU)
    ratio = inverse_frequencies(128, 500000.0, RopeScaling(), CPU) / plain
    kept, divided = (ratio == 1).sum().item(), torch.isclose(ratio, torch.tensor(1 / 8)).sum().item()
    assert (kept, 64 - kept - divided, divided) == (29, 6, 29)
    assert (ratio.diff() <= 1e-6).all()


def test_flops_of_llama_3_8b_at_8192_are_the_published_ones() -> None:
    assert flops_per_token(LLAMA3_8B, 8192, causal=False) / 1e9 == pytest.approx(57.9, abs=0.05)
    assert flops_per_token(LLAMA3_8B, 8192, causal=True) / 1e9 == pytest.approx(51.5, abs=0.05)


def test_parameters_of_llama_3_8b_are_counted_as_the_model_has_them() -> None:
    assert count_parameters(LLAMA3_8B)[0] == 8_030_261_248
    for tied in (False, True):
        config = recipe(model__tie_embeddings=tied, model__vocab_multiple=1).model
        assert count_parameters(config)[0] == sum(p.numel() for p in Llama(config).parameters())
