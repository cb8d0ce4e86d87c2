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

__all__ = ["dequantize_kernel", "few_rows_kernel", "some_rows_kernel", "sum_kernel"]


@triton.jit
def _words(words, unit, n, N, BITS: tl.constexpr):
    """The words of some units and outputs: (units, outputs) int32 each. Of 3 bits a fourth one, of the codes 30, 31."""
    at = words + (unit * BITS).to(tl.int64)[:, None] * N + n[None, :]
    found = ()
    for i in tl.static_range(BITS):
        found += (tl.load(at + i * N),)
    if BITS == 3:
        found += (((found[0] >> 30) & 3) | ((found[1] >> 28) & 12) | ((found[2] >> 26) & 48),)
    return found


@triton.jit
def _field(word, BIT: tl.constexpr, BITS: tl.constexpr):
    """The bits of the codes that start at BIT, alone; those above the mantissa of a float32 come 16 bits down."""
    if BIT + BITS > 23:
        word = word >> 16
        word = word & ((2**BITS - 1) << (BIT - 16))
    else:
        word = word & ((2**BITS - 1) << BIT)
    return word


@triton.jit
def _code(word, BIT: tl.constexpr, BITS: tl.constexpr, exponent):
    """The codes that start at BIT, float32. exponent: 127 << 23, which is not known when this is compiled: two known
    numbers would cost two operations.

    In the mantissa of 2^(23−j) a code at bit j makes 2^(23−j) + c.
    """
    J: tl.constexpr = BIT - 16 if BIT + BITS > 23 else BIT
    number = _field(word, BIT, BITS) | (exponent + ((23 - J) << 23))
    return number.to(tl.float32, bitcast=True) - 2.0 ** (23 - J)


@triton.jit
def _scaled(x, BIT: tl.constexpr, BITS: tl.constexpr):
    """x·2^(89−j), j where `_field` has the codes that start at BIT."""
    J: tl.constexpr = BIT - 16 if BIT + BITS > 23 else BIT
    return x * 2.0 ** (89 - J)


@triton.jit
def _four(x, seen):
    """Four neighbours from x on, of any float dtype, as float32; zeros where nothing is seen."""
    if x.dtype.element_ty == tl.float32:
        return (
            tl.load(x, mask=seen, other=0.0),
            tl.load(x + 1, mask=seen, other=0.0),
            tl.load(x + 2, mask=seen, other=0.0),
            tl.load(x + 3, mask=seen, other=0.0),
        )
    both = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True), mask=seen, other=0)
    low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
    if x.dtype.element_ty == tl.bfloat16:
        return (
            (low << 16).to(tl.float32, bitcast=True),
            (low & -65536).to(tl.float32, bitcast=True),
            (high << 16).to(tl.float32, bitcast=True),
            (high & -65536).to(tl.float32, bitcast=True),
        )
    return (
        low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
    )


@triton.jit
def _two(x, seen):
    """Two neighbours from x on, float32; zeros where nothing is seen."""
    both = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True), mask=seen, other=0)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def scale_kernel(x, scaled, sums, size, BITS: tl.constexpr, UNITS: tl.constexpr):
    """scaled = x·2^(89−j), j where the code of the channel lies, and the sums of x over units; float32 both.

    x, scaled: (size, 32). sums: (size,).
    """
    unit, place = tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.arange(0, 32)
    at = unit.to(tl.int64)[:, None] * 32 + place[None, :]
    there = unit < size
    values = tl.load(x + at, mask=there[:, None], other=0.0).to(tl.float32)
    bit = BITS * (place % (32 // BITS))
    power = 89 - tl.where(bit + BITS > 23, bit - 16, bit)
    tl.store(scaled + at, values * ((power + 127) << 23).to(tl.float32, bitcast=True)[None, :], mask=there[:, None])
    tl.store(sums + unit, tl.sum(values, 1), mask=there)


@triton.jit
def _grid(scale, zero, unit, n, N, PER: tl.constexpr, ZERO: tl.constexpr):
    """Scales and zero points of some units and outputs, float32: (units, outputs) each; a constant one is a number."""
    at = (unit // PER).to(tl.int64)[:, None] * N + n[None, :]
    s = tl.load(scale + at).to(tl.float32)
    z = tl.load(zero + at).to(tl.float32) if ZERO is None else tl.full(s.shape, ZERO, tl.float32)
    return s, z


@triton.jit(do_not_specialize=["units"])
def few_rows_kernel(
    x, words, scale, zero, bias, y, units, N, OUT,
    ROWS: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (ROWS, OUT) = x Ŵᵀ + b, on CUDA cores; a program takes OUTPUTS · TILES outputs.

    x: (ROWS, 32·units). words: (units, BITS, N) int32. scale, zero: (units/PER, N). UNITS: that are read at a time.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * (OUTPUTS * TILES) + tl.arange(0, OUTPUTS)
    channels = units * 32
    total = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
    for start in tl.range(0, units, UNITS, num_stages=STAGES):
        row = start + tl.arange(0, UNITS)
        seen, unit = row < units, tl.minimum(row, units - 1)
        tiles = ()
        for t in tl.static_range(TILES):
            tiles += (_words(words, unit, n + t * OUTPUTS, N, BITS),)
        product = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
        sums = (tl.zeros((UNITS,), tl.float32),) * ROWS
        for p in tl.static_range(0, 32, 4):
            inputs = ()
            for m in tl.static_range(ROWS):
                inputs += (_four(x + m * channels + unit * 32 + p, seen),)
            for i in tl.static_range(4):
                scaled, more = (), ()
                for m in tl.static_range(ROWS):
                    scaled += (_scaled(inputs[m][i], BITS * ((p + i) % PER_WORD), BITS)[:, None],)
                    more += (sums[m] + inputs[m][i],)
                sums, more = more, ()
                for t in tl.static_range(TILES):
                    field = _field(tiles[t][(p + i) // PER_WORD], BITS * ((p + i) % PER_WORD), BITS)
                    for m in tl.static_range(ROWS):
                        more += (tl.fma(field.to(tl.float32, bitcast=True), scaled[m], product[t * ROWS + m]),)
                product = more
        more = ()
        for t in tl.static_range(TILES):
            s, z = _grid(scale, zero, unit, n + t * OUTPUTS, N, PER, ZERO)
            for m in tl.static_range(ROWS):
                centred = tl.fma(product[t * ROWS + m], 2.0**60, -z * sums[m][:, None])
                more += (tl.fma(s, centred, total[t * ROWS + m]),)
        total = more
    for t in tl.static_range(TILES):
        out = n + t * OUTPUTS
        for m in tl.static_range(ROWS):
            result = tl.sum(total[t * ROWS + m], 0)
            if bias is not None:
                result += tl.load(bias + out, mask=out < OUT, other=0.0).to(tl.float32)
            tl.store(y + m * OUT + out, result.to(y.dtype.element_ty), mask=out < OUT)


@triton.jit(do_not_specialize=["units"])
def scaled_rows_kernel(
    x, unit_sums, words, scale, zero, bias, y, units, N, OUT,
    ROWS: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`few_rows_kernel` of what `scale_kernel` makes: x (ROWS, 32·units), unit_sums (ROWS, units), float32.

    x: (ROWS, 32·units). words: (units, BITS, N) int32. scale, zero: (units/PER, N). UNITS: that are read at a time.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * (OUTPUTS * TILES) + tl.arange(0, OUTPUTS)
    channels = units * 32
    total = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
    for start in tl.range(0, units, UNITS, num_stages=STAGES):
        row = start + tl.arange(0, UNITS)
        seen, unit = row < units, tl.minimum(row, units - 1)
        tiles = ()
        for t in tl.static_range(TILES):
            tiles += (_words(words, unit, n + t * OUTPUTS, N, BITS),)
        product = (tl.zeros((UNITS, OUTPUTS), tl.float32),) * (ROWS * TILES)
        sums = ()
        for m in tl.static_range(ROWS):
            sums += (tl.load(unit_sums + m * units + unit, mask=seen, other=0.0),)
        for p in tl.static_range(0, 32, 2):
            inputs = ()
            for m in tl.static_range(ROWS):
                inputs += (_two(x + m * channels + unit * 32 + p, seen),)
            for i in tl.static_range(2):
                more = ()
                for t in tl.static_range(TILES):
                    field = _field(tiles[t][(p + i) // PER_WORD], BITS * ((p + i) % PER_WORD), BITS)
                    for m in tl.static_range(ROWS):
                        more += (
                            tl.fma(field.to(tl.float32, bitcast=True), inputs[m][i][:, None], product[t * ROWS + m]),
                        )
                product = more
        more = ()
        for t in tl.static_range(TILES):
            s, z = _grid(scale, zero, unit, n + t * OUTPUTS, N, PER, ZERO)
            for m in tl.static_range(ROWS):
                centred = tl.fma(product[t * ROWS + m], 2.0**60, -z * sums[m][:, None])
                more += (tl.fma(s, centred, total[t * ROWS + m]),)
        total = more
    for t in tl.static_range(TILES):
        out = n + t * OUTPUTS
        for m in tl.static_range(ROWS):
            result = tl.sum(total[t * ROWS + m], 0)
            if bias is not None:
                result += tl.load(bias + out, mask=out < OUT, other=0.0).to(tl.float32)
            tl.store(y + m * OUT + out, result.to(y.dtype.element_ty), mask=out < OUT)


@triton.jit(do_not_specialize=["units", "rows", "per_split", "exponent"])
def some_rows_kernel(
    x, words, scale, zero, parts, rows, units, N, OUT, per_split, exponent,
    BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts (splits, rows, OUT) float32: x Ŵᵀ over per_split units each, on tensor cores.

    Four neighbouring codes of UNITS units, dequantized in the dtype of x, make one product.
    """
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    there = m < rows
    k = tl.arange(0, UNITS * 4)  # channels of a product: four of every unit
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    PER_WORD: tl.constexpr = 32 // BITS
    last = tl.minimum((split + 1) * per_split, units)
    for start in tl.range(split * per_split, last, UNITS, num_stages=STAGES):
        unit = tl.minimum(start + tl.arange(0, UNITS), units - 1)
        s, z = _grid(scale, zero, unit, n, N, PER, ZERO)
        shift = tl.trans(-z * s)
        s = tl.trans(s)
        words_found = _words(words, unit, n, N, BITS)
        found = ()
        for i in tl.static_range(len(words_found)):
            found += (tl.trans(words_found[i]),)
        unit_of = start + k // 4
        seen = there[None, :] & (unit_of < last)[:, None]
        at = x + m.to(tl.int64)[None, :] * (units * 32) + (tl.minimum(unit_of, units - 1) * 32 + k % 4)[:, None]
        for p in tl.static_range(0, 32, 4):
            four = ()
            for i in tl.static_range(4):
                code = _code(found[(p + i) // PER_WORD], BITS * ((p + i) % PER_WORD), BITS, exponent)
                four += (tl.fma(code, s, shift).to(x.dtype.element_ty),)
            w = tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))
            inputs = tl.load(at + p, mask=seen, other=0.0)
            total = tl.dot(tl.reshape(w, (OUTPUTS, UNITS * 4)), inputs, total, input_precision=PRECISION)
    at = (split * rows + m).to(tl.int64)[None, :] * OUT + n[:, None]
    tl.store(parts + at, total, mask=there[None, :] & (n < OUT)[:, None])


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(parts, bias, y, splits, size, OUT, BLOCK: tl.constexpr):
    """y = Σ parts + b over the splits, in their order: parts (splits, size) float32, size = rows · OUT."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size + i, mask=i < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + i % OUT, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["exponent"])
def dequantize_kernel(
    words, scale, zero, dense, N, exponent,
    BITS: tl.constexpr, PER: tl.constexpr, ZERO: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """dense (32·units, N) = Ŵᵀ, s·(c − z) in float32, rounded once: a program takes OUTPUTS outputs of a unit."""
    PER_WORD: tl.constexpr = 32 // BITS
    unit = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    s, z = _grid(scale, zero, unit, n, N, PER, ZERO)
    shift = -z * s
    found = _words(words, unit, n, N, BITS)
    at = dense + (unit * 32).to(tl.int64)[:, None] * N + n[None, :]
    for p in tl.static_range(32):
        w = tl.fma(_code(found[p // PER_WORD], BITS * (p % PER_WORD), BITS, exponent), s, shift)
        tl.store(at + p * N, w.to(dense.dtype.element_ty))
