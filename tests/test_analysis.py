"""Statistics per layer: what the figures mean, against slow formulas in float64 and other libraries."""

import copy
import math

import pytest
import torch
from common import Rounds
from families import FAMILIES, plain_cache, plain_logits, random_ids
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close

from corpora.errors import UserError
from eval.inside.analysis import first_token_share, position_share
from eval.inside.distances import COLUMNS, layerwise_distance, linear_statistics
from eval.inside.kv_report import kv_report
from eval.inside.pairs import Pair
from eval.inside.pivot_report import pivot_report
from eval.inside.statistics import sqnr
from eval.perplexity import Windows
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.observe import eager_attention
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import KIVI, PerHead

SINK = 7  # the token whose hidden state is made huge where a test wants a pivot
LENGTH = 40


def windows(count: int = 2, lead: tuple[int, ...] = (1,)) -> Windows:
    """`count` texts of ordinary tokens behind some leading ones; the sink is not among them."""
    fed = random_ids(count * LENGTH).view(count, LENGTH)
    fed[fed == SINK] = SINK + 1
    return Windows(torch.tensor(lead), fed, False)


def pair_of(full, quantized, prefix: tuple[int, ...] = (), kv=None) -> Pair:
    """A quantized model beside its twin, behind an intact prefix if one is given."""
    if not prefix:
        return Pair("vanilla", attach(quantized, None, kv), attach(full, None))
    written = build_prefix(full, prefix)
    return Pair("intact", attach(quantized, written, kv), attach(full, written))


def quantized(model, bits: int, blocks: range | None = None):
    """A copy whose blocks' linears (of these blocks) are rounded to a grid per row."""
    changed = copy.deepcopy(model)
    for index, block in enumerate(architecture_of(model.config).blocks_of(changed)):
        for module in block.modules():
            if isinstance(module, nn.Linear) and (blocks is None or index in blocks):
                module.weight.data = fake_quantize(module.weight.data, UniformGrid(bits))
    return changed


@pytest.fixture(params=["llama", "qwen2", "qwen3", "opt", "mistral-sliding"])
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


# ---- errors of linears, over depth


@pytest.mark.parametrize("prefix", [(), (1, 5)])
def test_an_unquantized_model_is_at_no_distance_from_its_twin(model, prefix):
    pair = pair_of(model, copy.deepcopy(model), prefix)
    text = windows(lead=prefix or (1,))
    for row in linear_statistics(pair, text):
        assert row["sqnr_w"] == row["sqnr_o"] == math.inf
    rows, logits = layerwise_distance(pair, text)
    assert {row["sqnr"] for row in rows} == {row["median_token_sqnr"] for row in rows} == {math.inf}
    assert {row["mse"] for row in rows} == {0.0}
    assert logits == {"kl": 0.0, "top1_agreement": 1.0, "max_logit_change": 0.0}


def test_every_linear_has_the_sixteen_columns_in_model_order(model):
    rows = linear_statistics(pair_of(model, quantized(model, 4)), windows())
    names = [name for names in architecture_of(model.config).linears for name in names]
    assert [(row["block"], row["linear"]) for row in rows] == [(block, name) for block in range(3) for name in names]
    assert len(COLUMNS) == 16
    for row in rows:
        assert list(row) == ["block", "linear", *COLUMNS]
        assert row["sqnr_x"] == math.inf
        assert row["mse_x"] == 0
        assert 10 < row["sqnr_w"] < 40
        assert 10 < row["sqnr_o"] < 60


def test_own_error_is_that_of_the_twins_linear_for_the_same_input(tiny_model):
    full = tiny_model("qwen2")  # has biases
    changed = quantized(full, 3)
    changed.model.layers[1].self_attn.k_proj.bias += 0.5
    text = windows(1)
    row = next(row for row in linear_statistics(pair_of(full, changed), text)
               if (row["block"], row["linear"]) == (1, "self_attn.k_proj"))  # fmt: skip
    seen: list[Tensor] = []
    linear, twin = changed.model.layers[1].self_attn.k_proj, full.model.layers[1].self_attn.k_proj
    handle = linear.register_forward_hook(lambda _module, args, output: seen.extend((args[0], output)))
    plain_logits(changed, torch.cat([text.lead, text.fed[0]]))
    handle.remove()
    x, output = (tensor.double() for tensor in seen)
    expected = x @ twin.weight.double().T + twin.bias.double()
    noise = (expected - output).square()
    # float32 products against float64 ones: a millionth of an error of some per cent.
    assert row["mse_o"] == pytest.approx(float(noise.mean()), rel=1e-4)
    assert row["sqnr_o"] == pytest.approx(float(10 * (expected.square().sum() / noise.sum()).log10()), abs=1e-3)
    weight = twin.weight.double()
    noise = (weight - linear.weight.double()).square()
    assert row["sqnr_w"] == pytest.approx(float(10 * (weight.square().sum() / noise.sum()).log10()))
    assert {"max": row["max_x"], "min": row["min_x"]} == {"max": float(x.max()), "min": float(x.min())}
    assert row["kurt_w"] == pytest.approx(stats.kurtosis(weight.numpy(), axis=None))


def test_a_changed_bias_is_part_of_the_own_error(tiny_model):
    full = tiny_model("opt")
    changed = copy.deepcopy(full)
    changed.model.decoder.layers[0].fc1.bias += 0.1
    rows = {(row["block"], row["linear"]): row for row in linear_statistics(pair_of(full, changed), windows())}
    assert rows[0, "fc1"]["mse_o"] == pytest.approx(0.01, rel=1e-4)
    assert rows[0, "fc1"]["sqnr_w"] == math.inf
    assert rows[0, "fc2"]["sqnr_o"] == math.inf


def test_statistics_are_means_over_the_windows(llama):
    pair, both = pair_of(llama, quantized(llama, 3)), windows(2)
    single = [linear_statistics(pair, Windows(both.lead, both.fed[i : i + 1], False)) for i in range(2)]
    for row, first, second in zip(linear_statistics(pair, both), *single, strict=True):
        for key in COLUMNS[2:]:
            assert row[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-9)


def test_distances_of_several_windows_are_pooled(llama):
    pair, both = pair_of(llama, quantized(llama, 3), (1,)), windows(2)
    (one, first), (two, second) = (
        layerwise_distance(pair, Windows(both.lead, both.fed[i : i + 1], False)) for i in range(2)
    )
    rows, logits = layerwise_distance(pair, both)
    for row, a, b in zip(rows, one, two, strict=True):
        assert row["mse"] == pytest.approx((a["mse"] + b["mse"]) / 2)
        assert min(a["sqnr"], b["sqnr"]) <= row["sqnr"] <= max(a["sqnr"], b["sqnr"])
    assert logits["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2)
    assert logits["max_logit_change"] == max(first["max_logit_change"], second["max_logit_change"])


def test_fewer_bits_are_further_from_full_precision(model):
    means, kl = [], []
    for bits in (8, 4, 3, 2):
        rows, logits = layerwise_distance(pair_of(model, quantized(model, bits)), windows())
        finite = [row["sqnr"] for row in rows if math.isfinite(row["sqnr"])]
        means.append(sum(finite) / len(finite))
        kl.append(logits["kl"])
    assert means == sorted(means, reverse=True)
    assert kl == sorted(kl)
    assert kl[0] > 0


@pytest.mark.parametrize("prefix", [(), (1,)])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_one_quantized_block_errs_by_itself_and_all_behind_it_accumulate(model, block, prefix):
    pair = pair_of(model, quantized(model, 4, range(block, block + 1)), prefix)
    rows, _ = layerwise_distance(pair, windows())
    reads_block_input = architecture_of(model.config).linears[0]
    for row in rows:
        exact = row["sqnr"] == math.inf
        if row["curve"] == "own":
            assert exact == (row["block"] != block)
        elif row["curve"] == "output":
            assert exact == (row["block"] < block)
        else:
            first = row["block"] == block and row["linear"] in reads_block_input
            assert exact == (row["block"] < block or first)


def test_the_input_curve_is_the_distance_of_two_separate_runs(llama):
    changed, text = quantized(llama, 3), windows(1)
    rows, logits = layerwise_distance(pair_of(llama, changed), text)
    ids = torch.cat([text.lead, text.fed[0]])
    seen: list[Tensor] = []
    for model in (llama, changed):
        handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        plain_logits(model, ids)
        handle.remove()
    exact, actual = (x[0, 1:].double() for x in seen)  # the leading token does not count
    expected = 10 * (exact.square().sum() / (exact - actual).square().sum()).log10()
    (row,) = [r for r in rows if (r["curve"], r["block"], r["linear"]) == ("input", 2, "mlp.down_proj")]
    assert row["sqnr"] == pytest.approx(float(expected), abs=1e-3)
    full, quant = (plain_logits(model, ids)[1:].double() for model in (llama, changed))
    kl = (full.softmax(-1) * (full.log_softmax(-1) - quant.log_softmax(-1))).sum(-1).mean()
    assert logits["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert logits["top1_agreement"] == pytest.approx(float((full.argmax(-1) == quant.argmax(-1)).double().mean()))
    assert logits["max_logit_change"] == pytest.approx(float((full - quant).abs().max()), rel=1e-4)


def hooks_of(*models) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def test_no_hook_is_left_behind_also_after_a_failure(llama):
    changed = quantized(llama, 4)
    pair = pair_of(llama, changed)
    kv_report(pair, windows())  # transformers leaves its own where hidden states were asked for
    before = hooks_of(llama, changed)
    wrong = Windows(torch.tensor([1]), torch.tensor([[5, 5000]]), False)
    for report in (layerwise_distance, linear_statistics, kv_report):
        report(pair, windows())
        with pytest.raises(UserError, match="token ids 5000"):
            report(pair, wrong)
    with pytest.raises(UserError, match="token ids 5000"):
        pivot_report(llama, wrong.fed)
    assert hooks_of(llama, changed) == before


# ---- keys, values and pivots


def plant(model, value: float = 5000.0) -> None:
    """Make SINK a pivot token: one channel of its embedding dwarfs the rest in every layer."""
    model.get_input_embeddings().weight[SINK, 11] = value


@pytest.mark.parametrize("bits", [4, None])
def test_behind_an_intact_prefix_the_pivots_keys_and_values_are_exact(model, bits):
    plant(model)
    changed = quantized(model, 4)
    kv = None if bits is None else PerHead(bits)
    text = windows(lead=(SINK,))
    vanilla, _ = kv_report(pair_of(model, changed, kv=kv), text)
    intact, logits = kv_report(pair_of(model, changed, (SINK,), kv), text)
    assert {row["group"] for row in vanilla} == {row["group"] for row in intact} == {"pivots", "rest"}
    for row in vanilla:
        assert math.isfinite(row["k_sqnr"])
        assert math.isfinite(row["v_sqnr"])
        assert math.isfinite(row["attention_sqnr"])
        assert row["quantized_fraction"] == (0 if bits is None else 1)
        assert row["bits_per_element"] == (16 if bits is None else bits + 4)  # two 32-bit numbers for 16 values
    for row in intact:
        assert math.isfinite(row["k_sqnr"]) == math.isfinite(row["v_sqnr"]) == (row["group"] == "rest")
        if row["group"] == "pivots":
            assert row["k_sqnr"] == row["v_sqnr"] == math.inf
            assert math.isnan(row["attention_sqnr"])
            assert (row["tokens"], row["quantized_fraction"], row["bits_per_element"]) == (2, 0, 16)
    assert math.isnan(logits["pivots"]["kl"])
    assert logits["rest"]["kl"] > 0


def test_without_any_quantizer_the_cache_is_exact(model):
    rows, logits = kv_report(pair_of(model, copy.deepcopy(model), (1, 5)), windows(lead=(1, 5)))
    assert {row["group"] for row in rows} == {"prefix", "rest"}
    assert {row["k_sqnr"] for row in rows} == {row["v_sqnr"] for row in rows} == {math.inf}
    assert {row["attention_sqnr"] for row in rows if row["group"] == "rest"} == {math.inf}
    assert logits["rest"] == {"kl": 0.0, "top1_agreement": 1.0, "max_logit_change": 0.0}


def test_the_first_layers_keys_err_by_the_policy_alone(model):
    """No attention stands in front of them, so they are the plain cache's, rounded."""
    text = windows(1)
    rows, _ = kv_report(pair_of(model, copy.deepcopy(model), kv=PerHead(3)), text)
    cache = plain_cache(model, torch.cat([text.lead, text.fed[0]])[None])
    for what, states in (("k", cache.layers[0].keys[..., 1:, :]), ("v", cache.layers[0].values[..., 1:, :])):
        expected = sqnr(states, Rounds(PerHead(3)).keys(states))
        (row,) = [row for row in rows if (row["block"], row["group"]) == (0, "rest")]
        assert row[f"{what}_sqnr"] == pytest.approx(expected, abs=0.05)  # another shape rounds a few codes otherwise


def test_a_sliding_window_that_drops_old_tokens_is_compared_on_what_it_holds(tiny_model):
    model = tiny_model("mistral", sliding_window=16)
    rows, _ = kv_report(pair_of(model, copy.deepcopy(model), kv=PerHead(4)), windows())
    assert all(10 < row["k_sqnr"] < 40 for row in rows if row["group"] == "rest")


def test_fewer_bits_of_the_cache_err_more(llama):
    means = []
    for bits in (8, 4, 3, 2):
        rows, _ = kv_report(pair_of(llama, copy.deepcopy(llama), kv=PerHead(bits)), windows())
        means.append([sum(row[key] for row in rows) for key in ("k_sqnr", "v_sqnr", "attention_sqnr")])
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("places", [(0,), (13,), (0, 13, 20)])
def test_the_pivot_report_finds_what_was_planted_and_measures_what_it_takes(model, places):
    plant(model)
    text = random_ids(LENGTH)
    text[text == SINK] = SINK + 1
    text[list(places)] = SINK
    pivots, layers = pivot_report(model, text[None])
    assert [row["position"] for row in pivots] == list(places)
    others = [p for p in range(LENGTH) if p not in places]
    for row in pivots:
        assert (row["window"], row["token"]) == (0, SINK)
        assert 11 in row["channels"]
        assert {1, 2, 3} <= set(row["layers"])
        assert abs(row["largest"]) > 1000
        assert row["ratio"] > 1000

    with eager_attention(model), torch.no_grad():
        weights = torch.stack(model(input_ids=text[None], output_attentions=True).attentions)[:, 0].mean(1)
    behind = [q for q in others if q > places[0]]
    own = [float(torch.stack([weights[:, q, p] for q in range(p + 1, LENGTH)]).mean()) for p in places]
    assert [row["attention_mass"] for row in pivots] == pytest.approx(own, rel=1e-4)
    cache, shares = plain_cache(model, text[None]), position_share(model, text[None], [list(places)])
    for row, weight, held in zip(layers, weights, cache.layers, strict=True):
        mass = torch.stack([weight[q, [p for p in places if p < q]].sum() for q in behind]).mean()
        assert row["attention_mass"] == pytest.approx(float(mass), rel=1e-4)
        for what, states in (("k", held.keys), ("v", held.values)):
            lengths = states[0].double().norm(dim=-1)
            assert row[f"{what}_pivots"] == pytest.approx(float(lengths[:, list(places)].mean()), rel=1e-4)
            assert row[f"{what}_rest"] == pytest.approx(float(lengths[:, others].mean()), rel=1e-4)
        for name, share in shares.items():
            assert row[f"hessian_share_{name}"] == float(share[row["block"]])


def test_without_pivots_the_report_is_empty_and_attention_is_as_it_was(llama):
    before = llama.config._attn_implementation
    pivots, layers = pivot_report(llama, windows(2).fed)
    assert pivots == []
    assert [math.isnan(row["attention_mass"]) for row in layers] == [True] * 3
    assert {row["hessian_share_mlp.down_proj"] for row in layers} == {0.0}
    with pytest.raises(IndexError), eager_attention(llama):
        plain_logits(llama, torch.tensor([5000]))
    assert llama.config._attn_implementation == before


def test_shares_of_the_trace_are_those_of_the_squared_inputs(model):
    ids, places = windows(2).fed, [[0, 3], [5]]
    shares = position_share(model, ids, places)
    architecture = architecture_of(model.config)
    seen: list[Tensor] = []
    name = architecture.linears[-1][0]
    module = architecture.blocks_of(model)[1].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(LENGTH, -1).double()))
    for row in ids:
        plain_logits(model, row)
    handle.remove()
    owned = sum(x[p].square().sum() for x, p in zip(seen, places, strict=True))
    assert float(shares[name][1]) == pytest.approx(float(owned / sum(x.square().sum() for x in seen)), rel=1e-5)
    everything = position_share(model, ids, [list(range(LENGTH))] * 2)
    assert_close(everything[name], torch.ones(3))
    first = first_token_share(model, ids)
    assert list(first) == [names[0] for names in architecture.linears]
    assert_close(first[name], position_share(model, ids, [[0], [0]])[name])


def test_tokens_that_a_policy_keeps_exact_are_a_group_of_their_own(tiny_model):
    model = tiny_model("llama")
    text = windows(1)
    length = text.fed.shape[1] + len(text.lead)
    rows, _ = kv_report(pair_of(model, copy.deepcopy(model), kv=KIVI(2, group_size=8, residual=8)), text)
    first = {row["group"]: row for row in rows if row["block"] == 0}
    assert first["rest"]["quantized_fraction"] == 1
    assert first["rest"]["bits_per_element"] == pytest.approx(2 + 32 / 8, rel=1e-9)
    assert first["tail"]["tokens"] == length - min(length // 8 * 8, length - 8)
    assert math.isfinite(first["rest"]["k_sqnr"])
    assert first["tail"]["v_sqnr"] == math.inf  # the values of the newest eight tokens
