"""Pivot and outlier tokens: what was planted is found where it stands, and nothing where there is none."""

import math
import statistics

import pytest
import torch
from families import FAMILIES, random_ids
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.pivots import Magnitudes, hidden_magnitudes, outlier_ratios, outlier_tokens
from intactkv.prefix import build_prefix

SINK = 7  # the token whose hidden state is made huge


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


def text_with(*positions: int) -> Tensor:
    """40 ordinary tokens, the sink at these positions and nowhere else."""
    ids = random_ids(40)
    ids[ids == SINK] = SINK + 1
    ids[list(positions)] = SINK
    return ids


def plant(model, value: float = 5000.0, channel: int = 11) -> None:
    """One channel of one embedding row dwarfs the rest, and the residual stream carries it through every block."""
    model.get_input_embeddings().weight[SINK, channel] = value


@torch.no_grad()
def states_of(model, ids: Tensor) -> list[Tensor]:
    """The residual stream, taken block by block from hooks on the blocks: embeddings, then every block's output."""
    decoder = getattr(model.base_model, "decoder", model.base_model)
    seen: list[Tensor] = []

    def first(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def output(_module, _args, result):
        seen.append(result[0] if isinstance(result, tuple) else result)

    handles = [decoder.layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(output) for block in decoder.layers]
    model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [state.reshape(ids.numel(), -1) for state in seen]


def test_magnitudes_are_those_of_the_residual_stream_the_last_before_the_final_norm(model):
    ids = text_with(0)
    magnitudes, states = hidden_magnitudes(model, ids), states_of(model, ids)
    assert magnitudes.largest.shape == (4, 40)
    assert magnitudes.median.shape == (4,)
    for row, median, state in zip(magnitudes.largest, magnitudes.median, states, strict=True):
        assert_close(row, state.abs().amax(dim=-1))
        assert_close(median, state.abs().flatten().median())
    # The norm would have hidden it: with it the last row has another size altogether.
    decoder = getattr(model.base_model, "decoder", model.base_model)
    norm = getattr(decoder, "norm", None) or decoder.final_layer_norm
    assert not torch.allclose(magnitudes.largest[-1], norm(states[-1]).abs().amax(dim=-1), rtol=0.1)


@pytest.mark.parametrize("positions", [(0,), (13,), (0, 13, 39)])
def test_a_planted_massive_activation_is_found_where_it_stands(model, positions):
    plant(model)
    magnitudes = hidden_magnitudes(model, text_with(*positions))
    assert magnitudes.pivots() == list(positions)
    assert (magnitudes.largest[-1, list(positions)] > 1000).all()


def test_a_text_without_the_planted_token_has_no_pivot(model):
    plant(model)
    assert hidden_magnitudes(model, text_with()).pivots() == []


def test_a_plain_model_has_no_pivots(model):
    assert hidden_magnitudes(model, text_with(0)).pivots() == []


def test_a_value_is_massive_only_above_100_and_above_1000_times_its_layers_median():
    largest = torch.tensor([[99.0, 101.0, 5.0], [1001.0, 999.0, 1.0]])
    assert Magnitudes(largest, torch.tensor([0.01, 1.0])).pivots() == [0, 1]
    assert Magnitudes(largest, torch.tensor([0.2, 1.0])).pivots() == [0]
    assert Magnitudes(largest, torch.tensor([0.2, 1.1])).pivots() == []
    assert Magnitudes(largest, torch.tensor([0.0, 0.0])).pivots() == [0, 1]


def test_looking_leaves_no_hook_behind_also_after_a_failure(tiny_model):
    model = tiny_model("llama")
    hidden_magnitudes(model, text_with(0))
    with pytest.raises(UserError, match="token ids 5000"):
        hidden_magnitudes(model, torch.tensor([1, 5000]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_behind_a_prefix_the_magnitudes_are_those_of_the_whole_text_from_there_on(model):
    plant(model)
    ids = text_with(0, 13)
    whole = hidden_magnitudes(model, ids)
    intact = attach(model, build_prefix(model, ids[:5]))
    behind = hidden_magnitudes(model, ids[5:], intact.new_cache(single_pass=True))
    assert_close(behind.largest, whole.largest[:, 5:], rtol=1e-4, atol=1e-4)  # the same sums in another order
    assert behind.pivots() == [8]
    assert whole.pivots() == [0, 13]


def planted(layers: int = 4, sequences: int = 3, tokens: int = 9) -> Tensor:
    """Ordinary maxima between 1 and 2, (L, N, T)."""
    return 1 + torch.rand(layers, sequences, tokens, generator=torch.Generator().manual_seed(3))


def test_ratios_are_to_the_median_over_the_tokens_of_a_layer_and_sequence():
    maxima = planted()
    ratios = outlier_ratios(maxima.half())
    assert ratios.dtype == torch.float32
    for row, found in zip(maxima.half().flatten(0, 1).tolist(), ratios.flatten(0, 1).tolist(), strict=True):
        assert found == pytest.approx([value / statistics.median_low(row) for value in row], rel=1e-6)


def test_ratios_stay_finite_where_the_median_is_zero_or_half_precision_would_overflow():
    row = torch.tensor([0.0, 0.0, 60000.0])
    assert outlier_ratios(row).isfinite().all()
    assert outlier_ratios(row.half())[2] > 64
    assert float(outlier_ratios(torch.tensor([0.001, 0.001, 60000.0]).half())[2]) > 65504
    assert outlier_ratios(torch.zeros(3)).tolist() == [0, 0, 0]


def test_planted_outlier_tokens_are_counted_by_id_and_position_0_apart():
    maxima, ids = planted(), torch.arange(27).reshape(3, 9) % 10
    for layer, sequence, token in ((0, 0, 0), (1, 0, 0), (1, 0, 4), (2, 1, 0), (2, 1, 3), (2, 2, 8), (2, 2, 6)):
        maxima[layer, sequence, token] = 1000.0
    found = outlier_tokens(maxima, ids, threshold=64.0)
    assert found.first == 3
    expected = [int(ids[0, 4]), int(ids[1, 3]), int(ids[2, 8]), int(ids[2, 6])]
    assert sum(found.ids.values()) == 4
    assert found.ids == {token: expected.count(token) for token in expected}
    assert list(found.ids) == sorted(found.ids, key=lambda token: (-found.ids[token], token))
    assert found.number == math.ceil(4 / 3)  # four in the third layer, over three sequences
    behind = outlier_tokens(maxima, ids, threshold=64.0, start=1)
    assert behind.first == 0
    assert sum(behind.ids.values()) == 7


def test_an_outlier_exceeds_the_threshold_and_a_plain_text_has_none():
    maxima, ids = torch.ones(1, 1, 5), torch.arange(5)[None]
    assert outlier_tokens(maxima, ids).number == 0
    maxima[0, 0, 2] = 64.0
    assert outlier_tokens(maxima, ids).ids == {}
    maxima[0, 0, 2] = 64.1
    assert outlier_tokens(maxima, ids).ids == {2: 1}
