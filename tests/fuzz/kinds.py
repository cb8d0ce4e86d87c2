"""What the project reads: worlds that hold one file of every kind, and the programs that read it."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chats import TEMPLATE
from common import FOXES
from conftest import _tiny_checkpoint, _tiny_tokenizer

from fuzz.engine import Outcome, Program, Scratch, call, said

__all__ = ["KINDS", "Kind"]

MODEL = "modelzoo/tiny-llama"
# Of a run record, what differs from run to run or names the place.
VOLATILE = {
    "settings", "identity", "started", "environment", "seconds", "tokens_per_second", "peak_memory_mb", "path",
    "answers", "cost", "judgement_file", "sum", "sha256",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file. build: makes the world. files: in it, as patterns. own: ours, and carries a sum, so no damage
    may change a figure. rewritten: what the programs may write anew. without: whether a finished call rightly went
    without the damaged file: it is named on stderr, or made again."""

    name: str
    build: Callable[[Path, Scratch], None]
    files: tuple[str, ...]
    programs: tuple[Program, ...]
    own: bool = False
    rewritten: str | None = None
    without: Callable[[Outcome, Path], bool] | None = None

    @property
    def world(self) -> str:
        """The name of the world; kinds with one builder share it."""
        return getattr(self.build, "__name__", None) or self.build.func.__name__  # type: ignore[attr-defined]


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


# worlds ---------------------------------------------------------------------------------------------------------------


def ran(world: Path, *words: str) -> Outcome:
    outcome = call(world, words, seconds=120)
    if outcome.code != 0:
        raise RuntimeError(f"{' '.join(words)}: {outcome.frame or outcome.err[-500:]}")
    return outcome


def _dense(world: Path, scratch: Scratch, **options: Any) -> None:
    directory = _tiny_checkpoint(
        world / "modelzoo", "llama", num_hidden_layers=2, max_position_embeddings=1024, **options
    )
    _tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    (world / "text.txt").write_text(FOXES)
    rows = [{"question_id": 1, "category": "writing", "turns": ["Say a.", "Say b."]},
            {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 2?"]}]  # fmt: skip
    (world / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def dense(world: Path, scratch: Scratch) -> None:
    _dense(world, scratch)


def sharded(world: Path, scratch: Scratch) -> None:
    _dense(world, scratch, max_shard_size="100KB")


def _from(world: Path, scratch: Scratch, build: Callable[[Path, Scratch], None]) -> None:
    shutil.copytree(scratch.template(build.__name__, build), world, dirs_exist_ok=True)


QUANTIZE = ("quantization", "--model", MODEL, "--recipe", "rtn-w4", "--group-size", "32", "--out")
WINDOW = ("--corpus", "text.txt", "--window", "32", "--limit", "2", "--json", "--force")
RTN = ("--recipe", "rtn-w4", "--group-size", "32")


def quantized(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    ran(world, *QUANTIZE, "q")


def rotated(world: Path, scratch: Scratch) -> None:
    """A checkpoint with rescalings, online rotations and a calibrated KV policy."""
    _from(world, scratch, dense)
    ran(world, "quantization", "--model", MODEL, "--recipe", "smoothquant-w8a8", "--kv", "static", "--kv-bits", "4",
        "--calibration", "text.txt", "--calibration-samples", "2", "--calibration-length", "32", "--out", "q")  # fmt: skip


def partial_(world: Path, scratch: Scratch) -> None:
    """A run that was killed behind its first block."""
    from quantization.runs import one_block

    _from(world, scratch, dense)
    write, done = one_block.write_block, []

    def killed(*arguments: Any, **options: Any) -> None:
        if done:
            raise KeyboardInterrupt
        write(*arguments, **options)
        done.append(1)

    one_block.write_block = killed
    try:
        call(world, (*QUANTIZE, "q"))
    except KeyboardInterrupt:
        pass
    finally:
        one_block.write_block = write
    assert list((world / "q.partial").glob("block-*")), list(world.iterdir())


def prefixed(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    ran(world, "intactkv", "build", "--model", MODEL, "--prefix", "hello", "--out", "p.safetensors")
    ran(world, "intactkv", "export", "--model", MODEL, "--prefix", "p.safetensors", "--out", "adapter")


def cached(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    ran(world, "eval", "ppl", "--model", MODEL, *WINDOW)
    shutil.rmtree(world / "outputs" / "runs")


def kept_prefix(world: Path, scratch: Scratch) -> None:
    """A prefix and a discovery of the model's, as the programs keep them."""
    _from(world, scratch, dense)
    for prefix in ("hello", "auto:text.txt@4"):
        ran(world, "eval", "ppl", "--model", MODEL, *RTN, "--prefix", prefix, *WINDOW)
    shutil.rmtree(world / "outputs")


def records(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    for words in ((), RTN, (*RTN, "--prefix", "bos")):
        ran(world, "eval", "ppl", "--model", MODEL, *words, *WINDOW)
    _tasks(world)
    ran(world, "eval", "tasks", "--model", MODEL, "--tasks", "piqa", "--data", "local", "--limit", "2", "--json")


TASKS = {
    "lambada_openai/data/lambada_test_en.jsonl": [{"text": f"He saw dog {i} and called the dog"} for i in range(3)],
    "hellaswag/data/hellaswag_val.jsonl": [
        {"ind": i, "activity_label": "Sewing", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
         "split": "val", "split_type": "indomain", "label": i, "source_id": f"a~{i}",
         "endings": ["sews.", "eats.", "sings.", "is a cat."]} for i in range(3)
    ],
}  # fmt: skip


def _tasks(world: Path) -> None:
    import datasets

    for name, rows in TASKS.items():
        path = world / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"goal": f"Open jar {i}", "sol1": f"Turn {i}", "sol2": "Wait", "label": i % 2} for i in range(3)]
    (world / "datasets/piqa/plain_text").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(world / "datasets/piqa/plain_text/validation-00000-of-00001.parquet")
    for part, count in (("dev", 2), ("test", 2)):
        folder = world / "datasets/mmlu/data" / part
        folder.mkdir(parents=True)
        lines = [f"{part} {i}?,{i},{i + 1},both,none,{'ABCD'[i]}" for i in range(count)]
        (folder / f"anatomy_{part}.csv").write_text("\n".join(lines) + "\n")


def tasks(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    _tasks(world)


def corpora(world: Path, scratch: Scratch) -> None:
    import datasets
    import zstandard

    _from(world, scratch, dense)
    texts = [FOXES[i : i + 400] for i in range(0, 2000, 400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (world / "c.jsonl").write_bytes(lines)
    (world / "c.json").write_text(json.dumps([{"text": text} for text in texts]))
    (world / "c.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (world / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (world / "c.txt.gz").write_bytes(gzip.compress(FOXES.encode(), mtime=0))
    data = datasets.Dataset.from_dict({"text": texts})
    data.to_parquet(world / "c.parquet")
    data.save_to_disk(world / "folder")


def chats(world: Path, scratch: Scratch) -> None:
    """Conversations of both kinds, a training that was killed, and its curve."""
    from intactkv import training

    _from(world, scratch, dense)
    turns = [{"from": role, "value": text} for role, text in (("human", "hi"), ("gpt", "abc " * 20))]
    folder = world / "datasets" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    rows = [{"id": str(i), "conversations": turns} for i in range(4)]
    (folder / "ShareGPT_V4.3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    ran(world, *CALIBRATE, "whole.safetensors")
    save = training.Descent.save

    def killed(self: Any, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    training.Descent.save = killed  # type: ignore[method-assign]
    try:
        call(world, (*CALIBRATE, "out.safetensors"))
    except KeyboardInterrupt:
        pass
    finally:
        training.Descent.save = save  # type: ignore[method-assign]
    assert (world / "out.state.safetensors").exists(), list(world.iterdir())


CALIBRATE = (
    "intactkv", "calibrate", "--model", MODEL, *RTN, "--prefix", "A chat", "--conversations", "sharegpt", "--samples",
    "2", "--held-out", "1", "--max-length", "300", "--min-assistant", "5", "--steps", "2", "--batch-size", "1",
    "--evaluate-every", "1", "--out",
)  # fmt: skip
ANSWER = (
    "eval",
    "mtbench",
    "--model",
    MODEL,
    "--questions",
    "questions.jsonl",
    "--max-new-tokens",
    "2",
    "--json",
    "--out",
)
JUDGE = (
    "eval", "judge", "--questions", "questions.jsonl", "--prompts", "prompts.jsonl", "--references", "references.jsonl",
    "--judge-model", f"local:{MODEL}", "--max-tokens", "2", "--json", "--answers",
)  # fmt: skip


def mtbench(world: Path, scratch: Scratch) -> None:
    """Questions, prompts, references, answers; judgements as far as a killed judge left them."""
    _from(world, scratch, dense)
    reference = "\n[Reference] {ref_answer_1}"
    later = "[Q] {question_1} [A] {answer_1} [Q] {question_2} [A] {answer_2}"
    templates = {"single-v1": "[Q] {question} [A] {answer}", "single-math-v1": f"[Q] {{question}} [A] {{answer}}{reference}",
                 "single-v1-multi-turn": later,
                 "single-math-v1-multi-turn": f"{later}{reference} {{ref_answer_2}}"}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"name": name, "type": "single", "system_prompt": "Grade.", "prompt_template": text, "description": "x",
         "category": "general", "output_format": "[[rating]]"} for name, text in templates.items()
    ]  # fmt: skip
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question_id": i, "answer_id": f"r{i}", "model_id": "own", "tstamp": 0.0,
             "choices": [{"index": 0, "turns": ["2", "4"]}]} for i in (1, 2)]  # fmt: skip
    (world / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran(world, *ANSWER, "given.jsonl")
    ran(world, *JUDGE, "given.jsonl")
    shutil.rmtree(world / "outputs" / "runs")


def zoo(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, dense)
    ran(world, "quantization", "--model", MODEL, "--recipe", "awq-w3", "--group-size", "32", "--calibration", "text.txt",
        "--calibration-samples", "2", "--calibration-length", "32", "--set",
        "calibration.draw=segments", "--out", "search")  # fmt: skip
    ran(world, "quantization", "export", "--format", "awq-search", "--model", "search", "--out", "zoo.pt")


def exported(world: Path, scratch: Scratch) -> None:
    _from(world, scratch, quantized)
    ran(world, "quantization", "export", "--model", "q", "--format", "dense", "--prefix", "bos", "--out", "x")


# kinds ----------------------------------------------------------------------------------------------------------------


def ppl(*words: str, name: str = "ppl") -> Program:
    return Program(name, ("eval", "ppl", *words, *WINDOW), record)


MODEL_PROGRAMS = (
    ppl("--model", MODEL),
    ppl("--model", MODEL, *RTN, "--prefix", "prompt", name="ppl-rtn-prompt"),
    Program("quantize", (*QUANTIZE, "q"), tensors_of("q/*.safetensors")),
    Program("build", ("intactkv", "build", "--model", MODEL, "--prefix", "prompt", "--out", "p.safetensors"),
            tensors_of("p.safetensors")),
    Program("mtbench", (*ANSWER, "a.jsonl"), lambda outcome, world: _turns(world / "a.jsonl")),
)  # fmt: skip
QUANTIZED_PROGRAMS = (
    ppl("--model", "q"),
    ppl("--model", "q", "--prefix", "bos", "--packed", name="ppl-bos-packed"),
    Program("export-dense", ("quantization", "export", "--model", "q", "--format", "dense", "--out", "x"),
            tensors_of("x/*.safetensors")),
    Program("export-ct", ("quantization", "export", "--model", "q", "--out", "x"), tensors_of("x/*.safetensors")),
)  # fmt: skip
PREFIX = (*RTN, "--prefix")


def _turns(path: Path) -> Any:
    return [json.loads(line)["choices"] for line in path.read_text().splitlines()]


def _named(path_parts: int = 1) -> Callable[[Outcome, Path], bool]:
    """A finished call that says on stderr what it left out or made again."""
    return lambda outcome, world: bool(said(outcome.err) or "left out" in outcome.log)


def _record_left_out(outcome: Outcome, world: Path) -> bool:
    return any(".json" in line for line in said(outcome.err))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("config", dense, (f"{MODEL}/config.json",), MODEL_PROGRAMS),
        Kind("generation_config", dense, (f"{MODEL}/generation_config.json",), MODEL_PROGRAMS),
        Kind("tokenizer", dense, (f"{MODEL}/tokenizer.json",), MODEL_PROGRAMS),
        Kind("tokenizer_config", dense, (f"{MODEL}/tokenizer_config.json",), MODEL_PROGRAMS),
        Kind("special_tokens", dense, (f"{MODEL}/special_tokens_map.json",), MODEL_PROGRAMS),
        Kind("template", dense, (f"{MODEL}/chat_template.jinja",), MODEL_PROGRAMS),
        Kind("weights", dense, (f"{MODEL}/model.safetensors",), MODEL_PROGRAMS),
        Kind("index", sharded, (f"{MODEL}/model.safetensors.index.json",), MODEL_PROGRAMS),
        Kind("shard", sharded, (f"{MODEL}/model-*.safetensors",), MODEL_PROGRAMS),
        Kind("manifest", quantized, ("q/quantization.json",), QUANTIZED_PROGRAMS, own=True),
        Kind("checksums", quantized, ("q/checksums.json",), QUANTIZED_PROGRAMS, own=True),
        Kind("block", quantized, ("q/block-*.safetensors",), QUANTIZED_PROGRAMS, own=True),
        Kind("ends", quantized, ("q/ends.safetensors",), QUANTIZED_PROGRAMS, own=True),
        Kind("beside", quantized, ("q/config.json", "q/tokenizer.json", "q/tokenizer_config.json"), QUANTIZED_PROGRAMS),
        Kind("block-kv", rotated, ("q/block-*.safetensors", "q/quantization.json"), (
            ppl("--model", "q"), ppl("--model", "q", "--prefix", "bos", "--packed", name="ppl-bos-packed"),
        ), own=True),
        Kind("partial", partial_, ("q.partial/block-000.safetensors", "q.partial/*.json"),
             (Program("resume", (*QUANTIZE, "q"), tensors_of("q/*.safetensors")),), own=True,
             rewritten=r"^q\.partial"),
        Kind("prefix", prefixed, ("p.safetensors",), (
            ppl("--model", MODEL, *PREFIX, "p.safetensors"),
            ppl("--model", MODEL, *PREFIX, "p.safetensors", "--vanilla", name="ppl-vanilla"),
            Program("adapter", ("intactkv", "export", "--model", MODEL, "--prefix", "p.safetensors", "--out", "a"),
                    files_of("a/*")),
        ), own=True),
        Kind("adapter", prefixed, ("adapter/*.json", "adapter/*.safetensors"),
             (ppl("--model", MODEL, *PREFIX, "adapter"),), own=True),
        Kind("token_cache", cached, ("outputs/cache/tokens/*",), (ppl("--model", MODEL),), own=True,
             rewritten=r"^outputs/cache/tokens/", without=None),
        Kind("kept_prefix", kept_prefix, ("modelzoo/prefixes/*/text-*", "modelzoo/prefixes/*/hello*"),
             (ppl("--model", MODEL, *PREFIX, "hello"),), own=True, rewritten=r"^modelzoo/prefixes/"),
        Kind("discovery", kept_prefix, ("modelzoo/prefixes/*/auto-*.json",),
             (ppl("--model", MODEL, *PREFIX, "auto:text.txt@4"),), own=True, rewritten=r"^modelzoo/prefixes/"),
        Kind("record", records, ("outputs/runs/*.json",), (
            Program("table", ("eval", "table", "--costs"), printed),
            Program("table-tasks", ("eval", "table", "tasks"), printed),
            Program("table-1", ("eval", "table", "1"), printed),
            Program("ppl-again", ("eval", "ppl", "--model", MODEL, *RTN, "--corpus", "text.txt", "--window", "32", "--limit",
                                  "2", "--json"), record),
            Program("plot", ("eval", "plot", "perplexity", "--model", "tiny-llama", "--out", "f.png"), files_of("f.csv")),
        ), without=_record_left_out),
        Kind("state", chats, ("out.state.safetensors",), (
            Program("resume", (*CALIBRATE, "out.safetensors"), tensors_of("out.safetensors")),
        ), own=True, rewritten=r"^out\.state|^modelzoo/"),
        Kind("curve", chats, ("whole.curve.jsonl",), (
            Program("plot", ("eval", "plot", "calibration", "--curves", "whole.curve.jsonl", "--out", "f.png"),
                    files_of("f.csv")),
        )),
        Kind("conversations", chats, ("datasets/ShareGPT_Vicuna_unfiltered/*.json",), (
            Program("calibrate", (*CALIBRATE, "new.safetensors"), tensors_of("new.safetensors")),
        ), without=_named(), rewritten="^modelzoo/"),
        Kind("task", tasks, ("datasets/lambada_openai/data/*", "datasets/piqa/plain_text/*", "datasets/hellaswag/data/*"), (
            Program("tasks", ("eval", "tasks", "--model", MODEL, "--data", "local", "--tasks",
                              "lambada_openai,piqa,hellaswag", "--json"), record),
        )),
        Kind("mmlu", tasks, ("datasets/mmlu/data/*/*.csv",), (
            Program("tasks", ("eval", "tasks", "--model", MODEL, "--data", "local", "--tasks", "mmlu", "--fewshot", "1",
                              "--json"), record),
        )),
        *(
            Kind(f"corpus-{file}", corpora, (file,), (
                Program("ppl", ("eval", "ppl", "--model", MODEL, "--corpus", name, *WINDOW[2:]), record),
                Program("calibrate", ("quantization", "--model", MODEL, "--recipe", "gptq", "--group-size", "32",
                                      "--calibration", name, "--calibration-samples", "2", "--calibration-length", "32",
                                      "--out", "q"), tensors_of("q/*.safetensors")),
            ))
            for file, name in [(name, name) for name in (
                "text.txt", "c.json", "c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.txt.gz", "c.parquet",
            )] + [("folder/*", "folder")]
        ),
        Kind("questions", mtbench, ("questions.jsonl",), (
            Program("mtbench", (*ANSWER, "a.jsonl"), lambda outcome, world: _turns(world / "a.jsonl")),
            Program("judge", (*JUDGE, "given.jsonl"), record),
        )),
        Kind("answers", mtbench, ("given.jsonl", "given.run.json"), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
            Program("mtbench", (*ANSWER, "given.jsonl"), lambda outcome, world: _turns(world / "given.jsonl")),
        ), rewritten=r"^given"),
        Kind("prompts", mtbench, ("prompts.jsonl", "references.jsonl"), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
        ), rewritten=r"^outputs/mt_bench/model_judgment/"),
        Kind("judgements", mtbench, ("outputs/mt_bench/model_judgment/*",), (
            Program("judge", (*JUDGE, "given.jsonl"), record),
        ), rewritten=r"^outputs/mt_bench/model_judgment/"),
        Kind("awq_zoo", zoo, ("zoo.pt",), (
            Program("quantize", ("quantization", "--model", MODEL, "--recipe", "awq-w3", "--group-size", "32", "--set",
                                 "weights.file=zoo.pt", "--out", "q"), tensors_of("q/*.safetensors")),
        )),
        Kind("export", exported, ("x/*.json", "x/*.safetensors"), (
            ppl("--model", "x"),
        )),
    )
}  # fmt: skip
