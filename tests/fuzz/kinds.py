"""What the project reads: worlds that hold one file of every kind, and the programs that read it."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz import worlds
from fuzz.engine import Outcome, Program, Scratch, said
from fuzz.worlds import ANSWER, CALIBRATE, CHAT, JUDGE, MODEL, NEEDLE, QUANTIZE, RTN, TALK, WINDOW

__all__ = ["KINDS", "Kind", "named"]

# Of a run record, what differs from run to run, names the place, or is a key that the fuzzer added.
VOLATILE = {
    "settings", "identity", "started", "environment", "seconds", "tokens_per_second", "peak_memory_mb", "path",
    "answers", "answered_now", "cost", "judgement_file", "sum", "sha256",
    "", "unused", "auto_map", "../x",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file. build: makes the world. files: in it, as patterns. own: ours, and carries a sum, so no damage
    may change a figure. rewritten: what the programs may write, whatever becomes of the call. without: whether a
    finished call rightly went without the damaged file: it is named on stderr."""

    name: str
    build: Callable[[Path, Scratch], None]
    files: tuple[str, ...]
    programs: tuple[Program, ...]
    own: bool = False
    rewritten: str | None = None
    without: Callable[[Outcome, str], bool] | None = None

    @property
    def world(self) -> str:
        """The name of the world; kinds with one builder share it."""
        return self.build.__name__


# figures --------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items() if key not in VOLATILE}
    return [_plain(member) for member in value] if isinstance(value, list) else value


def record(outcome: Outcome, world: Path) -> Any:
    """The figures of the record that --json prints."""
    return _plain(json.loads(outcome.out))


def printed(outcome: Outcome, world: Path) -> Any:
    """What is printed."""
    return outcome.out


def written(*patterns: str, outcome: Outcome, world: Path) -> Any:
    """The bytes of files."""
    found = sorted(path for pattern in patterns for path in world.glob(pattern))
    if not found:
        raise FileNotFoundError(patterns[0])
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]


def tensors(*patterns: str, outcome: Outcome, world: Path) -> Any:
    """The tensors in files, without what is said of them."""
    from safetensors.torch import load_file

    found = sorted(path for pattern in patterns for path in world.glob(pattern))
    if not found:
        raise FileNotFoundError(patterns[0])
    return [
        (path.name, name, tensor.flatten().tolist())
        for path in found
        for name, tensor in sorted(load_file(path).items())
    ]


def files_of(*patterns: str) -> Callable[[Outcome, Path], Any]:
    return lambda outcome, world: written(*patterns, outcome=outcome, world=world)


def tensors_of(*patterns: str) -> Callable[[Outcome, Path], Any]:
    return lambda outcome, world: tensors(*patterns, outcome=outcome, world=world)


# kinds ----------------------------------------------------------------------------------------------------------------


def ppl(*words: str, name: str = "ppl") -> Program:
    return Program(name, ("eval", "ppl", *words, *WINDOW), record)


def check(directory: str) -> Program:
    """It says what is damaged, and exits with 1 if nothing runs: any answer is one."""
    return Program("check", ("corpora", "check", directory), lambda outcome, world: None, answers=(0, 1))


MODEL_PROGRAMS = (
    check(MODEL),
    ppl("--model", MODEL),
    ppl("--model", MODEL, *RTN, "--prefix", "prompt", name="ppl-rtn-prompt"),
    Program("quantize", (*QUANTIZE, "q"), tensors_of("q/*.safetensors")),
    Program("build", ("intactkv", "build", "--model", MODEL, "--prefix", "prompt", "--out", "p.safetensors"),
            tensors_of("p.safetensors")),
    Program("mtbench", (*ANSWER, "a.jsonl"), lambda outcome, world: _turns(world / "a.jsonl")),
)  # fmt: skip
# Values are read block by block; what is finished then stays, and the next run goes on from it.
RESUMED = r"\.partial(/|$)"
# One line for every judgement; that of another text is another one.
JUDGED = r"^outputs/mt_bench/model_judgment/"
QUANTIZED_PROGRAMS = (
    check("q"),
    ppl("--model", "q"),
    ppl("--model", "q", "--prefix", "bos", "--kernel", "unpack", name="ppl-bos-packed"),
    ppl("--model", "q", "--kernel", "auto", name="ppl-auto"),
    Program("export-dense", ("quantization", "export", "--model", "q", "--format", "dense", "--out", "x"),
            tensors_of("x/*.safetensors")),
    Program("export-ct", ("quantization", "export", "--model", "q", "--out", "x"), tensors_of("x/*.safetensors")),
)  # fmt: skip
PREFIX = (*RTN, "--prefix")
REPORT = Program(
    "report",
    ("eval", "report", "intactkv-1", "--model", MODEL, "--out", "r.html"),
    lambda outcome, world: re.findall(r'class="ours"[^>]*>([^<]*)', (world / "r.html").read_text()),
)


def _turns(path: Path) -> Any:
    """The answers of a file; --json prints how they were made."""
    return [json.loads(line)["choices"][0]["turns"] for line in path.read_text().splitlines()]


def _said(path: Path) -> Any:
    """The answers of a transcript."""
    return _answers(json.loads(path.read_text()))


def _answers(kept: Any) -> Any:
    """The answers of a transcript, or of a conversation's record."""
    return [(said["user"], said["ids"]) for said in kept["answers"]]


def named(outcome: Outcome, file: str) -> bool:
    """Whether a finished call says on stderr that it left a file, or a part of it, out."""
    return any(Path(file).name in line for line in said(outcome.err))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("config", worlds.dense, (f"{MODEL}/config.json",), MODEL_PROGRAMS),
        Kind("generation_config", worlds.dense, (f"{MODEL}/generation_config.json",), MODEL_PROGRAMS),
        Kind("tokenizer", worlds.dense, (f"{MODEL}/tokenizer.json",), MODEL_PROGRAMS),
        Kind("tokenizer_config", worlds.dense, (f"{MODEL}/tokenizer_config.json",), MODEL_PROGRAMS),
        Kind("special_tokens", worlds.dense, (f"{MODEL}/special_tokens_map.json",), MODEL_PROGRAMS),
        Kind("template", worlds.dense, (f"{MODEL}/chat_template.jinja",), MODEL_PROGRAMS),
        Kind("weights", worlds.dense, (f"{MODEL}/model.safetensors",), MODEL_PROGRAMS, rewritten=RESUMED),
        Kind("index", worlds.sharded, (f"{MODEL}/model.safetensors.index.json",), MODEL_PROGRAMS),
        Kind("shard", worlds.sharded, (f"{MODEL}/model-*.safetensors",), MODEL_PROGRAMS, rewritten=RESUMED),
        Kind("manifest", worlds.quantized, ("q/quantization.json",), QUANTIZED_PROGRAMS, own=True),
        Kind("checksums", worlds.quantized, ("q/checksums.json",), QUANTIZED_PROGRAMS, own=True),
        Kind("block", worlds.quantized, ("q/block-*.safetensors",), QUANTIZED_PROGRAMS, own=True),
        Kind("ends", worlds.quantized, ("q/ends.safetensors",), QUANTIZED_PROGRAMS, own=True),
        Kind("beside", worlds.quantized, ("q/config.json", "q/tokenizer.json", "q/tokenizer_config.json"),
             QUANTIZED_PROGRAMS),
        Kind("block-kv", worlds.rotated, ("q/block-*.safetensors", "q/quantization.json"), (
            ppl("--model", "q"), ppl("--model", "q", "--prefix", "bos", "--kernel", "unpack", name="ppl-bos-packed"),
        ), own=True),
        Kind("block-coded", worlds.coded, ("q/block-*.safetensors",), (
            ppl("--model", "q", "--kernel", "auto", name="ppl-auto"),
            ppl("--model", "q", "--kernel", "lut", name="ppl-lut"),
        ), own=True),
        Kind("partial", worlds.partial_, ("q.partial/block-000.safetensors", "q.partial/*.json"),
             (Program("resume", (*QUANTIZE, "q"), tensors_of("q/*.safetensors")),), own=True,
             rewritten=r"^q\.partial"),
        Kind("prefix", worlds.prefixed, ("p.safetensors",), (
            ppl("--model", MODEL, *PREFIX, "p.safetensors"),
            ppl("--model", MODEL, *PREFIX, "p.safetensors", "--vanilla", name="ppl-vanilla"),
            Program("adapter", ("intactkv", "export", "--model", MODEL, "--prefix", "p.safetensors", "--out", "a"),
                    files_of("a/*")),
        ), own=True),
        Kind("kv", worlds.calibrated, ("kv.safetensors",), (
            ppl("--model", MODEL, "--prefix", "bos", "--kv", "kv.safetensors"),
            ppl("--model", MODEL, "--prefix", "bos", "--kv", "kv.safetensors", "--kv-storage", "packed",
                name="ppl-packed"),
        ), own=True),
        Kind("kept_kv", worlds.calibrated, ("modelzoo/kv/*/*",),
             (ppl("--model", MODEL, *worlds.STATIC),), own=True, rewritten=r"^modelzoo/kv/"),
        Kind("partial_kv", worlds.partial_kv, ("modelzoo/kv/*/*.partial/*",),
             (ppl("--model", MODEL, *worlds.STATIC),), own=True, rewritten=r"^modelzoo/kv/"),
        Kind("quantizers", worlds.quantizers, ("quantizers.pickle",), (ppl("--model", MODEL, *worlds.KVQUANT),),
             rewritten=r"^modelzoo/kv/"),
        Kind("adapter", worlds.prefixed, ("adapter/*.json", "adapter/*.safetensors"),
             (ppl("--model", MODEL, *PREFIX, "adapter"),), own=True),
        Kind("token_cache", worlds.cached, ("outputs/cache/tokens/*",), (ppl("--model", MODEL),), own=True,
             rewritten=r"^outputs/cache/tokens/"),
        Kind("kept_prefix", worlds.kept_prefix, ("modelzoo/prefixes/*/text-*", "modelzoo/prefixes/*/hello*"),
             (ppl("--model", MODEL, *PREFIX, "hello"),), own=True, rewritten=r"^modelzoo/prefixes/"),
        Kind("discovery", worlds.kept_prefix, ("modelzoo/prefixes/*/auto-*.json",),
             (ppl("--model", MODEL, *PREFIX, "auto:text.txt@4"),), own=True, rewritten=r"^modelzoo/prefixes/"),
        Kind("record", worlds.records, ("outputs/runs/*.json",), (
            Program("table", ("eval", "table", "--costs"), printed),
            Program("table-tasks", ("eval", "table", "tasks"), printed),
            Program("table-1", ("eval", "table", "1"), printed),
            Program("ppl-again", ("eval", "ppl", "--model", MODEL, *RTN, *WINDOW[:-1]), record),
            Program("plot", ("eval", "plot", "perplexity", "--model", "tiny-llama", "--out", "f.png"),
                    files_of("f.csv")),
            Program("chat-again", TALK, lambda outcome, world: _answers(json.loads(outcome.out))),
            Program("table-needle", ("eval", "table", "needle"), printed),
            Program("plot-needle", ("eval", "plot", "needle", "--model", "tiny-llama", "--out", "f.png"),
                    files_of("f.csv")),
        ), without=named),
        Kind("reported", worlds.reported, ("outputs/runs/*.json",), (REPORT,), own=True, without=named),
        Kind("submission", worlds.submitted, ("outputs/cluster/n/tasks.jsonl", "outputs/cluster/n/jobs.json"),
             (Program("status", ("eval", "cluster", "status", "n"), printed),), own=True),
        Kind("asked", worlds.reported, ("outputs/asked/*.json", "outputs/asked/tables/*.json"), (REPORT,),
             without=named),
        Kind("state", worlds.chats, ("out.state.safetensors",), (
            Program("resume", (*CALIBRATE, "out.safetensors"), tensors_of("out.safetensors")),
        ), own=True, rewritten=r"^out\.state|^modelzoo/"),
        Kind("curve", worlds.chats, ("whole.curve.jsonl",), (
            Program("plot", ("eval", "plot", "calibration", "--curves", "whole.curve.jsonl", "--out", "f.png"),
                    files_of("f.csv")),
        )),
        Kind("conversations", worlds.chats, ("datasets/ShareGPT_Vicuna_unfiltered/*.json",), (
            Program("calibrate", (*CALIBRATE, "new.safetensors"), tensors_of("new.safetensors")),
        ), without=named, rewritten="^modelzoo/"),
        Kind("task", worlds.tasks, (
            "datasets/lambada_openai/data/*", "datasets/piqa/*/*", "datasets/hellaswag/data/*",
        ), (
            Program("tasks", ("eval", "tasks", "--model", MODEL, "--data", "local", "--tasks",
                              "lambada_openai,piqa,hellaswag", "--json"), record),
        )),
        Kind("mmlu", worlds.tasks, ("datasets/mmlu/data/*/*.csv",), (
            Program("tasks", ("eval", "tasks", "--model", MODEL, "--data", "local", "--tasks", "mmlu", "--fewshot", "1",
                              "--json"), record),
        )),
        *(
            Kind(f"corpus-{file}", worlds.corpora, (file,), (
                Program("ppl", ("eval", "ppl", "--model", MODEL, "--corpus", name, *WINDOW[2:]), record),
                Program("calibrate", ("quantization", "--model", MODEL, "--recipe", "gptq", "--group-size", "32",
                                      "--calibration", name, "--calibration-samples", "2", "--calibration-length", "32",
                                      "--out", "q"), tensors_of("q/*.safetensors")),
            ))
            for file, name in [(name, name) for name in (
                "text.txt", "c.json", "c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.txt.gz", "c.parquet",
            )] + [("folder/*", "folder")]
        ),
        Kind("questions", worlds.mtbench, ("questions.jsonl",), (
            Program("mtbench", (*ANSWER, "a.jsonl"), lambda outcome, world: _turns(world / "a.jsonl")),
            Program("judge", (*JUDGE, "given.jsonl"), record),
        ), rewritten=JUDGED),
        Kind("answers", worlds.mtbench, ("given.jsonl", "given.run.json"), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
            Program("mtbench", (*ANSWER, "given.jsonl"), lambda outcome, world: _turns(world / "given.jsonl")),
        ), rewritten=rf"^given|{JUDGED}"),
        Kind("prompts", worlds.mtbench, ("prompts.jsonl", "references.jsonl"), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
        ), rewritten=JUDGED),
        Kind("judgements", worlds.mtbench, ("outputs/mt_bench/model_judgment/*",), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
        ), rewritten=JUDGED),
        Kind("needles", worlds.needles, ("outputs/needle/*.jsonl",), (Program("needle", NEEDLE, record),), own=True,
             rewritten=r"^outputs/needle/"),
        Kind("transcript", worlds.talked, ("t.json",), (
            Program("chat", CHAT, lambda outcome, world: _said(world / "t.json")),
        ), own=True, rewritten=r"^t\.json$"),
        Kind("script", worlds.talked, ("script.txt",), (
            Program("chat", CHAT, lambda outcome, world: _said(world / "t.json")),
        ), rewritten=r"^t\.json$"),
        Kind("awq_zoo", worlds.zoo, ("zoo.pt",), (
            Program("quantize", ("quantization", "--model", MODEL, "--recipe", "awq-w3", "--group-size", "32", "--set",
                                 "weights.file=zoo.pt", "--out", "q"), tensors_of("q/*.safetensors")),
        ), rewritten=RESUMED),
        Kind("export", worlds.exported, ("x/*.json", "x/*.safetensors"), (
            ppl("--model", "x"),
        )),
    )
}  # fmt: skip
