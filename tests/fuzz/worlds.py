"""Worlds: directories that hold whole files of some kinds, as the programs left them, a kill among them."""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chats import TEMPLATE
from common import FOXES
from conftest import _tiny_checkpoint, _tiny_tokenizer
from report_worlds import answer

from fuzz.engine import Outcome, Scratch, call
from intactkv.families.llama import LLAMA

__all__ = ["ANSWER", "CALIBRATE", "CHAT", "JUDGE", "MODEL", "NEEDLE", "QUANTIZE", "RTN", "TALK", "WINDOW"]

MODEL = "modelzoo/tiny-llama"


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


def copied(world: Path, scratch: Scratch, build: Callable[[Path, Scratch], None]) -> None:
    shutil.copytree(scratch.template(build.__name__, build), world, dirs_exist_ok=True)


QUANTIZE = ("quantization", "--model", MODEL, "--recipe", "rtn-w4", "--group-size", "32", "--out")
WINDOW = ("--corpus", "text.txt", "--window", "32", "--limit", "2", "--json", "--force")
RTN = ("--recipe", "rtn-w4", "--group-size", "32")


def quantized(world: Path, scratch: Scratch) -> None:
    copied(world, scratch, dense)
    ran(world, *QUANTIZE, "q")


def coded(world: Path, scratch: Scratch) -> None:
    """A checkpoint of binary codes."""
    copied(world, scratch, dense)
    ran(world, "quantization", "--model", MODEL, "--recipe", "bcq-w3", "--group-size", "32", "--out", "q")


TEXT = ("--calibration", "text.txt", "--calibration-samples", "2", "--calibration-length", "32")
STATIC = ("--kv", "static", "--kv-bits", "4", "--prefix", "bos", "--calibrate-behind-prefix", *TEXT)


def rotated(world: Path, scratch: Scratch) -> None:
    """A checkpoint with rescalings, online rotations and a KV policy that it was trained with."""
    copied(world, scratch, dense)
    ran(world, "quantization", "--model", MODEL, "--recipe", "smoothquant-w8a8", "--set",
        "tuning=zeroquant-w8a8-lkd", "--set", "tuning.steps=1", "--kv", "static", "--kv-bits", "4", *TEXT,
        "--out", "q")  # fmt: skip


def calibrated(world: Path, scratch: Scratch) -> None:
    """What a KV policy was calibrated to, as the programs keep it, and by itself."""
    copied(world, scratch, dense)
    ran(world, "eval", "ppl", "--model", MODEL, *STATIC, *WINDOW)
    ran(world, "quantization", "kv", "--model", MODEL, *STATIC, "--out", "kv.safetensors")
    shutil.rmtree(world / "outputs")


KVQUANT = ("--kv", "kvquant", "--kv-bits", "2", "--set", "kv_cache.file=quantizers.pickle", *TEXT)


def quantizers(world: Path, scratch: Scratch) -> None:
    """A pickle as KVQuant's own code writes it, for the tiny LLaMA: 2 layers, 2 KV heads of 16 channels."""
    copied(world, scratch, dense)
    levels = np.linspace(-0.9, 0.9, 4, dtype=np.float32)[::-1, None]
    content = {
        f"{LLAMA.block_name(layer)}.{linear}": (torch.full((1, 32), 1.5), torch.full((1, 32), -1.5), [levels.copy()])
        for layer in range(2)
        for linear in (LLAMA.rope_key, LLAMA.value)
    }
    (world / "quantizers.pickle").write_bytes(pickle.dumps(content))


def partial_kv(world: Path, scratch: Scratch) -> None:
    """A calibration of a KV policy that was killed behind its first layer."""
    from quantization.kv_cache import StaticPerHead

    copied(world, scratch, dense)
    fit, done = StaticPerHead.fit_block, []

    def killed(self: Any, block: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return fit(self, block)

    StaticPerHead.fit_block = killed  # type: ignore[method-assign]
    try:
        call(world, ("quantization", "kv", "--model", MODEL, *STATIC))
    except KeyboardInterrupt:
        pass
    finally:
        StaticPerHead.fit_block = fit  # type: ignore[method-assign]
    assert list(world.glob("modelzoo/kv/*/*.partial/layer-*")), list(world.rglob("*.partial"))


def partial_(world: Path, scratch: Scratch) -> None:
    """A run that was killed behind its first block."""
    from quantization.runs import one_block

    copied(world, scratch, dense)
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
    copied(world, scratch, dense)
    ran(world, "intactkv", "build", "--model", MODEL, "--prefix", "hello", "--out", "p.safetensors")
    ran(world, "intactkv", "export", "--model", MODEL, "--prefix", "p.safetensors", "--out", "adapter")


def cached(world: Path, scratch: Scratch) -> None:
    copied(world, scratch, dense)
    ran(world, "eval", "ppl", "--model", MODEL, *WINDOW)
    shutil.rmtree(world / "outputs" / "runs")


def kept_prefix(world: Path, scratch: Scratch) -> None:
    """A prefix and a discovery of the model's, as the programs keep them."""
    copied(world, scratch, dense)
    for prefix in ("hello", "auto:text.txt@4"):
        ran(world, "eval", "ppl", "--model", MODEL, *RTN, "--prefix", prefix, *WINDOW)
    shutil.rmtree(world / "outputs")


def records(world: Path, scratch: Scratch) -> None:
    copied(world, scratch, dense)
    for words in ((), RTN, (*RTN, "--prefix", "bos")):
        ran(world, "eval", "ppl", "--model", MODEL, *words, *WINDOW)
    _tasks(world)
    ran(world, "eval", "tasks", "--model", MODEL, "--tasks", "piqa", "--data", "local", "--limit", "2", "--json")
    ran(world, *NEEDLE)
    ran(world, *TALK)


def reported(world: Path, scratch: Scratch) -> None:
    """A published table, of which two figures were run."""
    from eval.tables.asked import cells_of
    from eval.tables.noted import note
    from eval.tables.papers import PAPERS

    paper = PAPERS["intactkv-1"]
    note([(paper, [Path(MODEL)])], [])
    for cell in cells_of(paper, Path(MODEL))[:2]:
        answer(cell.runs[0], 9.5)


def submitted(world: Path, scratch: Scratch) -> None:
    """A submission whose jobs have left the queue: one task is done, one said that it failed."""
    from eval.cluster.states import keep_note, write_jobs
    from eval.cluster.tasks import read_tasks

    copied(world, scratch, dense)
    ran(world, "eval", "cluster", "submit", "intactkv-1", "--model", MODEL, "--only", "RTN", "--name", "n", "--dry-run")
    answer(read_tasks("n")[1].call.first, 9.5)
    write_jobs("n", [{"job": "7", "array": 0, "first": 0, "tasks": [0], "submitted": "2026"}])
    keep_note("n", 0, {"state": "failed", "job": "7_0", "host": "h", "pid": 1, "started": "2026", "said": "why"})


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
    copied(world, scratch, dense)
    _tasks(world)


def corpora(world: Path, scratch: Scratch) -> None:
    import datasets
    import zstandard

    copied(world, scratch, dense)
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

    copied(world, scratch, dense)
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
    copied(world, scratch, dense)
    reference = "\n[Reference] {ref_answer_1}"
    later = "[Q] {question_1} [A] {answer_1} [Q] {question_2} [A] {answer_2}"
    templates = {"single-v1": "[Q] {question} [A] {answer}",
                 "single-math-v1": f"[Q] {{question}} [A] {{answer}}{reference}",
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


NEEDLE = ("eval", "needle", "--model", MODEL, "--lengths", "400", "--depths", "0,100", "--keys", "2",
          "--max-new-tokens", "2", "--kv-bits", "4", "--json")  # fmt: skip
CHAT = ("eval", "chat", "--model", MODEL, "--script", "script.txt", "--max-new-tokens", "2", "--out", "t.json")


TALK = ("eval", "chat", "--model", MODEL, "--prompt", "riddle", "--max-new-tokens", "2", "--json")


def needles(world: Path, scratch: Scratch) -> None:
    """A grid that was killed behind its second key."""
    from eval import needle

    copied(world, scratch, dense)
    look_for = needle.look_for

    def killed(*arguments: Any) -> Any:
        for count, row in enumerate(look_for(*arguments)):
            if count == 2:
                raise KeyboardInterrupt
            yield row

    needle.look_for = killed
    try:
        call(world, NEEDLE)
    except KeyboardInterrupt:
        pass
    finally:
        needle.look_for = look_for
    assert list((world / "outputs/needle").glob("*.jsonl")), list(world.iterdir())


def talked(world: Path, scratch: Scratch) -> None:
    """A script and its transcript."""
    copied(world, scratch, dense)
    (world / "script.txt").write_text("What is a fox?\nWhy?\n/reset\nAnd a dog?\n")
    ran(world, *CHAT)


def zoo(world: Path, scratch: Scratch) -> None:
    copied(world, scratch, dense)
    ran(world, "quantization", "--model", MODEL, "--recipe", "awq-w3", "--group-size", "32", "--calibration",
        "text.txt", "--calibration-samples", "2", "--calibration-length", "32", "--set", "calibration.draw=segments",
        "--out", "search")  # fmt: skip
    ran(world, "quantization", "export", "--format", "awq-search", "--model", "search", "--out", "zoo.pt")


def exported(world: Path, scratch: Scratch) -> None:
    copied(world, scratch, quantized)
    ran(world, "quantization", "export", "--model", "q", "--format", "dense", "--prefix", "bos", "--out", "x")
