"""What figures draw: the numbers are those of plain formulas, whatever the batch size, model family and prefix."""

import csv
from argparse import ArgumentParser
from collections import Counter

import pytest
import torch
from families import FAMILIES, random_ids
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from eval.plots.canvas import Output, output_for, plt
from eval.plots.kv_smoothness import smoothness
from eval.plots.linear_ranges import token_ranges
from eval.plots.outliers import Detector, shares
from eval.plots.subject import Arm, Subject
from eval.plots.surfaces import surface_of
from eval.programs import plot
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.observe import (
    BLOCK_OUTPUT,
    attention_mass,
    down_input,
    head_input,
    input_sites,
    observe,
    output_sites,
    token_maxima,
)
from intactkv.pivots import outlier_ratios
from intactkv.prefix import build_prefix

SINK, CHANNEL = 7, 11


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


def texts(rows: int = 3, tokens: int = 20) -> Tensor:
    return torch.stack([random_ids(tokens, seed) for seed in range(rows)])


def seen(model, ids: Tensor, sites, **options) -> dict[tuple[str, int], Tensor]:
    """Every tensor that `observe` shows, whole: (N, T, C) by site and layer."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    observe(
        model, ids, sites, lambda site, layer, _row, x: parts.setdefault((site.name, layer), []).append(x), **options
    )
    return {place: torch.cat(tensors) for place, tensors in parts.items()}


def plain_heads(x: Tensor, heads: int) -> Tensor:
    """(T, C) to (heads, T, D) float64."""
    return x.double().reshape(len(x), heads, -1).transpose(0, 1)


def test_queries_and_keys_are_those_that_attention_multiplies(model):
    """softmax(q kᵀ / √d) by hand in float64 gives the attention that the model's own eager attention reports."""
    config, ids = model.config, texts(2)
    intact, layers = attach(model, None), range(config.num_hidden_layers)
    qkv = seen(intact, ids, output_sites(architecture_of(config), pre_rope=False))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    for layer, mass in attention_mass(intact, ids, layers, batch_size=1).items():
        expected = torch.zeros(20, 20, dtype=torch.float64)
        for row in range(2):
            query = plain_heads(qkv["query", layer][row], heads)
            key = plain_heads(qkv["key", layer][row], kv_heads).repeat_interleave(heads // kv_heads, dim=0)
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            future = torch.ones(20, 20, dtype=torch.bool).triu(1)
            expected += scores.masked_fill(future, -torch.inf).softmax(-1).sum(0) / 2
        assert_close(mass.double(), expected, rtol=1e-3, atol=1e-4)


def test_keys_and_values_are_those_of_the_cache(model):
    ids = texts(1)
    intact = attach(model, None)
    qkv = seen(intact, ids, output_sites(architecture_of(model.config), pre_rope=False))
    cache = intact.new_cache()
    intact.feed(ids, cache=cache)
    for layer, kept in enumerate(cache.intact_layers):
        for name, x in zip(("key", "value"), kept.held, strict=True):
            assert_close(qkv[name, layer][0], x[0].transpose(0, 1).reshape(20, -1)[-20:], rtol=1e-4, atol=1e-4)


def test_before_rope_only_queries_and_keys_differ_and_keep_their_norms(tiny_model):
    model, ids = tiny_model("qwen3"), texts(1)
    architecture = architecture_of(model.config)
    before = seen(attach(model, None), ids, output_sites(architecture, pre_rope=True))
    after = seen(attach(model, None), ids, output_sites(architecture, pre_rope=False))
    for place in after:
        assert_close(before[place].norm(dim=-1), after[place].norm(dim=-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(before[place], after[place]) == (place[0] == "value")


def test_inputs_are_what_the_linears_multiply(model):
    architecture, ids = architecture_of(model.config), texts(2)
    intact = attach(model, None)
    inputs = seen(intact, ids, input_sites(architecture))
    outputs = seen(intact, ids, output_sites(architecture, pre_rope=True))
    for layer, block in enumerate(architecture.blocks_of(model)):
        value = block.get_submodule(architecture.linears[0][-1])
        assert_close(value(inputs["q_proj", layer]), outputs["value", layer], rtol=1e-4, atol=1e-4)
    head = model.get_submodule(architecture.head)
    logits = model(input_ids=ids[:1], use_cache=False).logits[0]
    assert_close(head(head_input(intact, ids[0])), logits, rtol=1e-4, atol=1e-4)


def test_token_maxima_do_not_depend_on_the_batch_size(model):
    architecture, ids = architecture_of(model.config), texts(5)
    sites = (BLOCK_OUTPUT, *input_sites(architecture), *output_sites(architecture, pre_rope=False))
    intact = attach(model, None)
    one, two, all_at_once = (token_maxima(intact, ids, sites, batch_size=size) for size in (1, 2, 5))
    for name, maxima in one.items():
        assert maxima.shape == (3, 5, 20)
        assert_close(maxima, two[name], rtol=1e-4, atol=1e-4)
        assert_close(maxima, all_at_once[name], rtol=1e-4, atol=1e-4)
    whole = seen(intact, ids, (BLOCK_OUTPUT,), batch_size=2)
    for layer in range(3):
        assert_close(one["block"][layer], whole["block", layer].abs().amax(-1), rtol=1e-4, atol=1e-4)


def test_behind_an_intact_prefix_nothing_changes_but_that_its_tokens_are_gone(model):
    architecture, ids = architecture_of(model.config), texts(2)
    ids[:, :4] = ids[0, :4]
    behind = attach(model, build_prefix(model, ids[0, :4]))
    sites = (BLOCK_OUTPUT, *output_sites(architecture, pre_rope=False))
    whole, rest = token_maxima(attach(model, None), ids, sites), token_maxima(behind, ids[:, 4:], sites)
    for name, maxima in whole.items():
        assert_close(rest[name], maxima[..., 4:], rtol=1e-3, atol=1e-3)
    mass = attention_mass(attach(model, None), ids, [1])[1]
    assert_close(attention_mass(behind, ids[:, 4:], [1])[1], mass[4:], rtol=1e-3, atol=1e-4)


def test_attention_sums_to_the_heads_in_every_row_and_is_nowhere_in_the_future(model):
    intact = attach(model, None)
    before = model.config._attn_implementation
    for layer, mass in attention_mass(intact, texts(3), [0, 2], batch_size=2).items():
        assert layer in (0, 2)
        assert_close(mass.sum(-1), torch.full((20,), float(model.config.num_attention_heads)))
        assert (mass >= 0).all()
        assert (mass.triu(1) == 0).all()
    assert model.config._attn_implementation == before


def test_looking_leaves_no_hook_and_no_setting_behind_also_after_a_failure(tiny_model):
    model = tiny_model("llama")
    intact = attach(model, None)
    before = model.config._attn_implementation
    wrong = torch.tensor([[1, 5000]])
    sites = (BLOCK_OUTPUT, *output_sites(architecture_of(model.config), pre_rope=False))
    with pytest.raises(UserError, match="token ids 5000"):
        token_maxima(intact, wrong, sites)
    with pytest.raises(UserError, match="token ids 5000"):
        attention_mass(intact, wrong, [0])
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def planted(tiny_model):
    """A LLaMA whose first block answers to token SINK, and to no other, with a huge input of down_proj."""
    model = tiny_model("llama")
    block = model.model.layers[0]
    embeddings = model.get_input_embeddings().weight
    embeddings[:, CHANNEL] = 0
    embeddings[SINK, CHANNEL] = 5000.0
    block.self_attn.o_proj.weight[CHANNEL] = 0  # attention leaves the channel to the token itself
    block.post_attention_layernorm.weight[CHANNEL] = 1
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight[5] = 0
        linear.weight[5, CHANNEL] = 10.0
    return model


def text_with(*positions: int) -> Tensor:
    ids = random_ids(40)
    ids[ids == SINK] = SINK + 1
    ids[list(positions)] = SINK
    return ids


def test_planted_outliers_are_found_where_they_stand_and_in_the_layer_where_they_are(tiny_model):
    model = planted(tiny_model)
    ids = torch.stack([text_with(0), text_with(13, 39), text_with()])
    site = down_input(architecture_of(model.config))
    outlier = outlier_ratios(token_maxima(attach(model, None), ids, (site,))[site.name]) > 64
    assert outlier.nonzero().tolist() == [[0, 0, 0], [0, 1, 13], [0, 1, 39]]
    assert outlier.sum(-1).double().mean(-1).tolist() == [1.0, 0.0, 0.0]


def test_a_prefix_that_holds_the_planted_outlier_takes_it_out_of_the_figure(tiny_model, tiny_tokenizer):
    model = planted(tiny_model)
    architecture, ids = architecture_of(model.config), text_with(0, 13)
    behind = attach(model, build_prefix(model, ids[:1]))
    subject = Subject("", tiny_tokenizer(), architecture, ())
    for tensor in ("down_proj", "hidden_state"):
        detector = Detector(tensor, 64.0)
        arms = Arm("none", "", attach(model, None), ids[None], 0, None), Arm("[B]", "", behind, ids[None, 1:], 1, None)
        maxima = [detector.maxima(subject, arm, lambda rows: None) for arm in arms]
        found = [(outlier_ratios(m)[0] > 64).nonzero()[:, 1].tolist() for m in maxima]
        assert found == [[0, 13], [12]]


def test_ranges_are_order_statistics_over_tokens_and_means_over_sequences():
    maxima = torch.rand(3, 4, 11, generator=torch.Generator().manual_seed(0))
    found = token_ranges(maxima)
    for layer in range(3):
        ordered = [sorted(row) for row in maxima[layer].tolist()]
        for name, place in {"Top-1": 10, "Top-2": 9, "Top-3": 8, "Median": 5, "Min-1": 0, "Min-2": 1, "Min-3": 2,
                            "Max": 10}.items():  # fmt: skip
            assert float(found[name][layer]) == pytest.approx(sum(row[place] for row in ordered) / 4, rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 8), (9, 20), (8, 17)])
def test_a_surface_keeps_the_largest_value_of_every_block_of_cells(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    surface = surface_of(x, most=8)
    r, c = surface.token_step, surface.channel_step
    assert max(surface.heights.shape) <= 8
    for i, line in enumerate(surface.heights.tolist()):
        for j, height in enumerate(line):
            assert height == max(abs(v) for row in x[i * r : (i + 1) * r].tolist() for v in row[j * c : (j + 1) * c])
    assert float(x[surface.peak].abs()) == float(surface.heights.max()) == float(x.abs().max())


def test_shares_are_per_cent_of_all_with_the_rare_ones_together():
    counts = Counter({"a": 5, "b": 2, "c": 2, "d": 1})
    assert shares(counts, 2) == [("a", 5, 50.0), ("b", 2, 20.0), ("others", 3, 30.0)]
    assert shares(counts, 4)[-1] == ("d", 1, 10.0)
    assert sum(percent for _, _, percent in shares(counts, 1)) == pytest.approx(100)
    assert shares(Counter(), 3) == []


def test_smoothness_is_the_mean_over_pivots_and_over_the_others():
    values = torch.arange(24.0).reshape(2, 3, 4)
    pivot = torch.zeros(3, 4, dtype=torch.bool)
    pivot[0, 0] = pivot[2, 1] = True
    found = smoothness(values, pivot)
    for layer in range(2):
        flat = [(values[layer, n, t].item(), bool(pivot[n, t])) for n in range(3) for t in range(4)]
        assert float(found.pivots[layer]) == pytest.approx(sum(v for v, p in flat if p) / 2)
        assert float(found.others[layer]) == pytest.approx(sum(v for v, p in flat if not p) / 10)
    assert found.ratio == pytest.approx(float(found.pivots.mean()) / float(found.others.mean()))


def test_a_directory_gets_the_kinds_name_and_a_file_its_own(tmp_path):
    assert output_for(tmp_path, "tiny__act", "png, pdf", 200).stem == tmp_path / "tiny__act"
    named = output_for(tmp_path / "new" / "x.svg", "tiny__act", "png,pdf", 200)
    assert (named.stem, named.formats) == (tmp_path / "new" / "x", ("svg", "png", "pdf"))
    assert output_for(tmp_path / "x.png", "tiny__act", "png,pdf", 200).formats == ("png", "pdf")
    dotted = tmp_path / "v1.0"
    dotted.mkdir()
    assert output_for(dotted, "tiny__act", "pdf", 72).path("layer0", "pdf") == dotted / "tiny__act__layer0.pdf"


def test_bars_are_named_after_the_runs_that_they_are_narrowed_down_to(monkeypatch, intactkv_root):
    stems = []
    monkeypatch.setattr(plot, "chosen_rows", lambda options: [])
    monkeypatch.setattr("eval.plots.perplexity.draw", lambda rows, output: stems.append(output.stem.name))
    parser = ArgumentParser()
    plot.add(parser.add_subparsers())
    for filters in ((), ("--corpus", "my text.txt", "--limit", "all"), ("--window", "64", "--dtype", "float16")):
        plot.run(parser.parse_args(["plot", "perplexity", "--model", "quantized/tiny", *filters]))
    name = "quantized-tiny__perplexity"
    assert stems == [name, f"{name}__my-text.txt__limitall", f"{name}__window64__float16"]


@pytest.mark.parametrize(
    ("out", "formats", "named"),
    [
        ("figures", "png,jpg", "'jpg'"),
        ("figures", "", "--format"),
        ("figures/x.jpg", "png", "x.jpg"),
        ("taken", "png", "taken"),
    ],
)
def test_what_cannot_be_written_is_refused(out, formats, named, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=named):
        output_for(tmp_path / out, "name", formats, 200)


def test_a_figure_is_closed_and_leaves_nothing_half_written_when_the_disk_fails(tmp_path, monkeypatch):
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    output = Output(tmp_path / "name", ("png", "svg"), 72)
    output.save(figure, ("a", "b"), [(1, "x"), (2, "y")], part="one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name__one.csv", "name__one.png", "name__one.svg"]
    assert sorted(tmp_path.iterdir()) == sorted(output.written)
    assert list(csv.reader((tmp_path / "name__one.csv").open())) == [["a", "b"], ["1", "x"], ["2", "y"]]
    figure, _ = plt.subplots()
    monkeypatch.setattr(figure, "savefig", lambda *_args, **_keywords: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        Output(tmp_path / "other").save(figure, ("a",), [])
    assert not list(tmp_path.glob("*other*"))
    assert plt.get_fignums() == []
