"""KV policies with tensors of their own for every layer: their ranges, rounding, gradients, and what runs with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibration import ranges_in_checkpoints
from common import Rounds, every
from scipy.linalg import hadamard
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.cache import IntactCache
from intactkv.policy import Bound
from quantization.__main__ import main
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import ClippedPerHead, PerHead, StaticPerHead
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.recipes.recipe import Calibration, Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.identities import by_tokens
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.weights.rtn import RTN

PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")
CONVENTIONS = ("intactkv-asym", "gptq-sym")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_block(model: PreTrainedModel, prefix: Tensor | None = PREFIX) -> DecoderBlock:
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    return block


def grid_by_hand(low: float, high: float, bits: int, convention: str) -> tuple[float, int]:
    """Scale and zero point of a range, from PrefixQuant's formulas."""
    if convention == "gptq-sym":
        return 2 * max(abs(low), abs(high)) / (2**bits - 1), 2 ** (bits - 1)
    scale = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    return scale, round(-min(low, 0.0) / scale)


# ranges and rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_heads_range_is_that_of_transformers_own_cache_behind_the_prefix(
    model_type: str, rotate: bool, convention: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type)
    tensors = StaticPerHead(4, convention, rotate).fit_block(first_block(model))
    found: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for segment in SEGMENTS:
        cache = DynamicCache(config=model.config)
        model(torch.cat([PREFIX, segment])[None], past_key_values=cache, use_cache=True)
        for name in found:
            found[name].append(getattr(cache.layers[0], name)[0, :, len(PREFIX) :].double())
    size = found["keys"][0].shape[-1]
    matrix = torch.from_numpy(hadamard(size)).double() / size**0.5
    for name, samples in found.items():
        states = torch.cat(samples, dim=1)
        states = states @ matrix if rotate and name == "keys" else states
        assert tensors[f"{name}_scale"].shape == tensors[f"{name}_zero_point"].shape == (len(states), 1, 1)
        for head, x in enumerate(states):
            scale, zero_point = grid_by_hand(float(x.min()), float(x.max()), 4, convention)
            assert float(tensors[f"{name}_scale"][head]) == pytest.approx(scale, rel=1e-4)
            assert float(tensors[f"{name}_zero_point"][head]) == zero_point


@every("convention", CONVENTIONS)
@every("rotate", [False, True])
def test_static_heads_round_to_the_levels_of_their_head(rotate: bool, convention: str) -> None:
    kv = StaticPerHead(3, convention, rotate)
    zero = torch.tensor([4.0, 4.0]) if convention == "gptq-sym" else torch.tensor([2.0, 5.0])
    scale = torch.tensor([0.3, 0.7])
    tensors = {f"{name}_scale": scale.view(2, 1, 1) for name in ("keys", "values")}
    tensors |= {f"{name}_zero_point": zero.view(2, 1, 1) for name in ("keys", "values")}
    states, policy = 2 * noise(2, 2, 5, 16), Rounds(kv, tensors)
    matrix = torch.from_numpy(hadamard(16)).double() / 4

    def by_hand(x: Tensor) -> Tensor:
        s, z = scale.double().view(2, 1, 1), zero.double().view(2, 1, 1)
        return (((x / s).round() + z).clamp(0, 7) - z) * s

    exact = states.double()
    keys = by_hand(exact @ matrix.T) @ matrix if rotate else by_hand(exact)
    assert_close(Rounds(policy).keys(states).double(), keys, rtol=0, atol=1e-5)
    assert_close(Rounds(policy).values(states).double(), by_hand(exact), rtol=0, atol=1e-5)
    half = Rounds(policy).keys(states.bfloat16())
    assert (half.dtype, half.shape) == (torch.bfloat16, states.shape)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_clipped_heads_keep_the_whole_range_of_keys_and_a_share_of_the_values(
    convention: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    states, grid = noise(2, 2, 5, 16), UniformGrid(4, -1, convention)
    kv = ClippedPerHead(4, convention, keep=0.5)
    tensors = kv.fit_block(first_block(tiny_model("llama")))
    policy = Rounds(kv, tensors)
    assert_close(Rounds(policy).keys(states), fake_quantize(states, grid))
    assert not torch.equal(Rounds(policy).values(states), fake_quantize(states, grid))
    for x in (0.3 * states).flatten(0, 2)[:4]:  # one token of one head
        low, high = float(x.min()) * 0.5, float(x.max()) * 0.5
        s, z = grid_by_hand(low, high, 4, convention)
        expected = (((x.double() / s).round() + z).clamp(0, 15) - z) * s
        assert_close(Rounds(policy).values(x.view(1, 1, 1, -1))[0, 0, 0].double(), expected, rtol=0, atol=1e-5)
    whole = Rounds(kv, {name: torch.ones(()) for name in tensors})
    assert_close(Rounds(whole).values(states), fake_quantize(states, grid))


def test_what_no_cache_can_have_is_refused() -> None:
    for kind in (StaticPerHead, ClippedPerHead):
        with pytest.raises(UserError, match="KV bits=9"):
            kind(9)
        with pytest.raises(UserError, match=r"kv_cache.group_size=0 is not allowed"):
            kind(4, group_size=0)
    with pytest.raises(UserError, match="zero points that are no codes"):
        StaticPerHead(4, "minmax-asym")
    with pytest.raises(UserError, match=r"kv_cache.keep=0 is not allowed"):
        ClippedPerHead(4, keep=0.0)


# gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_tensors_of_a_policy_through_the_cache(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Also where the keys and values themselves are trained, which is what block-wise training does."""
    model, states = tiny_model("llama"), 30 * noise(1, 2, 6, 16)  # beyond the static range: zero points count
    block = first_block(model)
    for kv in (StaticPerHead(4, rotate_keys=True), ClippedPerHead(4, "intactkv-asym")):
        tensors = kv.fit_block(block)
        for tensor in kv.learned(tensors).values():
            tensor.requires_grad_(True)
        layer = IntactCache(model.config, policy=Bound(kv, {0: tensors})).intact_layers[0]
        keys, values = layer.update(states.clone().requires_grad_(True), states.clone().requires_grad_(True))
        (keys.square().sum() + values.square().sum()).backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in kv.learned(tensors).values())


def test_without_tensors_of_its_own_a_policy_passes_gradients_as_if_nothing_were_rounded(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    states = noise(1, 2, 6, 16).requires_grad_(True)
    layer = IntactCache(tiny_model("llama").config, policy=PerHead(2)).intact_layers[0]
    keys, _ = layer.update(states, states.detach())
    weights = noise(*keys.shape, seed=1)
    (keys * weights).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, weights)
    assert not torch.equal(keys, states)


def test_a_symmetric_grid_learns_one_tensor_of_each_kind(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    learned = {
        (kind.__name__, convention): set(kind(4, convention).learned(kind(4, convention).fit_block(block)))
        for kind in (StaticPerHead, ClippedPerHead)
        for convention in CONVENTIONS
    }
    scales, zeros = {"keys_scale", "values_scale"}, {"keys_zero_point", "values_zero_point"}
    assert learned == {
        ("StaticPerHead", "gptq-sym"): scales,
        ("StaticPerHead", "intactkv-asym"): scales | zeros,
        ("ClippedPerHead", "gptq-sym"): {"values_high"},
        ("ClippedPerHead", "intactkv-asym"): {"values_high", "values_low"},
    }


# checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_runs_with_the_ranges_that_it_holds(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source = tiny_checkpoint(intactkv_root, "llama")
    kv = StaticPerHead(3, "gptq-sym", rotate_keys=True)
    recipe = Recipe(weights=RTN(UniformGrid(8, 32)), kv_cache=kv)
    with ranges_in_checkpoints():  # as earlier versions wrote it
        out = quantize_checkpoint(source, recipe, intactkv_root / "out", segments=SEGMENTS)
    ids = torch.cat([torch.ones(3, 1, dtype=torch.long), SEGMENTS], dim=1)

    def logits(kv_cache: StaticPerHead | None) -> Tensor:
        plan = plan_run(out, Recipe(kv_cache=kv_cache), device=CPU)
        assert plan.kv_made_of is None
        return plan.load().score(ids)

    # `--kv static --kv-bits 3` does not say how keys are rotated; the checkpoint does.
    assert torch.equal(logits(StaticPerHead(3)), logits(kv))
    assert not torch.equal(logits(None), logits(kv))
    assert not list(intactkv_root.rglob("modelzoo/kv"))
    text = intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    other = Recipe(kv_cache=StaticPerHead(4), calibration=Calibration(str(text), samples=2, length=20))
    assert plan_run(out, other, device=CPU).kv_made_of is not None  # the checkpoint holds none for it
    with pytest.raises(UserError, match="is quantized already"):
        plan_run(out, recipe, device=CPU)


def test_a_policy_without_its_ranges_is_refused_in_one_line(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source = tiny_checkpoint(intactkv_root, "llama")
    out = quantize_checkpoint(source, Recipe(weights=RTN(UniformGrid(8, 32))), intactkv_root / "out")
    with pytest.raises(UserError, match="the calibration text of c4 is missing"):
        plan_run(out, Recipe(kv_cache=StaticPerHead(4)), device=CPU)
    with pytest.raises(UserError, match="needs the tensors that it was calibrated to; see python -m quantization kv"):
        attach(load_quantized(out), None, StaticPerHead(4))


def test_checkpoints_of_before_are_called_as_they_were() -> None:
    """Taken from the release that kept ranges in checkpoints."""
    recipe = Recipe(weights=RTN(UniformGrid(8, 32)), kv_cache=StaticPerHead(3, "gptq-sym", rotate_keys=True))
    with ranges_in_checkpoints():
        assert by_tokens("0" * 16, recipe, torch.zeros(2, 4, dtype=torch.long)).identity == "5a24d7f3"


def test_the_programs_find_the_policy_in_the_checkpoint(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    from eval.__main__ import main as evaluate

    source, text = tiny_checkpoint(intactkv_root, "llama"), intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    made = intactkv_root / "made"
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 20)
    code, _, err = run_main(
        main, "--model", source, "--recipe", "prefixquant-w4a8kv4-static", "--prefix", "none", *calibration,
        "--out", made,
    )  # fmt: skip
    assert code == 0, err
    perplexities = {}
    for arm in ((), ("--kv", "static", "--kv-bits", "4"), ("--kv", "none")):
        code, out, err = run_main(
            evaluate, "ppl", "--model", made, "--corpus", text, "--window", 16, "--limit", 2, "--json", *arm
        )
        assert code == 0, err
        perplexities[arm[:2]] = out.split('"perplexity": ')[1].split(",")[0]
    assert perplexities[()] == perplexities["--kv", "static"] != perplexities["--kv", "none"]
