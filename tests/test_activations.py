"""Quantized inputs of linears: grids by hand, ranges against a plain model's, gradients, checkpoints, shared work."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from families import random_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from corpora.errors import UserError
from corpora.paths import datasets_dir
from corpora.text import calibration_segments, evaluation_stream, protocol
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.grids.uniform import CONVENTIONS, Fit, UniformGrid, fake_quantize
from quantization.model.activations import Activations
from quantization.model.inputs import InputQuantizer, path_of, put_in_front
from quantization.model.online import OnlineRotation
from quantization.named import named_recipe
from quantization.programs.export import main as export
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.rtn import RTN

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
A8 = UniformGrid(8)


pytestmark = pytest.mark.usefixtures("no_grad")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the grid -------------------------------------------------------------------------------------------------------------


@every(
    ("grid", "expected"),
    [
        (UniformGrid(2), [-4 / 3, 0.0, 8 / 3]),  # s 4/3, z 1: codes 0, 1, 3
        (UniformGrid(2, convention="gptq-sym"), [0.0, 0.0, 2.0]),  # s 2, z 2: −½ rounds to 0, 1½ to 2, which is cut
        (UniformGrid(3, convention="smoothquant-sym"), [-1.0, 0.0, 3.0]),  # s 1
        (UniformGrid(3, convention="quarot-sym"), [-1.0, 0.0, 3.0]),
        (UniformGrid(3, convention="deepspeed-sym"), [-0.75, 0.0, 2.25]),  # s ¾: 4 steps up are cut to 3
        (UniformGrid(2, 1), [-1.0, 0.0, 3.0]),  # a group of one value is exact
    ],
)
def test_a_token_is_rounded_as_computed_by_hand(grid: UniformGrid, expected: list[float]) -> None:
    token = torch.tensor([[-1.0, 0.0, 3.0]])
    torch.testing.assert_close(InputQuantizer(grid)(token), torch.tensor([expected]))


def test_a_kept_share_of_the_range_cuts_both_ends() -> None:
    """[−1, 3] halved is [−½, 1½]: s ⅔, z 1, codes 0 and 3. A symmetric grid halves its maximum."""
    token = torch.tensor([[-1.0, 0.0, 3.0]])
    torch.testing.assert_close(InputQuantizer(UniformGrid(2), keep=0.5)(token), torch.tensor([[-2 / 3, 0, 4 / 3]]))
    symmetric = InputQuantizer(UniformGrid(3, convention="smoothquant-sym"), keep=0.5)  # s ½
    torch.testing.assert_close(symmetric(token), torch.tensor([[-1.0, 0, 1.5]]))


def test_a_static_grid_is_the_same_for_every_token() -> None:
    quantizer = InputQuantizer(UniformGrid(2), Fit(torch.tensor([[0.5]]), torch.tensor([[1.0]])))
    tokens = torch.tensor([[-1.0, 0.1, 0.4], [9.0, -9.0, 0.25]])
    torch.testing.assert_close(quantizer(tokens), torch.tensor([[-0.5, 0.0, 0.5], [1.0, -0.5, 0.0]]))


@every("convention", CONVENTIONS)
@every("group_size", [-1, 8])
@every("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_range_is_rounding_to_the_grid_of_each_token(
    convention: str, group_size: int, dtype: torch.dtype
) -> None:
    grid = UniformGrid(4, group_size, convention)
    x = (noise(2, 5, 32) * torch.logspace(-3, 3, 10).view(2, 5, 1)).to(dtype)
    ours = InputQuantizer(grid)(x)
    assert ours.dtype == dtype
    assert torch.equal(ours, fake_quantize(x, grid))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(InputQuantizer(grid)(x[:, order]), ours[:, order])  # no token looks at another
    assert torch.equal(InputQuantizer(grid)(x.flatten(0, 1)), ours.flatten(0, 1))  # as OPT hands them to fc1


# gradients ------------------------------------------------------------------------------------------------------------


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = noise(*output.shape, seed=9).to(output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), tensors))


def rounding_as_identity(groups: Tensor, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
    """x̂ in which rounding adds a constant: (x/s + c) s within the grid, its lowest or highest level outside."""
    steps = groups / scale
    rounded = (steps + zero_point).round() if grid.rule.round_sum else steps.round() + zero_point.round()
    codes = rounded.detach()
    within = (steps + (codes - zero_point.detach() - steps.detach())) * scale
    low, high = (torch.full_like(codes, end) - zero_point for end in (0, grid.top))
    return torch.where(codes < 0, low * scale, torch.where(codes > grid.top, high * scale, within))


@every("convention", ["gptq-asym", "smoothquant-sym", "spqr-asym"])
@every("group_size", [-1, 8])
def test_static_scales_and_zero_points_have_the_gradients_of_rounding_as_identity(
    convention: str, group_size: int
) -> None:
    """float64, by autograd: u = x/s + c with the constant c that rounding adds."""
    grid = UniformGrid(3, group_size, convention)
    groups = 1 if group_size == -1 else 4
    free = grid.rule.zero_point != "constant"
    zero = torch.full((groups, 1), float((grid.top + 1) // 2)) + (0.3 if grid.rule.zero_point == "real" else 0)
    quantizer = InputQuantizer(grid, Fit(0.2 + 0.1 * torch.rand(groups, 1), zero))
    assert [x is quantizer.scale or x is quantizer.zero_point for x in quantizer.learned] == [True] * (1 + free)
    x = noise(6, 32)
    with torch.enable_grad():
        learned = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in quantizer.learned)]
        ours = gradients(quantizer(x), learned)

        values = x.detach().double().requires_grad_()
        scale, z = (t.detach().double().requires_grad_() for t in (quantizer.scale, quantizer.zero_point))
        plain = rounding_as_identity(values.view(6, groups, -1), scale, z, grid).view(6, 32)
        expected = gradients(plain, [values, scale, *([z] if free else [])])
    torch.testing.assert_close(quantizer(x).double(), plain, rtol=1e-5, atol=1e-6)
    assert bool((expected[0] == 0).any())  # something is cut
    for own, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), truth, rtol=1e-4, atol=1e-4)


@every("convention", ["gptq-asym", "smoothquant-sym", "deepspeed-asym"])
@every("keep", [0.6, 0.95])
def test_shares_of_dynamic_ranges_have_the_gradients_of_rounding_as_identity(convention: str, keep: float) -> None:
    """Also those of the zero point's rounding: a value that is cut depends on its own end of the range alone."""
    grid = UniformGrid(3, 16, convention)
    quantizer = InputQuantizer(grid, keep=keep)
    constant = grid.rule.zero_point == "constant"
    x = noise(6, 32)
    with torch.enable_grad():
        learned = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in quantizer.learned)]
        ours = gradients(quantizer(x), learned)

        values = x.detach().double().requires_grad_()
        high, low = (torch.tensor(keep, dtype=torch.float64, requires_grad=True) for _ in range(2))
        groups = values.view(6, 2, 16)
        top, bottom = groups.amax(-1, keepdim=True) * high, groups.amin(-1, keepdim=True) * (high if constant else low)
        if constant:
            scale, exact = torch.maximum(top, -bottom) / 3, torch.full_like(top, 3.0)
        else:
            scale = (top - bottom) / (8 if convention == "deepspeed-asym" else 7)
            exact = -bottom / scale
        z = exact + (exact.round() - exact).detach()
        plain = rounding_as_identity(groups, scale, z, grid).view(6, 32)
        expected = gradients(plain, [values, high, *([] if constant else [low])])
    torch.testing.assert_close(quantizer(x).double(), plain, rtol=1e-5, atol=1e-6)
    for own, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), truth, rtol=1e-4, atol=1e-4)


# static ranges --------------------------------------------------------------------------------------------------------


def plain_ranges(model: PreTrainedModel, prefix: Tensor | None, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest input of every linear of a block, per channel, of a plain model's passes over [prefix +
    text], the prefix's positions left out."""
    block = architecture_of(model.config).blocks_of(model)[index]
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    skip = 0 if prefix is None else len(prefix)
    for segment in SEGMENTS:
        model((segment if prefix is None else torch.cat([prefix, segment]))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    text = {name: torch.cat([x[skip:] for x in inputs]) for name, inputs in seen.items()}
    return {name: (x.amin(0), x.amax(0)) for name, x in text.items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("behind", [False, True], ids=["plain", "behind"])
def test_static_grids_span_what_a_plain_model_sees(
    model_type: str, group_size: int, behind: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Behind weights that are on their grids already: those of the blocks in front, not the block's own."""
    grid, weights = UniformGrid(8, group_size), UniformGrid(3)
    recipe = Recipe(weights=RTN(weights), activations=Activations(grid, static=True), prefix="bos",
                    calibrate_behind_prefix=behind)  # fmt: skip
    dense, prefix = tiny_checkpoint(tmp_path, model_type), PREFIX if behind else None
    model = load_quantized(quantize_checkpoint(dense, recipe, tmp_path / "q", segments=SEGMENTS, behind=prefix))
    full = AutoModelForCausalLM.from_pretrained(dense)
    architecture = architecture_of(full.config)
    blocks, plain = architecture.blocks_of(model), architecture.blocks_of(full)
    for index in range(1 if behind else 3):  # unlike the plain model's, the prefix never meets a rounded block
        ranges = plain_ranges(full, prefix, index)
        for names in architecture.linears:
            path = path_of(blocks[index].get_submodule(names[0]))
            assert path is not None
            assert path.quantizer is not None
            size = len(ranges[names[0]][0]) if group_size == -1 else group_size
            low, high = (x.double().view(-1, size) for x in ranges[names[0]])
            low, high = low.amin(1, keepdim=True).clamp_max(0), high.amax(1, keepdim=True).clamp_min(0)
            scale = (high - low) / 255
            torch.testing.assert_close(path.quantizer.scale.double(), scale, rtol=1e-4, atol=0)
            assert float((path.quantizer.zero_point - (-low / scale).round()).abs().max()) <= 1
        for linear in architecture.linears_of(plain[index], "block").values():
            linear.weight.data = fake_quantize(linear.weight.data, weights)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_linear_of_the_blocks_reads_rounded_tokens(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe(activations=Activations(UniformGrid(4)))
    dense = tiny_checkpoint(tmp_path, model_type)
    model = load_quantized(quantize_checkpoint(dense, recipe, tmp_path / "q"))
    full = AutoModelForCausalLM.from_pretrained(dense)
    for block in architecture_of(full.config).blocks_of(full):
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.register_forward_pre_hook(lambda _module, args: (fake_quantize(args[0], UniformGrid(4)), *args[1:]))
    ids = random_ids(20)[None]
    assert torch.equal(model(ids).logits, full(ids).logits)


@pytest.mark.slow
def test_one_grid_per_tensor_is_ruined_by_the_pivots_and_rescued_by_the_prefix(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2: the [BOS] of a text sets the static range of everybody, unless it is calibrated behind."""
    dense = smollm2
    if not (datasets_dir() / "sample").is_dir():
        pytest.skip("the sample text is missing; python -m corpora says how to prepare it")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    segments = calibration_segments(tokenizer, "sample", samples=4, length=128, seed=0)
    text = evaluation_stream(tokenizer, "sample", window=256, protocol=protocol("intactkv")).windows(2)
    bos, recipe = text[0, :1], with_settings(named_recipe("rtn-w8a8"), ["activations.static=true"])
    prefix = build_prefix(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32), bos)
    losses = {}
    for behind in (False, True):
        used = replace(recipe, prefix="bos", calibrate_behind_prefix=behind)
        out = quantize_checkpoint(
            dense, used, tmp_path / str(behind), segments=segments, behind=bos if behind else None
        )
        logits = attach(load_quantized(out), prefix if behind else None).score(text)
        losses[behind] = float(nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), text[:, 2:].flatten()))
    assert losses[True] < losses[False] - 0.2  # 20 % of perplexity


# devices and dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_ranges_stay_in_float32_whatever_the_model_is(
    static: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = with_settings(named_recipe("rtn-w8a8-qllm"), [f"activations.static={str(static).lower()}"])
    dense = tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    out = quantize_checkpoint(dense, recipe, tmp_path / "q", segments=SEGMENTS)
    ids, exact = random_ids(20)[None], AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    states = []
    for model in (load_quantized(out), load_quantized(out, dtype=torch.float32), load_quantized(out).float().half()):
        state = {name: x for name, x in model.state_dict().items() if ".input." in name}
        assert len(state) == 3 * 4 * 2
        assert all(x.dtype == torch.float32 for x in state.values())
        states.append(state)
        logits = model(ids).logits.float()
        truth = exact(ids).logits
        assert float((logits - truth).norm() / truth.norm()) < 0.1
    assert all(torch.equal(state[name], x) for state in states[1:] for name, x in states[0].items())


def test_ranges_go_where_the_model_goes() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    put_in_front(block, ["0"], quantizer=InputQuantizer(A8))
    block.to("meta", torch.bfloat16)
    path = path_of(block[0])
    assert path is not None
    assert path.quantizer is not None
    assert (path.quantizer.low.device.type, path.quantizer.low.dtype) == ("meta", torch.float32)


# one computation for those that share an input ------------------------------------------------------------------------


class Sharing(nn.Module):
    """Two linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


def shared(keep: float = 1.0) -> tuple[Sharing, InputQuantizer, list[Tensor]]:
    """The linears, their quantizer, and every tensor that it was asked to round."""
    module, quantizer = Sharing(), InputQuantizer(UniformGrid(3), keep=keep)
    put_in_front(module, ["a", "b"], quantizer=quantizer)
    asked: list[Tensor] = []
    quantizer.register_forward_pre_hook(lambda _module, args: asked.append(args[0]))
    return module, quantizer, asked


def test_an_input_is_rounded_once_for_all_that_read_it() -> None:
    module, quantizer, asked = shared()
    for seed in range(3):
        x = noise(4, 8, seed=seed)
        rounded = fake_quantize(x, quantizer.grid)
        for linear in (module.a, module.b):
            assert torch.equal(linear(x), nn.functional.linear(rounded, linear.weight))
        assert len(asked) == seed + 1


def test_what_changed_since_is_never_missed() -> None:
    """The quantizer, the tensor's values, or the pass, which may have been left before all linears had read."""
    module, quantizer, _ = shared()
    x = noise(4, 8)

    def right(linear: nn.Linear) -> bool:
        return torch.equal(linear(x), nn.functional.linear(quantizer(x), linear.weight))

    assert right(module.a)  # and left early
    quantizer.high.fill_(0.5)
    assert right(module.a)
    assert right(module.b)
    x.mul_(3)  # in place, after a whole pass
    assert right(module.a)
    assert right(module.b)
    module.a(noise(4, 8, seed=1))  # left early, with another tensor
    assert right(module.b)
    assert right(module.a)


def test_a_copy_has_a_quantizer_of_its_own() -> None:
    module, quantizer, _ = shared()
    twin, x = copy.deepcopy(module), noise(4, 8)
    before = module.a(x), module.b(x)
    quantizer.high.fill_(0.5)
    assert torch.equal(twin.a(x), before[0])
    assert not torch.equal(module.a(x), before[0])


def test_a_rotation_and_a_quantizer_that_come_one_by_one_are_one_path() -> None:
    module, rotation, quantizer = Sharing(), OnlineRotation.of(8), InputQuantizer(UniformGrid(3))
    first = put_in_front(module, ["a", "b"], rotation=rotation)
    assert put_in_front(module, ["a", "b"], quantizer=quantizer) is first
    x = noise(4, 8)
    expected = nn.functional.linear(fake_quantize(rotation(x), quantizer.grid), module.b.weight)
    assert torch.equal(module.b(x), expected)


# refusals and identity ------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"clip_search=true is for weights; set activations\.keep"):
        Activations(UniformGrid(8, clip_search=True))
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"activations\.keep={keep:g} is not allowed"):
            Activations(A8, keep=keep)
    with pytest.raises(UserError, match=r"keep=0\.9 is for dynamic ranges"):
        Activations(A8, static=True, keep=0.9)


def test_groups_that_do_not_fill_an_input_are_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path, "llama")  # 64 and 96 channels
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj: group_size=64 does not divide its 96"):
        quantize_checkpoint(dense, Recipe(activations=Activations(UniformGrid(8, 64))), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_every_field_is_part_of_the_identity() -> None:
    plain = Recipe(weights=RTN(A8), activations=Activations(A8))
    others = [
        replace(plain, activations=part)
        for part in (None, Activations(A8, True), Activations(A8, keep=0.9), Activations(UniformGrid(8, 16)))
    ]
    assert len({str(recipe.weights_identity()) for recipe in (plain, *others)}) == 5
    assert [recipe.label() for recipe in (plain, *others)] == [
        "rtn-w8row-a8",
        "rtn-w8row",
        "rtn-w8row-a8static",
        "rtn-w8row-a8",
        "rtn-w8row-a8g16",
    ]


def test_exports_refuse_what_other_runtimes_would_not_round(
    run_main: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe: Any = Recipe(weights=RTN(UniformGrid(4, 32)), activations=Activations(A8))
    out = quantize_checkpoint(tiny_checkpoint(tmp_path, "llama"), recipe, tmp_path / "q")
    code, _, said = run_main(export, "--model", out, "--format", "gptq", "--out", tmp_path / "exported")
    assert code == 2
    assert "which no format here can say" in said
    assert not (tmp_path / "exported").exists()
