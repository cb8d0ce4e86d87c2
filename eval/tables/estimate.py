"""What runs will take, before anything runs: hours of one GPU and bytes of disk, in closed form. Estimates alone.

    forward pass    2 · parameters · tokens / FORWARD                 quantizing    share · GPTQ · parameters · tokens
    one new token   max(bytes of the weights / BANDWIDTH, STEP · blocks)

Every constant is a figure of one NVIDIA H200 or one Intel Xeon that docs/performance.md or docs/results.md gives with
its command. How many tokens a task has is only about right. What simulates low-bit activations or caches takes more.
"""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from corpora.catalog import CORPORA, corpus_files, model_defaults
from eval.tables.asked import Call, Run
from eval.tables.departures import QUESTIONS

__all__ = ["SOURCES", "ModelSize", "bits_per_weight", "disk_of", "seconds_of", "size_of"]

BLOCK = 218e6  # parameters of a decoder block of an 8B model
FORWARD = 2 * 32 * BLOCK * 512 / 24.2e-3  # operations a second: 512 tokens through 32 blocks of an 8B model
STEP = 0.8e-3  # seconds that the host needs for a block of one pass
BANDWIDTH = 4.25e12  # bytes a second that a copy moved
GPTQ = 6.3 / (2 * BLOCK * 128 * 2048)  # seconds a parameter and token: two blocks on 128 × 2,048 tokens
# Seconds of a method over GPTQ's on as many tokens: SmolLM2's on a CPU, 65 s on 16 × 512.
SHARES = {
    "rtn": 6 / 65, "bcq": 86 / 65, "gptq-bcq": 2.0, "spqr": 60 / 65, "awq": 2 * 505 / 65,  # AWQ: half the text
    "omniquant": 2 * 10 * 232 / 65,  # half the text, and 2 epochs of 20
    "lkd": 191 / 65, "ft": 2 * 10 * 232 / 65,  # fine-tuning: no figure of its own, taken as OmniQuant
}  # fmt: skip
START = 6.0  # seconds until a program has imported what it needs and planned
READING = 2e9  # bytes a second of a checkpoint that is read: a common disk
SOURCES = (
    "of one NVIDIA H200, from docs/performance.md (a forward pass: 24.2 ms, GPTQ: 6.3 s, a copy: 4.25 TB/s) and "
    "docs/results.md (other methods over GPTQ)"
)
# Windows of 2,048 tokens by a LLaMA tokenizer, and thousands of tokens that a task has, all its answers counted.
WINDOWS = {"wikitext2": 166, "c4": 256, "c4-old": 256, "ptb": 60, "pile": 256}
TASKS = {
    "mmlu": 9100, "openbookqa": 50, "winogrande": 76, "arc_challenge": 190, "arc_easy": 330, "boolq": 980,
    "hellaswag": 4000, "lambada_openai": 460, "piqa": 180, "gsm8k": 1300, "truthfulqa_gen": 400, "bbh": 8000,
}  # fmt: skip
OTHER_TASK = 1000  # thousands of tokens
# New tokens: of a task that generates, by question and answer; of answers to MT-bench, conversations and needles.
GENERATED = {"gsm8k": 1319 * 150, "truthfulqa_gen": 817 * 60, "bbh": 6511 * 150}
ANSWERS = {"mtbench": 160 * 300, "chat": 400, "needle": 2000}
PARTS = {"mmlu": 57, "bbh": 27}  # tasks of a group, each of which a limit holds for
OTHER_QUESTIONS = 1500
TEXT = 128 * 2048  # tokens that most methods calibrate on
TRAINING = {"calibrate": 160 * 16 * 1024, "train-prefix": 20 * 512 * 1024}  # tokens, as published
TWIN_AND_BACK = 4  # passes of a training: the twin's, the model's, and two of its gradient


@dataclass(frozen=True)
class ModelSize:
    """parameters: in all; embedded: those of the vocabulary, which stay as they are. bytes: of one of these."""

    parameters: float
    embedded: float
    bytes: float = 2.0

    @property
    def blocks(self) -> float:
        """How many there are, about: 32 at 7B, 80 at 70B."""
        return 32 * (self.parameters / 7e9) ** 0.4


def size_of(model: Path) -> ModelSize | None:
    """Of the headers of a model's files; where it is not there, of its name (`7b`). None if neither says it."""
    counts: list[tuple[int, bool, int]] = []
    try:
        vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8")).get("vocab_size")
        for file in sorted(model.glob("*.safetensors")):
            with file.open("rb") as opened:
                header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
            for name, tensor in header.items():
                if name != "__metadata__":
                    first, last = tensor["data_offsets"]
                    number = 1
                    for side in tensor["shape"]:
                        number *= side
                    counts.append((number, tensor["shape"][:1] == [vocabulary], last - first))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        counts = []  # the program that reads it will say what is wrong
    if total := sum(number for number, _, _ in counts):
        return ModelSize(total, sum(n for n, is_row, _ in counts if is_row), sum(b for _, _, b in counts) / total)
    found = re.findall(r"(?<![0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z])", model.name.lower())
    if not found:
        return None
    parameters = float(found[-1][0]) * {"b": 1e9, "m": 1e6}[found[-1][1]]
    return ModelSize(parameters, 0.04 * parameters)


def bits_per_weight(run: Run) -> float:
    """Of what a run quantizes, scales and zero points included: 4.6 for 4 bits in groups of 64, as measured."""
    recipe = run.option("--recipe")
    named = re.search(r"w(\d+)", recipe)
    bits = float(run.option("--bits") or (named[1] if named else 4))
    group = float(run.option("--group-size") or model_defaults(run.model.name).default_group_size)
    if group <= 0:
        group = 4096.0
    return bits + (32 * bits if "bcq" in recipe else 38.4) / group


def disk_of(run: Run, size: ModelSize) -> float:
    """Bytes that a run will write: a checkpoint; else a prefix or a record, which are small."""
    if run.program != "quantization":
        return 1e6
    return (size.parameters - size.embedded) * bits_per_weight(run) / 8 + size.embedded * size.bytes


def seconds_of(call: Call, size: ModelSize) -> float:
    """Of one H200: the start, the model read, and what every run of the call scores, makes or trains."""
    return START + size.parameters * size.bytes / READING + sum(_work(run, size) for run in call.runs)


def _work(run: Run, size: ModelSize) -> float:
    forward = 2 * size.parameters / FORWARD  # seconds a token
    step = max(size.parameters * size.bytes / BANDWIDTH, STEP * size.blocks)
    if run.program == "quantization":
        return _quantizing(run, size)
    if run.program == "ppl":
        return forward * _scored(run)
    if run.program == "tasks":
        limit = float(run.option("--limit") or "inf")
        part = min(1.0, limit * PARTS.get(run.item, 1) / QUESTIONS.get(run.item, OTHER_QUESTIONS))
        return part * (1e3 * TASKS.get(run.item, OTHER_TASK) * forward + GENERATED.get(run.item, 0) * step)
    if run.program in TRAINING:
        return TWIN_AND_BACK * forward * TRAINING[run.program]
    return ANSWERS.get(run.program, 0) * step


def _scored(run: Run) -> float:
    """Tokens that a run of perplexity scores."""
    window = int(run.option("--window") or 2048)
    if run.item in WINDOWS:
        tokens = 2048.0 * WINDOWS[run.item]
    else:  # four bytes a token
        files = corpus_files(run.item, "evaluation") if run.item in CORPORA else [Path(run.item)]
        tokens = sum(file.stat().st_size for file in files if file.is_file()) / 4
    return min(tokens, window * float(run.option("--limit") or "inf"))


def _quantizing(run: Run, size: ModelSize) -> float:
    recipe = run.option("--recipe")
    share = next((SHARES[name] for name in ("lkd", "ft") if recipe.endswith(f"-{name}")), None)
    if share is None:
        share = next((value for name, value in SHARES.items() if recipe.startswith(name)), 1.0)
    own = model_defaults(run.model.name).default_calibration
    text = own.samples * own.length if own else TEXT
    samples, length = run.option("--calibration-samples"), run.option("--calibration-length")
    if samples or length:
        text = int(samples or 128) * int(length or 2048)
    return share * GPTQ * (size.parameters - size.embedded) * text
