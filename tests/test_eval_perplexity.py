"""Perplexity: the protocols against slow float64 loops over the plain model."""

import pytest
import torch
from torch import Tensor

import eval.perplexity as perplexity
from corpora.text import TokenStream, protocol
from eval.perplexity import cut_windows, token_losses, window_losses
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.kv_cache import PerHead

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
START = 1
PROMPT = (1, 9, 8, 7)


def stream_of(tokens: int, window: int, name: str) -> TokenStream:
    """[BOS] and random ids, as `evaluation_stream` would make them."""
    ids = torch.randint(5, 101, (tokens,), generator=torch.Generator().manual_seed(3))
    ids[0] = START
    return TokenStream(ids, "test", "hash", 1, window, protocol(name), START)


def slow_losses(model, windows: list[list[int]], first_target: int) -> Tensor:
    """NLL of every position from `first_target` on, one full-length float64 log-softmax per window."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        chosen = logits.log_softmax(-1)[range(len(window) - 1), window[1:]]
        losses.append(-chosen[first_target - 1 :])
    return torch.stack(losses)


def windows_by_hand(stream: TokenStream, prefix: tuple[int, ...]) -> tuple[list[list[int]], int]:
    """What the evaluator's table says, written out: full sequences and the first counted position in them."""
    ids, size = stream.ids.tolist(), stream.window
    if stream.protocol.name == "intactkv":
        lead = list(prefix) or [START]
        return [lead + ids[i + 1 : i + size] for i in range(0, len(ids) - size + 1, size)], len(lead) + 1
    if prefix:
        ids = ids[1:]
    return [list(prefix) + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)], len(prefix) + 1


@pytest.mark.parametrize("prefix", [(), (START,), PROMPT])
@pytest.mark.parametrize("name", ["intactkv", "gptq"])
def test_both_arms_give_the_plain_models_losses_in_float64(name, prefix, tiny_model):
    model, stream = tiny_model("llama"), stream_of(75, 24, name)
    expected = slow_losses(model, *windows_by_hand(stream, prefix))
    for intact in (False, True) if prefix else (False,):
        windows = cut_windows(stream, stream.protocol, prefix, intact, None)
        runner = attach(model, build_prefix(model, prefix) if intact else None)
        losses = token_losses(runner, windows, slice(None))
        # float32 through three layers against float64 of the logits only
        torch.testing.assert_close(losses.double(), expected, atol=2e-4, rtol=1e-4)
        assert losses.shape == (3, stream.window - (2 if name == "intactkv" else 1))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_full_precision_model_does_not_notice_its_own_prefix(model_type, tiny_model):
    model, stream = tiny_model(model_type), stream_of(96, 32, "intactkv")
    vanilla = window_losses(attach(model, None), cut_windows(stream, stream.protocol, (), False, None), batch_size=3)
    prefix = build_prefix(model, [START])
    intact = window_losses(
        attach(model, prefix), cut_windows(stream, stream.protocol, (START,), True, None), batch_size=3
    )
    torch.testing.assert_close(intact, vanilla, atol=0, rtol=1e-4)


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary(tiny_model):
    model = tiny_model("llama")
    model.lm_head.weight.zero_()
    stream = stream_of(64, 16, "gptq")
    losses = window_losses(attach(model, None), cut_windows(stream, stream.protocol, (), False, None), batch_size=2)
    assert float(losses.mean().exp()) == pytest.approx(101, rel=1e-6)


def test_neither_chunks_of_logits_nor_batches_change_the_losses(tiny_model, monkeypatch):
    model, stream = attach(tiny_model("llama"), None), stream_of(120, 24, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    whole = window_losses(model, windows, batch_size=5)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 7 * 101)  # seven positions at once
    torch.testing.assert_close(window_losses(model, windows, batch_size=2), whole, atol=0, rtol=1e-5)


def test_the_head_never_sees_more_positions_than_fit_the_limit(tiny_model, monkeypatch):
    model, stream = tiny_model("llama"), stream_of(120, 24, "intactkv")
    rows = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: rows.append(output.numel()))
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 10 * 101)
    window_losses(attach(model, None), cut_windows(stream, stream.protocol, (), False, None), batch_size=5)
    assert max(rows) <= 10 * 101
    assert sum(rows) == 5 * 22 * 101  # only the counted targets are computed


def test_a_model_type_outside_the_table_is_scored_by_its_own_logits(tiny_model, monkeypatch):
    model, stream = attach(tiny_model("qwen3"), None), stream_of(60, 20, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    known = window_losses(model, windows, batch_size=2)
    monkeypatch.setattr("eval.tasks.scoring.ARCHITECTURES", {})
    torch.testing.assert_close(window_losses(model, windows, batch_size=2), known, atol=0, rtol=1e-5)


def test_the_first_predictions_of_a_window_never_count(tiny_model):
    stream = stream_of(60, 20, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    # Position 0 is overwritten: changing it in the stream changes nothing at all.
    stream.ids[20] = 77
    other = cut_windows(stream, stream.protocol, (), False, None)
    assert torch.equal(windows.fed, other.fed)
    assert torch.equal(windows.lead, torch.tensor([START]))
    # Position 1 is fed first and never predicted: 18 predictions for positions 2 to 19.
    assert windows.fed.shape == (3, 19)
    assert windows.targets == 18


def test_the_stream_is_not_written_to(tiny_model):
    stream = stream_of(60, 20, "intactkv")
    before = stream.ids.clone()
    window_losses(attach(tiny_model("llama"), None), cut_windows(stream, stream.protocol, PROMPT, False, None),
                  batch_size=3)  # fmt: skip
    assert torch.equal(stream.ids, before)


def test_shares_of_several_processes_add_up_to_the_whole(tiny_model):
    model, stream = attach(tiny_model("llama"), None), stream_of(140, 20, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    starts = range(0, len(windows.fed), 2)
    shares = [window_losses(model, windows, batch_size=2, mine=starts[rank::3]) for rank in range(3)]
    torch.testing.assert_close(sum(shares), window_losses(model, windows, batch_size=2), atol=0, rtol=0)


def test_running_perplexity_is_that_of_the_windows_done(tiny_model):
    model, stream = attach(tiny_model("llama"), None), stream_of(80, 20, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    reports: list[tuple[int, float]] = []
    losses = window_losses(model, windows, batch_size=2, report=lambda n, value: reports.append((n, value)))
    assert [n for n, _ in reports] == [2, 2]
    assert reports[0][1] == pytest.approx(float(losses[:2].mean().exp()))
    assert reports[1][1] == pytest.approx(float(losses.mean().exp()))


def test_a_quantized_cache_is_really_read_and_fewer_bits_cost_more(tiny_model):
    model, stream = tiny_model("llama"), stream_of(160, 40, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    exact = token_losses(attach(model, None), windows, slice(None))
    errors = [float((token_losses(attach(model, None, PerHead(bits)), windows, slice(None)) - exact).abs().mean())
              for bits in (8, 4, 2)]  # fmt: skip
    assert 0 < errors[0] < errors[1] < errors[2]


def test_a_kv_policy_that_no_token_went_through_is_an_error(tiny_model, monkeypatch):
    model, stream = attach(tiny_model("llama"), None, PerHead(4)), stream_of(60, 20, "intactkv")
    windows = cut_windows(stream, stream.protocol, (), False, None)
    monkeypatch.setattr("intactkv.cache.IntactLayer.update", lambda self, k, v, *_, **__: (k, v))
    with pytest.raises(RuntimeError, match="no token of the cache went through it"):
        token_losses(model, windows, slice(None))
