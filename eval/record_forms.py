"""What the record of every task must hold for those who read it, as forms for `corpora.json_files`.

A form names only what tables, figures and programs read. Records of before that hold it stay readable.
"""

import math
from collections.abc import Mapping
from itertools import product
from statistics import fmean
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.json_files import Count

__all__ = ["Head", "NeedleResult", "Reference", "Said", "disagreement", "form_of"]


class Head(TypedDict):
    """What every record holds. sha256: of all the rest; records of before have none."""

    format: int
    task: str
    identity: str
    settings: dict[str, Any]
    started: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")]
    environment: dict[str, Any]
    sha256: NotRequired[str]


class _Part(TypedDict):
    kind: str


class _Grid(TypedDict):
    bits: int
    group_size: int


class _Gridded(_Part):
    grid: _Grid


class _Activations(_Gridded):
    static: bool


class _Text(TypedDict):
    corpus: str
    samples: int
    length: int
    seed: int


class _Seeded(TypedDict):
    seed: int


class _Recipe(TypedDict, total=False):
    transforms: list[_Part] | None
    weights: _Gridded | None
    activations: _Activations | None
    attention: _Gridded | None
    tuning: _Part | None
    calibration: _Text | None


class _MadeOf(TypedDict):
    source: str
    calibration: NotRequired[_Seeded | None]
    segments: NotRequired[str | None]


class _Policy(_Part):
    bits: float


class _KVMadeOf(TypedDict):
    """What identifies an artefact of a KV policy's tensors."""

    text: dict[str, Any]
    calibration: _Seeded


class _Prefix(TypedDict):
    label: str
    ids: list[int] | None
    file: str | None
    intact: bool


class _Settings(TypedDict):
    model: str
    weights: str
    made_of: _MadeOf
    recipe: _Recipe
    kv: _Policy | None
    kv_made_of: NotRequired[_KVMadeOf]
    prefix: _Prefix
    dtype: str
    device: str


class _Cost(TypedDict, total=False):
    bits_per_weight: float | None
    seconds: float | None
    peak_memory_mb: float | None


Number = Annotated[float, Field(gt=-1e300, lt=1e300)]  # so that a mean of several is a number, too
Perplexity = Annotated[float, Field(gt=0, lt=1e300)]
Fraction = Annotated[float, Field(ge=0, le=1)]


_Bits = Annotated[list[Annotated[float, Field(gt=0, le=64)]], Field(min_length=2, max_length=2)]


class _KVCache(TypedDict):
    rounded: Fraction
    bits_per_element: _Bits
    tokens: Count


class _PplSettings(_Settings):
    corpus: str
    tokens_sha256: str
    protocol: Literal["intactkv", "gptq"]
    window: int
    limit: int | None


class _Ppl(TypedDict):
    settings: _PplSettings
    perplexity: Perplexity
    window_nll: Annotated[list[Number], Field(min_length=1)]
    windows: NotRequired[Count]
    nll: NotRequired[float]
    kv_cache: NotRequired[_KVCache]
    quantization: NotRequired[_Cost | None]


class _TaskSettings(_Settings):
    task_name: str
    protocol: Literal["hendrycks", "lm-eval"]
    fewshot: int
    data: str
    data_sha256: str
    lead: list[int]
    limit: int | None


class _Tasks(TypedDict):
    settings: _TaskSettings
    metrics: Annotated[dict[str, Number], Field(min_length=1)]
    stderr: dict[str, Number]
    samples: Count
    seconds: float
    groups: NotRequired[dict[str, Fraction]]
    rows: NotRequired[dict[str, int]]
    prompts: NotRequired[dict[str, int]]
    kv_cache: NotRequired[_KVCache]
    quantization: NotRequired[_Cost | None]


class _AnswerSettings(_Settings):
    questions: str
    questions_sha256: str
    template: str
    max_new_tokens: int
    seed: int


class _Answers(TypedDict):
    settings: _AnswerSettings
    answers: str
    answers_sha256: str
    samples: Count
    arm: NotRequired[str]
    turn_tokens: Annotated[list[float], Field(min_length=2, max_length=2)]
    stopped: dict[str, int]


class NeedleResult(TypedDict):
    """One question of a grid of needles. log_likelihood: of the key behind the prompt, in nats; quantized: what other
    records call rounded, the share of what attention read; bits_per_element: of keys and of values in packed storage
    once the prompt is held."""

    length: Count
    depth: Annotated[int, Field(ge=0, le=100)]
    key: str
    tokens: Count
    found: bool
    log_likelihood: Number
    answer: str
    quantized: Fraction
    bits_per_element: _Bits | None


class _NeedleSettings(_Settings):
    lengths: Annotated[list[Count], Field(min_length=1)]
    depths: Annotated[list[Annotated[int, Field(ge=0, le=100)]], Field(min_length=1)]
    keys: Annotated[list[str], Field(min_length=1)]
    lines: Count | None


class _Needles(TypedDict):
    settings: _NeedleSettings
    results: list[NeedleResult]
    found: Fraction
    log_likelihood: Number
    quantized: Fraction
    quantization: NotRequired[_Cost | None]


class Reference(TypedDict):
    """What the full-precision model says in the same place. first_divergence: index of the first other token of the
    answer; None if there is none."""

    answer: str
    ids: list[Count]
    first_divergence: Count | None


class Said(TypedDict):
    """One answer. dialogue: how many times the conversation began anew, from 1; prompt, fed: tokens of the rendered
    dialogue, and those of them that the model had to read; seconds_to_first: until the first token of the answer;
    quantized: of the elements behind the prefix those that the cache holds rounded, once all is said (not of what
    attention read); cache_bytes: of all it holds."""

    dialogue: Count
    user: str
    answer: str
    ids: list[Count]
    stopped: Literal["end", "length", "context", "interrupted"]
    prompt: Count
    fed: Count
    seconds: float
    seconds_to_first: float
    quantized: float
    cache_bytes: Count
    reference: NotRequired[Reference]


class _ChatSettings(_Settings):
    prompts: list[str]
    script: str
    template: str
    max_new_tokens: int
    temperature: Number


class _Chat(TypedDict):
    settings: _ChatSettings
    answers: Annotated[list[Said], Field(min_length=1)]
    seconds: float
    quantization: NotRequired[_Cost | None]


Time = Annotated[float, Field(gt=0, lt=1e300)]


class _Product(TypedDict):
    """us: microseconds of a call, the median of replayed graphs. speedup: of half precision's time over it."""

    us: Time
    speedup: Time


class _Products(TypedDict):
    out: Count
    channels: Count
    products: dict[str, _Product]


class _LatencySettings(TypedDict):
    benchmark: Literal["lutgemm"]
    shapes: Annotated[list[Annotated[list[Count], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    group: Count
    gpu: str


class _Latency(TypedDict):
    settings: _LatencySettings
    products: Annotated[list[_Products], Field(min_length=1)]


class _JudgeSettings(TypedDict):
    judge: str
    mode: Literal["single", "pair"]
    questions: str
    questions_sha256: str
    prompts_sha256: str
    references_sha256: str | None
    max_tokens: int
    answers_sha256: dict[str, str]


class _Grades(TypedDict):
    score: Number | None
    unscored: dict[str, int]
    judgements: int


class _Judged(TypedDict):
    settings: _JudgeSettings
    models: dict[str, _Grades | dict[str, dict[str, int]]]  # grades, or wins by turn


Statistic = str | float | list[int] | None  # inf and nan are words


class _Statistics(TypedDict):
    settings: dict[str, Any]
    means: dict[str, Any]
    rows: Annotated[list[dict[str, Statistic]], Field(min_length=1)]
    windows: Count
    tokens: Count


FORMS: Mapping[str, Any] = {
    "ppl": _Ppl,
    "tasks": _Tasks,
    "mtbench": _Answers,
    "judge": _Judged,
    "needle": _Needles,
    "chat": _Chat,
    "latency": _Latency,
}
# The columns that tables and figures of statistics read.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "stats-linears": ("block", "linear", "sqnr_w", "sqnr_o"),
    "stats-distance": ("block", "arm", "curve", "sqnr", "median_token_sqnr"),
    "stats-kv": ("block", "arm", "group", "tokens", "k_sqnr", "v_sqnr", "attention_sqnr"),
    "stats-pivots": ("block", "attention_mass", "k_pivots", "k_rest", "v_pivots", "v_rest"),
}


def form_of(task: str) -> Any:
    """The form of a task's records."""
    return FORMS.get(task, _Statistics if task in COLUMNS else dict)


def disagreement(task: str, record: Mapping[str, Any]) -> str | None:
    """What of a record of the right form does not go with the rest of it, in words; None if all does."""
    if task == "ppl":
        windows, losses = record.get("windows"), record["window_nll"]
        if windows is not None and windows != len(losses):
            return f"it has {len(losses)} losses of {windows} windows"
        nll = record.get("nll")  # 1e-5: losses of windows are stored with six digits
        if nll is not None and not (
            math.isclose(fmean(losses), nll, rel_tol=1e-5, abs_tol=1e-5)
            and math.isclose(math.log(record["perplexity"]), nll, rel_tol=1e-5, abs_tol=1e-5)
        ):
            return "its perplexity is not that of its windows' losses"
    if task == "tasks":
        for metric, value in record["metrics"].items():
            if metric.startswith(("acc", "exact_match")) and not 0 <= value <= 1:
                return f"its {metric} is {value}, which is no fraction of the questions"
    if task == "needle":
        asked = product(*(record["settings"][name] for name in ("lengths", "depths", "keys")))
        results = record["results"]
        if sorted(asked) != sorted((row["length"], row["depth"], row["key"]) for row in results):
            return "its results are not those of its lengths, depths and keys"
        if not math.isclose(fmean(row["found"] for row in results), record["found"], abs_tol=1e-9):
            return "its share of found keys is not that of its results"
    if task == "latency":
        shapes = [shape for n, k in record["settings"]["shapes"] for shape in ((n, k), (k, n))]
        if shapes != [(found["out"], found["channels"]) for found in record["products"]]:
            return "its products are not those of its shapes"
    for row in record["rows"] if task in COLUMNS else ():
        if lacking := [name for name in COLUMNS[task] if name not in row]:
            return f"a row of it has no {lacking[0]!r}"
    return None
