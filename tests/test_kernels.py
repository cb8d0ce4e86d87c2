"""`--kernel`: which product serves which weight, in a model and in programs; what is refused, and what is said."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from common import every
from torch.testing import assert_close

from corpora.errors import UserError
from eval.__main__ import main
from quantization.grids.uniform import UniformGrid, quantize
from quantization.kernels.linear import QuantLinear
from quantization.kernels.products import AUTO, PRODUCTS, choose
from quantization.kernels.protocols import Stored
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.rtn import RTN

CPU = torch.device("cpu")
IDS = torch.arange(4, 24)[None]

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(weights=RTN(UniformGrid(4, 32)))
    return quantize_checkpoint(checkpoint(), recipe, tmp_path_factory.mktemp("rtn") / "out")


def kernels_of(model: torch.nn.Module) -> set[str]:
    return {module.kernel for module in model.modules() if isinstance(module, QuantLinear)}


def test_on_a_cpu_auto_unpacks_and_computes_the_same_bits(quantized: Path) -> None:
    plain, packed = load_quantized(quantized), load_quantized(quantized, kernel="auto")
    assert kernels_of(packed) == {"unpack"}
    assert torch.equal(plain(IDS).logits, packed(IDS).logits)


@pytest.mark.usefixtures("triton_anywhere", "bfloat16_products")
@every(("kernel", "dtype", "near"), [("auto", torch.float32, 1e-5), ("uniform", torch.bfloat16, 3e-2)])
def test_a_packed_model_computes_what_the_dequantized_one_does(
    kernel: str, dtype: torch.dtype, near: float, quantized: Path
) -> None:
    plain, packed = (load_quantized(quantized, kernel=name, dtype=dtype) for name in (None, kernel))
    assert kernels_of(packed) == {"uniform"}
    expected, found = plain(IDS).logits.float(), packed(IDS).logits.float()
    assert float((found - expected).norm() / expected.norm()) < near
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            assert_close(module.dequantize(torch.float32), plain.get_parameter(f"{name}.weight").float(),
                         rtol=near, atol=near * 0.01)  # fmt: skip


@pytest.mark.usefixtures("triton_anywhere")
def test_a_product_prepares_a_weight_once_and_keeps_nothing_else(quantized: Path) -> None:
    model = load_quantized(quantized, kernel="auto")
    linear = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert sorted(name for name, _ in linear.named_buffers()) == ["scale", "words", "zero_point"]
    size = linear.in_features * -(-linear.out_features // 64) * 64
    assert sum(t.nbytes for t in linear.buffers()) == size // 2 + size // 32 * (4 + 2)  # 4 bits, a scale, a zero point


def test_a_name_that_takes_nothing_here_is_refused(quantized: Path) -> None:
    with pytest.raises(UserError, match=r"--kernel uniform takes none of this checkpoint's weights on cpu; give --ker"):
        load_quantized(quantized, kernel="uniform")
    with pytest.raises(UserError, match=r"unknown kernel 'x'; choose from auto, uniform, .*unpack"):
        load_quantized(quantized, kernel="x")


@pytest.mark.usefixtures("triton_anywhere")
def test_a_weight_that_a_named_product_does_not_take_goes_to_the_next_and_is_said_once(
    checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mixed(RTN):
        name = "mixed"

        def quantize_block(self, block):  # type: ignore[no-untyped-def]
            stored = super().quantize_block(block)
            odd = next(iter(stored))
            return stored | {odd: quantize(block.linears()[odd].weight, replace(self.grid, group_size=16))}

    out = quantize_checkpoint(checkpoint(), Recipe(weights=Mixed(UniformGrid(4, 32))), tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        model = load_quantized(out, kernel="uniform")
    assert kernels_of(model) == {"uniform", "unpack"}
    (said,) = [record.getMessage() for record in caplog.records if "kernel" in record.getMessage()]
    assert "--kernel uniform does not take every weight" in said
    assert "3 by unpack" in said


def test_auto_is_the_first_product_that_takes_a_weight_and_unpack_takes_all() -> None:
    assert list(PRODUCTS)[-1] == "unpack"
    assert all(name == product.name for name, product in PRODUCTS.items())
    for bits in range(2, 9):
        weight = quantize(torch.randn(4, 64), UniformGrid(bits, 16))
        stored = Stored(weight.kind, weight.tensors(), weight.header())
        assert choose(stored, AUTO, CPU).name == choose(stored, "unpack", CPU).name == "unpack"


def test_a_kernel_without_quantized_weights_is_refused(run_main, checkpoint, quantized, intactkv_root) -> None:
    program = partial(run_main, main)
    code, _, err = program("ppl", "--model", checkpoint(), "--kernel", "auto")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--kernel auto has nothing to act on: the weights have full precision; name a recipe" in err
    code, _, err = program("ppl", "--model", quantized, "--kernel", "x")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "unknown kernel 'x'; choose from auto, " in err


def test_the_help_names_every_product(run_main) -> None:
    said = run_main(main, "ppl", "--help")[1].partition("--kernel NAME  ")[2].partition("--kv-storage")[0]
    assert [name for name in (AUTO, *PRODUCTS) if name not in said] == []


def test_the_record_names_a_kernel_whose_figures_may_differ(run_main, checkpoint, intactkv_root) -> None:
    text = intactkv_root / "text.txt"
    text.write_text("The fox runs over the hill and back. " * 40)
    program = partial(run_main, main)
    common = ("ppl", "--model", checkpoint(), "--recipe", "rtn-w4", "--group-size", 32, "--corpus", text, "--window",
              32, "--limit", 1, "--json")  # fmt: skip
    settings, products = {}, {}
    for kernel in (None, "unpack", "auto"):
        code, out, err = program(*common, *(() if kernel is None else ("--kernel", kernel)))
        assert code == 0, err
        record = json.loads(out)
        settings[kernel], products[kernel] = record["settings"], record.get("products")
    assert products == {None: None, "unpack": ["unpack"], "auto": ["unpack"]}
    assert [settings[kernel]["packed"] for kernel in (None, "unpack", "auto")] == [False, True, True]
    assert ["kernel" in settings[kernel] for kernel in (None, "unpack", "auto")] == [False, False, True]
