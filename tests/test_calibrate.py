"""Training a prefix: what gets a gradient, what the loss is, that it falls, and that a killed run goes on."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, random_ids
from torch import nn

from corpora.errors import UserError
from intactkv.architecture import decoder_of
from intactkv.attach import IntactModel
from intactkv.calibrate import Sample, Training, calibrate, mean_losses, sample_loss
from intactkv.prefix import Prefix, build_prefix
from quantization.grids.uniform import UniformGrid, quantize
from quantization.kv_cache.per_head import PerHead

LEAD = (1, 20, 33)
SHORT = Training(steps=6, batch=2, evaluate_every=2)


def rounded(model):
    """The model with every linear of its blocks rounded to 3 bits."""
    for module in decoder_of(model).layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = quantize(module.weight, UniformGrid(3, 16)).dequantize(torch.float32)
    return model


def text(length: int, seed: int, answers: tuple[int, int] = (6, 14)) -> Sample:
    ids = torch.cat([torch.tensor(LEAD), random_ids(length, seed)])
    counted = torch.zeros(len(ids), dtype=torch.bool)
    counted[slice(*answers)] = True
    return Sample(ids, counted)


@pytest.fixture
def pair(tiny_model):
    """pair(family) -> quantized model, its twin, and the twin's prefix."""

    def make(family="llama"):
        kind, overrides = FAMILIES[family]
        twin = tiny_model(kind, **overrides)
        return rounded(tiny_model(kind, **overrides)), twin, build_prefix(twin, LEAD)

    return make


SAMPLES = [text(n, n) for n in (16, 20, 24, 17)]
OTHERS = [text(18, 90), text(21, 91)]


def trainable(prefix: Prefix) -> Prefix:
    return replace(prefix, keys=tuple(k.clone().requires_grad_() for k in prefix.keys),
                   values=tuple(v.clone().requires_grad_() for v in prefix.values))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_half_the_mean_square_of_every_block_over_the_assistants_tokens(pair, family):
    """Recomputed in float64 from hidden states that transformers itself reports, block by block."""
    model, twin, prefix = pair(family)
    sample = SAMPLES[1]

    def states(network, ids, **cache):
        norm_inputs = []
        decoder = decoder_of(network)
        norm = getattr(decoder, "norm", None) or decoder.final_layer_norm
        handle = norm.register_forward_pre_hook(lambda _m, args: norm_inputs.append(args[0]))
        output = network(input_ids=ids[None], output_hidden_states=True, **cache)
        handle.remove()
        return [x[0].double() for x in (*output.hidden_states[1:-1], norm_inputs[0])]

    with torch.no_grad():
        full = states(twin, sample.ids, use_cache=False)
        seen = states(model, sample.ids[len(LEAD) :], past_key_values=prefix.cache(model.config), use_cache=True)
        expected = sum(
            (b[sample.counted[len(LEAD) :]] - a[sample.counted]).square().mean() / 2
            for a, b in zip(full, seen, strict=True)
        )
        got = sample_loss(model, twin, prefix, sample)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kv", [None, PerHead(4)], ids=["kv16", "kv4"])
def test_every_arm_is_scored_on_the_same_tokens(pair, kv):
    """Without a prefix, behind a part of it and behind all of it: half the mean square of the same columns."""
    model, twin, prefix = pair()
    arms = [None, prefix.first(1), prefix]
    got = mean_losses(model, twin, arms, OTHERS, kv)
    assert got[2] == pytest.approx(float(sum(sample_loss(model, twin, prefix, s, kv) for s in OTHERS)) / 2, rel=1e-5)
    expected = []
    for arm in arms:
        size, total = 0 if arm is None else len(arm), 0.0
        for sample in OTHERS:
            outputs = []
            for network, behind in ((twin, 0), (model, size)):
                seen, handles = [], []
                for block in decoder_of(network).layers:
                    handles.append(block.register_forward_hook(
                        lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
                    ))  # fmt: skip
                ids = sample.ids[None, behind:]
                if network is twin:
                    twin(input_ids=ids, use_cache=False)
                else:
                    IntactModel(model, arm, kv).feed(ids)
                for handle in handles:
                    handle.remove()
                outputs.append([x[0, sample.counted[behind:]].double() for x in seen])
            total += sum(float((b - a).square().mean() / 2) for a, b in zip(*outputs, strict=True))
        expected.append(total / len(OTHERS))
    assert got == pytest.approx(expected, rel=1e-5)
    assert len(set(got)) == 3


def test_an_unquantized_model_has_nothing_to_learn(pair):
    _, twin, prefix = pair()
    with torch.no_grad():
        assert float(sample_loss(twin, twin, prefix, SAMPLES[0])) < 1e-9


@pytest.mark.parametrize("kv", [None, PerHead(4)], ids=["kv16", "kv4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_prefix_gets_a_gradient(pair, kv, checkpointing):
    model, twin, prefix = pair()
    learned = trainable(prefix)
    sample_loss(model, twin, learned, SAMPLES[0], kv, checkpointing).backward()
    for tensor in (*learned.keys, *learned.values):
        assert tensor.grad is not None
        assert bool(tensor.grad.abs().sum() > 0)
    assert all(p.grad is None for network in (model, twin) for p in network.parameters())


def test_recomputing_gives_the_same_gradient(pair):
    model, twin, prefix = pair()
    gradients = []
    for checkpointing in (False, True):
        learned = trainable(prefix)
        sample_loss(model, twin, learned, SAMPLES[2], None, checkpointing).backward()
        gradients.append([x.grad for x in (*learned.keys, *learned.values)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert all("forward" not in block.__dict__ for block in decoder_of(model).layers)  # nothing is left behind


def test_the_gradient_is_that_of_finite_differences(pair):
    """In float64, without a cache policy (rounding has no true gradient)."""
    model, twin, prefix = (x.double() if isinstance(x, nn.Module) else x for x in pair())
    prefix = replace(
        prefix, keys=tuple(k.double() for k in prefix.keys), values=tuple(v.double() for v in prefix.values)
    )
    learned = trainable(prefix)
    sample_loss(model, twin, learned, SAMPLES[0]).backward()
    for name in ("keys", "values"):
        tensor = getattr(learned, name)[1]
        place = tuple(int(i) for i in torch.nonzero(tensor.grad.abs() == tensor.grad.abs().max())[0])
        step, losses = 1e-3, []
        for sign in (1, -1):
            moved = [x.detach().clone() for x in getattr(prefix, name)]
            moved[1][place] += sign * step
            with torch.no_grad():
                losses.append(float(sample_loss(model, twin, replace(prefix, **{name: tuple(moved)}), SAMPLES[0])))
        assert float(tensor.grad[place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("kv", [None, PerHead(4)], ids=["kv16", "kv4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_training_lowers_the_loss_on_texts_that_it_does_not_see(pair, family, kv):
    model, twin, prefix = pair(family)
    training = Training(steps=40, batch=4, evaluate_every=10, learning_rate=2e-3)
    many = [text(14 + n % 9, 200 + n, (5, 14)) for n in range(24)]
    outcome = calibrate(model, twin, prefix, many, OTHERS, training, kv=kv)
    held_out = [row["held_out"] for row in outcome.history if "held_out" in row]
    assert min(held_out) < held_out[0]
    with torch.no_grad():  # and the kept prefix has that loss
        again = sum(float(sample_loss(model, twin, outcome.best, s, kv)) for s in OTHERS) / len(OTHERS)
    assert again == pytest.approx(min(held_out), rel=1e-4)
    assert torch.equal(outcome.best.ids, prefix.ids)
    assert torch.equal(outcome.best.logits, prefix.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_element_of_magnitude_4_of_a_half_precision_prefix_moves_in_one_step(pair, tmp_path, dtype):
    """The masters are float32; the published code updates in float16, where 4 − 2e-4 is 4 again."""
    from safetensors.torch import load_file

    step = Training().learning_rate  # how far AdamW's first step moves an element, whatever its gradient
    assert float(torch.tensor(4.0, dtype=dtype) - step) == 4.0
    model, twin, prefix = pair()
    model, twin = model.to(dtype), twin.to(dtype)
    keys = [k.to(dtype) for k in prefix.keys]
    keys[1][0, 0, 1, 0] = 4.0
    prefix = replace(prefix, keys=tuple(keys), values=tuple(v.to(dtype) for v in prefix.values))
    state = tmp_path / "state.safetensors"
    outcome = calibrate(model, twin, prefix, SAMPLES, OTHERS, replace(SHORT, steps=1, evaluate_every=1), state=state)
    now = load_file(state)["1.now"]
    assert now.dtype == torch.float32
    assert abs(float(now[0, 0, 1, 0]) - 4.0) == pytest.approx(step, rel=0.01)
    assert outcome.last.dtype == dtype  # what is kept is what the model reads


def _without_time(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_killed_run_ends_with_the_same_bits(pair, tmp_path, steps):
    model, twin, prefix = pair()
    whole = calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT)
    state = tmp_path / "state.safetensors"

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == steps + 1:
            raise Killed

    with pytest.raises(Killed):
        calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT, state=state, report=kill)
    resumed: list[dict[str, float]] = []
    outcome = calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT, state=state, report=resumed.append)
    assert [int(row["step"]) for row in resumed] == list(range(steps + 1, SHORT.steps + 1))
    assert _without_time(outcome.history) == _without_time(whole.history)
    assert all(row["seconds"] > 0 for row in outcome.history[1:])  # also of the steps before the kill
    for a, b in zip((*outcome.last.keys, *outcome.best.values), (*whole.last.keys, *whole.best.values), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_run_or_a_broken_one_is_refused(pair, tmp_path):
    model, twin, prefix = pair()
    state = tmp_path / "state.safetensors"
    calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT, state=state)
    with pytest.raises(UserError, match="belongs to a run with other texts"):
        calibrate(model, twin, prefix, SAMPLES[:3], OTHERS, SHORT, state=state)
    with pytest.raises(UserError, match="belongs to a run with other texts"):
        calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT, state=state, models={"weights": "others"})
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is truncated or not a safetensors file .*delete it to train from the start"):
        calibrate(model, twin, prefix, SAMPLES, OTHERS, SHORT, state=state)


def test_every_epoch_shows_every_sample_once(pair, monkeypatch):
    model, twin, prefix = pair()
    shown = []
    real = sample_loss

    def watched(m, t, p, sample, *rest):
        if torch.is_grad_enabled():
            shown.append(len(sample.ids))
        return real(m, t, p, sample, *rest)

    monkeypatch.setattr("intactkv.calibrate.sample_loss", watched)
    calibrate(model, twin, prefix, SAMPLES, OTHERS, replace(SHORT, steps=4))
    assert sorted(shown[:4]) == sorted(shown[4:]) == sorted(len(s.ids) for s in SAMPLES)


def test_what_cannot_be_trained_on_is_refused(pair):
    model, twin, prefix = pair()
    strange = Sample(SAMPLES[0].ids + 1, SAMPLES[0].counted)
    with pytest.raises(UserError, match="the prefix must open every conversation"):
        calibrate(model, twin, prefix, [strange], OTHERS, SHORT)
    silent = Sample(SAMPLES[0].ids, torch.zeros_like(SAMPLES[0].counted))
    with pytest.raises(UserError, match="no token to take the loss at"):
        calibrate(model, twin, prefix, [silent], OTHERS, SHORT)
    with pytest.raises(UserError, match="0 held out"):
        calibrate(model, twin, prefix, SAMPLES, [], SHORT)
    with pytest.raises(UserError, match="steps is 0"):
        Training(steps=0)
    with pytest.raises(UserError, match="learning_rate is -1"):
        Training(learning_rate=-1)
    broken = replace(prefix, values=(prefix.values[0] * float("nan"), *prefix.values[1:]))
    with pytest.raises(UserError, match="the loss of the prefix is nan"):
        calibrate(model, twin, broken, SAMPLES, OTHERS, SHORT)


def test_a_calibrated_prefix_says_so_and_serves_like_any_other(pair, tmp_path):
    model, twin, prefix = pair()
    outcome = calibrate(model, twin, prefix, SAMPLES, OTHERS, replace(SHORT, learning_rate=1e-2))
    path = tmp_path / "cal.safetensors"
    replace(outcome.best, calibrated={"steps": 6}).save(path)
    loaded = Prefix.load(path)
    assert loaded.calibrated == {"steps": 6}
    assert prefix.calibrated is None
    ids = SAMPLES[0].ids[None]
    torch.testing.assert_close(IntactModel(model, loaded).score(ids), IntactModel(model, outcome.best).score(ids))
