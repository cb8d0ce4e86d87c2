"""Attention straight from packed KV codes, in torch and in Triton, against the dequantized product in float64."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from common import KERNELS, compiled_for, every, needs_triton
from torch import Tensor
from torch.testing import assert_close

from quantization.grids.packing import pack_codes
from quantization.hadamard import matrix, plan
from quantization.kernels.kv_attention import attend, output, scores
from quantization.kernels.kv_codes import Coded, Side, known

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in Triton's interpreter
# Float32 sums of a few thousand products in another order than in float64; three tf32 products stand for one on a GPU.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Made:
    """Codes, and what they stand for by a plain formula: (B, H, n, D) float64, in the plain basis."""

    codes: Coded
    numbers: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_token(kind: str, bits: int, batch: int, heads: int, n: int, size: int, groups: int = 1, seed: int = 0) -> Made:
    """One of the layouts whose tokens stand alone: zero (integer zero point), minimum, lloyd, turned lloyd, fp8."""
    draw = generator(seed)
    codes = torch.randint(0, 2**bits, (batch, heads, n, size), generator=draw)
    scale = torch.rand(batch, heads, n, groups, generator=draw).add_(0.5).div_(2**bits)
    of_group = torch.arange(size) // (size // groups)
    made = Coded(bits, pack_codes(codes, bits).to(DEVICE))
    if kind in ("lloyd", "turned"):
        levels = torch.randn(2**bits, generator=draw)
        x = levels.double()[codes] * scale.half().double()[..., of_group]
        made = replace(made, scale=scale.half().to(DEVICE), levels=levels.to(DEVICE))
        if kind == "turned":
            turn = matrix(plan(size))
            x = x @ turn
            made = replace(made, turn=lambda x, back=False: x @ (turn if back else turn.T).to(x))
    elif kind == "bare":  # a table of levels alone
        levels = torch.linspace(-1, 1, 2**bits)
        x, made = levels.double()[codes], replace(made, levels=levels.to(DEVICE))
    elif kind == "zero":
        zero = torch.randint(-3, 2**bits + 3, scale.shape, generator=draw)
        x = (codes - zero[..., of_group]) * scale.double()[..., of_group]
        made = replace(made, scale=scale.to(DEVICE), zero_point=zero.to(torch.int16).to(DEVICE))
    else:
        low = torch.randn(scale.shape, generator=draw).half()
        x = codes * scale.half().double()[..., of_group] + low.double()[..., of_group]
        made = replace(made, scale=scale.half().to(DEVICE), minimum=low.to(DEVICE))
    return Made(made, x)


def per_block(bits: int, batch: int, heads: int, blocks: int, size: int, block: int, seed: int = 0) -> Made:
    """KIVI's keys: a scale and a minimum per channel and block of tokens."""
    draw = generator(seed)
    codes = torch.randint(0, 2**bits, (batch, heads, blocks, size, block), generator=draw)
    scale = torch.rand(batch, heads, blocks, size, generator=draw).add_(0.5).div_(2**bits).half()
    low = torch.randn(scale.shape, generator=draw).half()
    x = codes * scale.double()[..., None] + low.double()[..., None]
    made = Coded(bits, pack_codes(codes, bits).to(DEVICE), scale.to(DEVICE), low.to(DEVICE), block=block)
    return Made(made, x.transpose(3, 4).flatten(2, 3))


def exact(batch: int, heads: int, n: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, n, size, generator=generator(seed)).to(DEVICE, dtype)


def queries(batch: int, heads: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return exact(batch, heads, 1, size, 99, dtype)


def truth(
    query: Tensor, keys: list[Tensor], values: list[Tensor], scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention in float64 over numbers (B or 1, KV heads, tokens, D) in order, one query head at a time."""
    query = query.double().cpu()
    batch, heads = query.shape[:2]
    k, v = (torch.cat([x.double().cpu().expand(batch, -1, -1, -1) for x in xs], 2) for xs in (keys, values))
    result = torch.empty(query.shape, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        own = h // (heads // k.shape[1])
        row = k[b, own] @ query[b, h, 0] * scaling
        if mask is not None:
            row = row + mask.double().cpu()[b if len(mask) > 1 else 0, 0, 0]
        result[b, h, 0] = row.softmax(0) @ v[b, own]
    return result


LAYOUTS: dict[str, Callable[..., Made]] = {
    "zero": lambda *shape: per_token("zero", *shape),
    "zero, groups": lambda *shape: per_token("zero", *shape, groups=4),
    "minimum": lambda *shape: per_token("minimum", *shape),
    "minimum, groups": lambda *shape: per_token("minimum", *shape, groups=2),
    "lloyd": lambda *shape: per_token("lloyd", *shape),
    "turned": lambda *shape: per_token("turned", *shape),
    "bare": lambda *shape: per_token("bare", *shape),
}


# The two products -----------------------------------------------------------------------------------------------------


@every("layout", LAYOUTS)
@every("bits", [2, 3, 4, 5, 8])
@every(("batch", "heads", "share", "n", "size"), [(1, 2, 1, 5, 16), (3, 1, 4, 33, 32), (2, 2, 3, 0, 16)])
def test_products_with_codes_are_products_with_the_numbers(layout, bits, batch, heads, share, n, size):
    made, query = LAYOUTS[layout](bits, batch, heads, n, size), queries(batch, heads * share, size)
    rows = torch.rand(batch, heads * share, 1, n, generator=generator(5)).to(DEVICE)
    x = made.numbers.repeat_interleave(share, 1)
    assert_close(scores(query, made.codes).double().cpu(), query.double().cpu() @ x.transpose(2, 3), **CLOSE)
    assert_close(output(rows, made.codes, size).double().cpu(), rows.double().cpu() @ x, **CLOSE)


@every("bits", [2, 3, 4, 8])
@every(("blocks", "block"), [(1, 8), (3, 32), (2, 12), (0, 32)])
def test_products_with_blocks_of_tokens_are_products_with_the_numbers(bits, blocks, block):
    made, query = per_block(bits, 2, 2, blocks, 16, block), queries(2, 6, 16)
    x = made.numbers.repeat_interleave(3, 1)
    assert_close(scores(query, made.codes).double().cpu(), query.double().cpu() @ x.transpose(2, 3), **CLOSE)


# Attention ------------------------------------------------------------------------------------------------------------


def check(kernel: bool, query: Tensor, keys: list, values: list, mask: Tensor | None = None, **close: float) -> None:
    """`attend` over [prefix | codes | tail] (each may be None) is attention over their numbers."""
    sides = [Side(x[0], None if x[1] is None else x[1].codes, x[2]) for x in (keys, values)]
    plain = [[x.numbers if isinstance(x, Made) else x for x in side if x is not None] for side in (keys, values)]
    scaling = query.shape[-1] ** -0.5
    assert not kernel or all(known(side, query.shape[-1]) for side in sides)
    got = attend(query, *sides, scaling, mask, kernel=kernel)
    assert got.dtype == query.dtype
    assert got.shape == query.shape
    expected = truth(query, *plain, scaling, mask)
    assert_close(got.double().cpu(), expected, **(close or CLOSE))


@pytest.mark.parametrize("kernel", KERNELS)
@every("layout", LAYOUTS)
@every("bits", [2, 3, 4, 8])
def test_attention_from_codes_is_attention_from_their_numbers(kernel, layout, bits):
    keys, values = (LAYOUTS[layout](bits, 1, 2, 70, 32) for _ in "kv")
    check(kernel, queries(1, 4, 32), [None, keys, None], [None, values, None])


@pytest.mark.parametrize("kernel", KERNELS)
@every("share", [1, 3, 4])
@every("n", [1, 63, 64, 65, 200])
def test_any_number_of_tokens_and_shared_heads(kernel, share, n):
    keys, values = (per_token("zero", 4, 3, 2, n, 32, seed=seed) for seed in (1, 2))
    check(kernel, queries(3, 2 * share, 32), [None, keys, None], [None, values, None])


@pytest.mark.parametrize("kernel", KERNELS)
@every("bits", [2, 3, 4, 8])
@every(("size", "blocks", "block", "values", "tokens"), [
    (16, 1, 32, 8, 40), (32, 4, 32, 64, 140), (64, 2, 128, 150, 300), (128, 6, 8, 0, 49), (16, 0, 32, 0, 5),
])  # fmt: skip
def test_kivi_reads_a_prefix_codes_and_a_tail_that_keys_and_values_end_differently(
    kernel, bits, size, blocks, block, values, tokens
):
    prefix = [exact(1, 2, 5, size, seed) for seed in (1, 2)]
    k, v = per_block(bits, 2, 2, blocks, size, block), per_token("minimum", bits, 2, 2, values, size, groups=2)
    tails = [exact(2, 2, tokens - n, size, seed) for n, seed in ((blocks * block, 3), (values, 4))]
    check(kernel, queries(2, 6, size), [prefix[0], k, tails[0]], [prefix[1], v, tails[1]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_in_a_rotated_basis_are_turned_back_beside_exact_ones(kernel):
    keys, values = (per_token("turned", 3, 2, 2, 130, 64, seed=seed) for seed in (1, 2))
    prefix = [exact(1, 2, 70, 64, seed) for seed in (3, 4)]
    check(kernel, queries(2, 4, 64), [prefix[0], keys, None], [prefix[1], values, None])
    check(kernel, queries(2, 4, 64), [prefix[0], keys, None], [prefix[1], per_token("bare", 8, 2, 2, 130, 64), None])


@pytest.mark.parametrize("kernel", KERNELS)
@every("size", [24, 40, 80, 96])
@every("bits", [2, 3, 4, 8])
def test_heads_that_are_no_power_of_two(kernel, size, bits):
    keys = per_block(bits, 1, 2, 2, size, 32)
    check(kernel, queries(1, 2, size), [None, keys, None], [None, per_token("minimum", bits, 1, 2, 64, size), None])
    groups = per_token("zero", bits, 1, 2, 64, size, groups=size // 8)
    check(kernel, queries(1, 2, size), [None, groups, None], [None, groups, None])


@pytest.mark.parametrize("kernel", KERNELS)
@every("rows", [1, 2])
@every("boolean", [False, True])
def test_what_the_mask_hides_is_not_seen(kernel, rows, boolean):
    keys, values = (per_token("zero", 4, 2, 2, 100, 16, seed=seed) for seed in (1, 2))
    prefix = exact(1, 2, 3, 16, 5)
    seen = torch.ones(rows, 1, 1, 103, dtype=torch.bool)
    seen[0, ..., 3:90] = False  # more than a tile
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    sides = [Side(prefix, keys.codes), Side(prefix, values.codes)]
    query = queries(2, 4, 16)
    got = attend(query, *sides, 0.25, (seen if boolean else added).to(DEVICE), kernel=kernel)
    expected = truth(query, [prefix, keys.numbers], [prefix, values.numbers], 0.25, added)
    assert_close(got.double().cpu(), expected, **CLOSE)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("kernel", KERNELS)
@every(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@every("layout", ["zero", "turned"])
def test_half_precision_queries(kernel, dtype, error, layout):
    keys, values = LAYOUTS[layout](4, 2, 2, 150, 64), LAYOUTS[layout](4, 2, 2, 150, 64)
    prefix = exact(1, 2, 4, 64, 1, dtype)
    check(
        kernel, queries(2, 4, 64, dtype), [prefix, keys, None], [prefix, values, None],
        rtol=0, atol=error * float(values.numbers.abs().max()),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_and_expanded_parts(kernel):
    """Views into a larger store, tokens in front of heads, and one grid for all tokens, as static ranges have it."""
    made = per_token("zero", 4, 2, 3, 77, 32)
    room = torch.zeros(2, 90, 3, 16, dtype=torch.uint8, device=DEVICE)
    room[:, 7:84] = made.codes.codes.transpose(1, 2)
    scale, zero = (x[:, :1, :1].expand(-1, 3, 77, -1) for x in (made.codes.scale, made.codes.zero_point))
    codes = replace(made.codes, codes=room[:, 7:84].transpose(1, 2), scale=scale, zero_point=zero)
    packed = made.codes.codes.cpu()
    plain = torch.stack([packed & 15, packed >> 4], -1).flatten(3).double()
    numbers = (plain - zero.double().cpu()) * scale.double().cpu()
    tail = exact(2, 10, 3, 32, 4)[:, 2:7].transpose(1, 2)
    query = queries(2, 6, 64)[..., ::2]
    check(kernel, query, [None, Made(codes, numbers), tail], [None, Made(codes, numbers), tail])


@needs_triton
@pytest.mark.parametrize("layout", ["lloyd", "zero"])
def test_the_kernel_gives_the_same_bits_every_time_and_to_every_row(layout):
    keys, values = LAYOUTS[layout](3, 1, 2, 300, 32), LAYOUTS[layout](3, 1, 2, 300, 32)
    query = queries(1, 4, 32)
    once, again = (attend(query, Side(codes=keys.codes), Side(codes=values.codes), 0.2, kernel=True) for _ in "ab")
    assert torch.equal(once, again)


def test_what_the_kernel_cannot_do_is_left_to_torch():
    assert known(Side(exact(1, 1, 2, 16, 0)), 16)
    assert not known(Side(codes=per_token("zero", 5, 1, 1, 3, 16).codes), 16)
    assert not known(Side(codes=per_token("zero", 4, 1, 1, 3, 48, groups=4).codes), 48)  # groups of 12
    assert not known(Side(codes=per_block(4, 1, 1, 1, 16, 12).codes), 16)


# Without a GPU --------------------------------------------------------------------------------------------------------


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    shared = compiled_for(90, "compiled_kv.py", tmp_path)
    assert len(shared) == 3
    assert max(shared) <= 99 * 1024  # what the smallest GPUs of today have
