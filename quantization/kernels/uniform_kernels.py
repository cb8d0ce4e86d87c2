"""Triton kernels that multiply by uniform codes: one or a few rows, some rows on tensor cores, and the matrix alone.

    y_n = Σ_g s_gn (Σ_(k∈g) c_kn x_k − z_gn Σ_(k∈g) x_k)

For few rows a code becomes a number without a conversion. The bits of a code c that start at bit j of a word are, all
others masked, the float32 number c·2^(j−149), exactly: a subnormal one, which GPUs multiply as fast as any. Its product
with x·2^(89−j) is c·x·2^(−60). So a weight costs a logical operation and a fused multiply-add, and a shift where codes
lie above the mantissa. Inputs up to 2^38 are multiplied without overflow. Sums are float32, in a fixed order: a call
gives the same bits every time.
"""

import triton
import triton.language as tl

__all__ = ["dequantize_kernel", "few_rows_kernel", "scale_kernel", "some_rows_kernel", "sum_kernel", "turn_kernel"]


@triton.jit
def _words(words, unit, n, N, BITS: tl.constexpr):
    """The words of some units and outputs: BITS times (units, outputs) int32."""
    at = words + (unit * BITS).to(tl.int64)[:, None] * N + n[None, :]
    found = ()
    for i in tl.static_range(BITS):
        found += (tl.load(at + i * N),)
    return found


@triton.jit
def _field(words, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The bits of the codes at a place of their units, alone in a word: where they are, 16 bits down if they lie above
    the mantissa of a float32, or from bit 0 on if they lie in two words."""
    WORD: tl.constexpr = BITS * PLACE // 32
    BIT: tl.constexpr = BITS * PLACE % 32
    if BIT + BITS > 32:
        field = (words[WORD].to(tl.uint32) >> BIT).to(tl.int32) | (words[WORD + 1] << (32 - BIT))
        field = field & (2**BITS - 1)
    elif BIT + BITS > 23:
        field = (words[WORD] >> 16) & ((2**BITS - 1) << (BIT - 16))
    else:
        field = words[WORD] & ((2**BITS - 1) << BIT)
    return field


@triton.jit
def _power(PLACE: tl.constexpr, BITS: tl.constexpr, OF: tl.constexpr):
    """2^(OF − j), j the bit where `_field` has the codes of a place."""
    BIT: tl.constexpr = BITS * PLACE % 32
    if BIT + BITS > 32:
        power: tl.constexpr = 2.0**OF
    elif BIT + BITS > 23:
        power: tl.constexpr = 2.0 ** (OF + 16 - BIT)
    else:
        power: tl.constexpr = 2.0 ** (OF - BIT)
    return power


@triton.jit
def _pair(words, seen):
    both = tl.load(words) if seen is None else tl.load(words, mask=seen, other=0)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def _four(x, seen):
    """Four neighbours from x on, of any float dtype, as float32, loaded as words of 64 bits; zeros where nothing is
    seen."""
    words = x.to(tl.pointer_type(tl.int64), bitcast=True)
    a, b = _pair(words, seen)
    if x.dtype.element_ty == tl.float16:
        found = (_half(a), _half(a >> 16), _half(b), _half(b >> 16))
    elif x.dtype.element_ty == tl.bfloat16:
        found = (_float(a << 16), _float(a & -65536), _float(b << 16), _float(b & -65536))
    else:
        c, d = _pair(words + 1, seen)
        found = (_float(a), _float(b), _float(c), _float(d))
    return found


@triton.jit
def _float(word):
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _half(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["units", "filled"])
def scale_kernel(x, scaled, sums, units, filled, BITS: tl.constexpr, UNITS: tl.constexpr):
    """scaled = x·2^(89−j), j where `_field` has the code of a channel, and sums = 2^(−60) Σ x of units; float32 both.

    x: (rows, units, 32). scaled: (rows, filled, 32), sums: (rows, filled), with zeros behind. A program takes UNITS
    units of a row.
    """
    m, unit, place = tl.program_id(1), tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.arange(0, 32)
    at = (m * units + unit).to(tl.int64)[:, None] * 32 + place[None, :]
    values = tl.load(x + at, mask=(unit < units)[:, None], other=0.0).to(tl.float32)
    bit = BITS * place % 32
    j = tl.where(bit + BITS > 32, 0, tl.where(bit + BITS > 23, bit - 16, bit))
    values_scaled = values * ((216 - j) << 23).to(tl.float32, bitcast=True)[None, :]
    to = m * filled + unit
    tl.store(scaled + to.to(tl.int64)[:, None] * 32 + place[None, :], values_scaled, mask=(unit < filled)[:, None])
    tl.store(sums + to, tl.sum(values, 1) * 2.0**-60, mask=unit < filled)


@triton.jit
def _grid(scale, zero, unit, n, N, PER: tl.constexpr, ZERO: tl.constexpr):
    """Scales and zero points of some units and outputs, float32: (units, outputs) each; a constant one is a number."""
    at = (unit // PER).to(tl.int64)[:, None] * N + n[None, :]
    s = tl.load(scale + at).to(tl.float32)
    z = tl.load(zero + at).to(tl.float32) if ZERO is None else tl.full(s.shape, ZERO, tl.float32)
    return s, z


@triton.jit(do_not_specialize=["units", "filled", "per_split"])
def few_rows_kernel(
    x, unit_sums, words, scale, zero, bias, y, units, filled, per_split, N, OUT,
    ROWS: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """y (ROWS, OUT) = x Ŵᵀ + b, on CUDA cores; a program takes OUTPUTS · TILES outputs.

    x: (ROWS, units, 32), or what `scale_kernel` makes of it, with unit_sums and filled units a row. words: (units,
    BITS, N) int32. scale, zero: (units/PER, N). UNITS: that are read at a time; AHEAD: while those before are
    multiplied.
    SPLIT: y (splits, ROWS, OUT) is 2^(−60) x Ŵᵀ over per_split units each, float32, for `sum_kernel`.
    """
    n = tl.program_id(0) * (OUTPUTS * TILES) + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, units)
    total = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
    following = ()
    if AHEAD:
        for t in tl.static_range(TILES):
            following += (_words(words, tl.minimum(first + tl.arange(0, UNITS), units - 1), n + t * OUTPUTS, N, BITS),)
    for start in tl.range(first, last, UNITS, num_stages=STAGES):
        row = start + tl.arange(0, UNITS)
        # Scaled inputs have zeros behind and need no mask. With one, ptxas keeps more of the loads ahead (80 registers,
        # not 64): one row of 49152 x 12288 took 5 to 17 % less, relative to the dense product, on an H200.
        MASKED: tl.constexpr = unit_sums is None or (AHEAD and not SPLIT)
        seen, unit = (row < last) if MASKED else None, tl.minimum(row, units - 1)
        tiles, more = following, ()
        for t in tl.static_range(TILES):
            of = tl.minimum(row + UNITS, units - 1) if AHEAD else unit
            more += (_words(words, of, n + t * OUTPUTS, N, BITS),)
        if AHEAD:
            following = more
        else:
            tiles = more
        product = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
        sums = ()
        for m in tl.static_range(ROWS):
            if unit_sums is None:
                sums += (tl.zeros((UNITS,), tl.float32),)
            else:
                sums += (tl.load(unit_sums + m * filled + row),)
        for p in tl.static_range(0, 32, 4):
            inputs = ()
            for m in tl.static_range(ROWS):
                inputs += (_four(x + (m * filled + (unit if unit_sums is None else row)) * 32 + p, seen),)
            for i in tl.static_range(4):
                scaled, more = (), ()
                for m in tl.static_range(ROWS):
                    if unit_sums is None:
                        scaled += ((inputs[m][i] * _power(p + i, BITS, 89))[:, None],)
                        more += (sums[m] + inputs[m][i],)
                    else:
                        scaled += (inputs[m][i][:, None],)
                        more += (sums[m],)
                sums, more = more, ()
                for t in tl.static_range(TILES):
                    field = _field(tiles[t], p + i, BITS).to(tl.float32, bitcast=True)
                    for m in tl.static_range(ROWS):
                        more += (tl.fma(field, scaled[m], product[t * ROWS + m]),)
                product = more
        more = ()
        for t in tl.static_range(TILES):
            s, z = _grid(scale, zero, unit, n + t * OUTPUTS, N, PER, ZERO)
            for m in tl.static_range(ROWS):
                small = -sums[m] if unit_sums is not None else sums[m] * -(2.0**-60)
                more += (tl.fma(s, tl.fma(z, small[:, None], product[t * ROWS + m]), total[t * ROWS + m]),)
        total = more
    for t in tl.static_range(TILES):
        out = n + t * OUTPUTS
        for m in tl.static_range(ROWS):
            result = tl.sum(total[t * ROWS + m], 0)
            if SPLIT:
                tl.store(y + (tl.program_id(1) * ROWS + m) * OUT + out, result, mask=out < OUT)
            else:
                result = result * 2.0**60
                if bias is not None:
                    result += tl.load(bias + out, mask=out < OUT, other=0.0).to(tl.float32)
                tl.store(y + m * OUT + out, result.to(y.dtype.element_ty), mask=out < OUT)


@triton.jit(do_not_specialize=["rows", "units", "filled"])
def turn_kernel(x, turned, rows, units, filled, UNITS: tl.constexpr):
    """turned (…, 32, filled) = x (rows, units, 32), with zeros behind; a program takes UNITS units of a row."""
    m, unit, place = tl.program_id(1), tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.arange(0, 32)
    there = unit < tl.where(m < rows, units, 0)
    values = tl.load(x + (m * units + unit)[:, None] * 32 + place[None, :], mask=there[:, None], other=0.0)
    tl.store(turned + (m * 32 + place)[None, :] * filled + unit[:, None], values, mask=(unit < filled)[:, None])


@triton.jit(do_not_specialize=["units", "rows", "per_split"])
def some_rows_kernel(
    x, words, scale, zero, parts, rows, units, filled, N, OUT, per_split,
    BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """parts (splits, rows, OUT) float32: 2^(−60) x Ŵᵀ over per_split · UNITS units each, on tensor cores.

    x: what `turn_kernel` makes, (ROWS, 32, filled). Every place of a code in its unit is one product of UNITS units:
    codes dequantized in the dtype of x, times 2^(−60) where that has the exponents of float32.
    """
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    split = tl.program_id(1)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    last = tl.minimum((split + 1) * per_split, filled // UNITS)
    for step in tl.range(split * per_split, last, num_stages=STAGES):
        row = step * UNITS + tl.arange(0, UNITS)
        unit = tl.minimum(row, units - 1)
        s, z = _grid(scale, zero, unit, n, N, PER, ZERO)
        shift = -z * s * (1.0 if HALF else 2.0**-60)
        found = _words(words, unit, n, N, BITS)
        at = x + m[:, None] * (32 * filled) + row[None, :]
        for p in tl.static_range(32):
            if ALIGNED and BITS * p % 32 + BITS <= 32:
                field = (found[BITS * p // 32] >> (BITS * p % 32)) & (2**BITS - 1)
                power = s * (2.0**23 if HALF else 2.0**89)
            else:
                field = _field(found, p, BITS)
                power = s * _power(p, BITS, 23 if HALF else 89)
            number = field.to(tl.float32, bitcast=True)
            if HALF:
                number = number * 2.0**126
            w = tl.fma(number, power, shift)
            total = tl.dot(tl.load(at + p * filled), w.to(x.dtype.element_ty), total, input_precision=PRECISION)
    at = (split * rows + m).to(tl.int64)[:, None] * OUT + n[None, :]
    tl.store(parts + at, total * (2.0**-60 if HALF else 1.0), mask=(m < rows)[:, None] & (n < OUT)[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(parts, bias, y, splits, size, OUT, BLOCK: tl.constexpr):
    """y = 2^60 Σ parts + b over the splits, in their order: parts (splits, size) float32, size = rows · OUT."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size + i, mask=i < size, other=0.0)
    total *= 2.0**60
    if bias is not None:
        total += tl.load(bias + i % OUT, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


@triton.jit
def dequantize_kernel(
    words, scale, zero, dense, N,
    BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """dense (32·units, N) = Ŵᵀ, s·c − s·z in float32, rounded once: a program takes OUTPUTS outputs of a unit."""
    unit = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    s, z = _grid(scale, zero, unit, n, N, PER, ZERO)
    found, shift = _words(words, unit, n, N, BITS), -z * s
    at = dense + (unit * 32).to(tl.int64)[:, None] * N + n[None, :]
    for p in tl.static_range(32):
        field = _field(found, p, BITS).to(tl.float32, bitcast=True) * 2.0**126  # c·2^(j−23)
        w = tl.fma(field, s * _power(p, BITS, 23), shift)
        tl.store(at + p * N, w.to(dense.dtype.element_ty))
