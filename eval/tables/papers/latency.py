"""LUT-GEMM's latencies on qllm's page: one row of x times packed weights, beside cuBLAS over half precision."""

from eval.tables.declared import Measure, Method, Paper, Row

__all__ = ["SPEEDUP", "TABLES"]

PRODUCTS = {"cuBLAS": "cuBLAS", "W3": "GPTQ, 3 bits", "LUT4": "LUT-GEMM, 4 bits", "LUT3": "LUT-GEMM, 3 bits"}
MILLISECONDS = tuple(
    Measure(f"{told}, ms", "latency", metric=f"{name} ms", digits=5) for name, told in PRODUCTS.items()
)
SPEEDUPS = tuple(
    Measure(f"{told}, speed-up", "latency", metric=f"{name} speedup", better="higher")
    for name, told in PRODUCTS.items()
    if name != "cuBLAS"
)
# n and k, milliseconds of the four, speed-ups of the last three over cuBLAS.
PUBLISHED = (
    (512, 2048, "0.02314 0.02518 0.02419 0.02316 0.92 0.96 1.00"),
    (1024, 4096, "0.02598 0.02457 0.02547 0.02381 1.06 1.02 1.09"),
    (2048, 8192, "0.03563 0.03300 0.03870 0.03539 1.08 0.92 1.01"),
    (4096, 16384, "0.10519 0.05907 0.07507 0.06074 1.78 1.40 1.73"),
    (7168, 28672, "0.27271 0.19261 0.14639 0.12277 1.42 1.86 2.22"),
    (8192, 32768, "0.35090 0.21446 0.17513 0.14435 1.64 2.00 2.43"),
    (12288, 49152, "0.75941 0.44852 0.36207 0.29390 1.69 2.10 2.58"),
)

# The last three by n and k.
SPEEDUP = {(n, k): tuple(map(float, figures.split()[-3:])) for n, k, figures in PUBLISHED}


def _row(n: int, k: int, figures: str) -> Row:
    method = Method(f"{n}x{k}", options=("--shapes", f"{n}x{k}"))
    return Row(f"{n} × {k}", method, published={"": tuple(map(float, figures.split()))})


PROTOCOL = "medians of replayed CUDA graphs, weights that no cache holds; n inputs, k outputs, as in the page's program"
NOTES = (
    "the page does not name its GPU: milliseconds do not compare, a card's speed-up over its own cuBLAS does",
    "GPTQ: the page's kernel at 3 bits, ours the product of uniform grids at 3 bits",
    "the page's times of the smallest shapes are those of launching a kernel, which replayed graphs leave out",
)

TABLES = (
    Paper(
        "lutgemm-latency", "LUT-GEMM", "latency of one row of x times a matrix, groups of 128",
        "qllm, LUT-GEMM, Kernel Latency", PROTOCOL, (), (*MILLISECONDS, *SPEEDUPS),
        tuple(_row(*line) for line in PUBLISHED), NOTES,
    ),
)  # fmt: skip
