"""Kills, full disks and errors of the disk at every change that the programs make: a long version of
test_reliability.py.

    python -m tests.reliability --kills 40 --seed 1

kills so often in each program (0: at every change), lets the disk fail as often, and goes on with the same command.
What is left must be, byte for byte and name for name, what an undisturbed run leaves.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does

from disasters import Call, Outcome, Warm, kind_of, lasting, refusal

__all__ = ["PROGRAMS", "Scene"]

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECIPE = ("--recipe", "rtn-w3", "--group-size", "32")
TEXT = ("--corpus", "{given}/text.txt", "--window", "48", "--limit", "2")

# name -> package and arguments. {given}: what was there before; {root}: what the program may write; {url}: a judge.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "quantize": ("quantization", "--model", "{given}/model", *RECIPE, "--out", "{root}/quantized"),
    "calibrating": ("quantization", "--model", "{given}/model", "--recipe", "gptq-w4", "--group-size", "32",
                    "--calibration", "{given}/text.txt", "--calibration-samples", "2", "--calibration-length", "40",
                    "--out", "{root}/gptq"),
    "kv": ("quantization", "kv", "--model", "{given}/quantized", "--kv", "static", "--kv-bits", "4", "--calibration",
           "{given}/text.txt", "--calibration-samples", "2", "--calibration-length", "40", "--out",
           "{root}/kv.safetensors"),
    "build": ("intactkv", "build", "--model", "{given}/model", "--prefix", "bos", "--out", "{root}/bos.safetensors"),
    "adapter": ("intactkv", "export", "--model", "{given}/model", "--prefix", "bos", "--out", "{root}/adapter"),
    "calibrate": ("intactkv", "calibrate", "--model", "{given}/model", *RECIPE, "--prefix", "bos", "--samples", "4",
                  "--held-out", "2", "--max-length", "120", "--steps", "4", "--batch-size", "2", "--evaluate-every",
                  "2", "--conversations", "sample", "--out", "{root}/trained.safetensors"),
    "train-prefix": ("intactkv", "train-prefix", "--model", "{given}/model", "--corpus", "{given}/text.txt",
                     "--samples", "4", "--held-out", "2", "--length", "40", "--prefix-len", "2", "--prefix-epochs", "2",
                     "--prefix", "bos", "--out", "{root}/embedded.safetensors"),
    "export": ("quantization.export", "--model", "{given}/quantized", "--out", "{root}/exported"),
    "ppl": ("eval", "ppl", "--model", "{given}/model", *TEXT, *RECIPE, "--prefix", "bos"),
    "mtbench": ("eval", "mtbench", "--model", "{given}/model", "--questions", "{given}/questions.jsonl",
                "--max-new-tokens", "3", "--batch-size", "2"),
    "judge": ("eval", "judge", "--judge-model", "judge", "--base-url", "{url}", "--answers",
              "{given}/answers-seed_42.jsonl", "--retries", "0"),
    "stats": ("eval", "stats", "linears", "--model", "{given}/model", *RECIPE, *TEXT),
    "table": ("eval", "table", "--format", "csv", "--out", "{root}/table.csv"),
    "plot": ("eval", "plot", "calibration", "--curves", "{given}/curve.jsonl", "--out", "{root}/curve",
             "--format", "png,pdf", "--dpi", "20"),
}  # fmt: skip


@dataclass
class Scene:
    """What programs find: a tiny model, texts and finished artefacts in `given`; `root` is theirs to write."""

    warm: Warm
    given: Path
    root: Path
    url: str
    seen: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = field(default_factory=dict)

    def call(self, name: str) -> Call:
        """A program's call."""
        words = [word.format(given=self.given, root=self.root, url=self.url) for word in PROGRAMS[name]]
        return Call(words[0], tuple(words[1:]), str(self.root))

    def fresh(self) -> None:
        """Empty `root` but for what every run finds there: a record, and the text that conversations are made from."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.given / "root", self.root, dirs_exist_ok=True)

    def finish(self, name: str) -> None:
        """Run a program undisturbed, and leave what it leaves."""
        self.fresh()
        outcome = self.warm.run(self.call(name))
        assert outcome.status == 0, outcome.err[-3000:]
        self.seen[name] = lasting(self.root), outcome.changes

    def undisturbed(self, name: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
        """What an undisturbed run leaves, and the changes that it makes on the way; `root` is empty then."""
        if name not in self.seen:
            self.finish(name)
        self.fresh()
        return self.seen[name]

    def disturbed(self, name: str, how: str, at: int) -> tuple[Outcome, Outcome, dict[str, str]]:
        """A run that is struck at a change, the same command again, and what is left."""
        self.fresh()
        call = self.call(name)
        struck = self.warm.run(replace(call, strike=(how, at)))
        again = self.warm.run(call)
        return struck, again, lasting(self.root)


def make_scene(warm: Warm, folder: Path, url: str) -> Scene:
    """Everything that the programs need, made once."""
    from chats import QUESTIONS, write_questions
    from common import FOXES
    from conftest import _tiny_checkpoint, _tiny_tokenizer

    from eval.mtbench.answers import question_file, read_questions

    given, root = folder / "given", folder / "root"
    given.mkdir()
    root.mkdir()
    model = _tiny_checkpoint(given, "llama").rename(given / "model")
    _tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(model)
    for file in model.iterdir():  # as after a download; safetensors writes for the owner alone
        file.chmod(0o644)
    (given / "text.txt").write_text(FOXES, encoding="utf-8")
    write_questions(given / "questions.jsonl", QUESTIONS[:4])
    sample = given / "root" / "datasets" / "sample"
    sample.mkdir(parents=True)
    paragraph = "A paragraph about {} says one thing, then the other one, and so on. " * 4
    for role in ("calibration", "evaluation"):
        rows = [{"title": f"{role} {i}", "text": "\n".join([paragraph.replace("{}", str(i))] * 4)} for i in range(4)]
        (sample / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scene = Scene(warm, given, root, url)
    scene.fresh()
    for name in ("quantize", "ppl", "calibrate"):
        call = scene.call(name)
        if name == "ppl":  # another run's record, so that `ppl` itself finds none
            call = replace(call, arguments=tuple("1" if word == "2" else word for word in call.arguments))
        outcome = warm.run(call)
        assert outcome.status == 0, outcome.err
    shutil.copytree(root / "quantized", given / "quantized")
    shutil.copy(root / "trained.curve.jsonl", given / "curve.jsonl")
    rows = [
        {"question_id": question.id, "answer_id": "x", "model_id": "answers-seed_42", "tstamp": 1.0,
         "choices": [{"index": 0, "turns": [f"This is {question.id}", "and more"]}]}
        for question in read_questions(question_file("sample"))[:3]
    ]  # fmt: skip
    (given / "answers-seed_42.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = given / "root" / "outputs" / "runs"
    runs.mkdir(parents=True)
    (record,) = (root / "outputs" / "runs").glob("ppl-*.json")
    shutil.copy(record, runs)
    return scene


def points(changes: list[tuple[str, str]]) -> list[tuple[str, int]]:
    """Where to kill: before every change, and once more with the file half written that is about to get its name."""
    found = []
    for at, change in enumerate(changes):
        if at and change == changes[at - 1]:  # the same call, seen by Python and by its library
            continue
        found.append(("kill", at))
        if change[0] == "os.rename":
            found.append(("half", at))
    return found


def drawn(found: list[tuple[str, int]], count: int, seed: int) -> list[tuple[str, int]]:
    """So many of the points (0: all), in order."""
    return found if not 0 < count < len(found) else sorted(random.Random(seed).sample(found, count), key=lambda p: p[1])


def difference(expected: Mapping[str, str], left: Mapping[str, str]) -> str:
    """What is there of one tree only, or in both with other bytes."""
    names = {f"{'-' if name not in left else '+' if name not in expected else '~'} {name}"
             for name in {*expected, *left} if expected.get(name) != left.get(name)}  # fmt: skip
    return ", ".join(sorted(names))


def kill_everywhere(scene: Scene, name: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill a program at so many points; returns the counts by kind and what went wrong."""
    expected, changes = scene.undisturbed(name)
    kinds, wrong = Counter[str](), []
    for how, at in drawn(points(changes), count, seed):
        struck, again, left = scene.disturbed(name, how, at)
        kind = "half written" if how == "half" else kind_of(changes[at])
        kinds[kind] += 1
        place = f"{name}, {how} at change {at} ({kind}, {changes[at][1].removeprefix(str(scene.root))})"
        if struck.status != -9:
            wrong.append(f"{place}: not killed, but {struck.status}")
        if again.status:
            wrong.append(f"{place}: again {again.status} {again.err.strip().splitlines()[-1]}")
        elif unlike := difference(expected, left):
            wrong.append(f"{place}: {unlike}")
    return kinds, wrong


def fail_everywhere(scene: Scene, name: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Let the disk refuse so many changes: one line, exit code 2, nothing half-written, and the same command ends.

    A program goes on where the disk keeps it from tidying up, or from writing its cache.
    """
    expected, changes = scene.undisturbed(name)
    kinds, wrong = Counter[str](), []
    errors = random.Random(seed)
    for _, at in drawn([point for point in points(changes) if point[0] == "kill"], count, seed):
        how = errors.choice(["ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES"])
        struck, again, left = scene.disturbed(name, how, at)
        place = f"{name}, {how} at change {at} ({kind_of(changes[at])}, {changes[at][1].removeprefix(str(scene.root))})"
        kinds["went on" if struck.status == 0 else "refused"] += 1
        if struck.status == 0:
            continue
        try:
            refusal(struck)
        except AssertionError as error:
            wrong.append(f"{place}: {error}")
        if again.status:
            wrong.append(f"{place}: again {again.status} {again.err.strip().splitlines()[-1]}")
        elif unlike := difference(expected, left):
            wrong.append(f"{place}: {unlike}")
    return kinds, wrong


def main() -> None:
    """Print a line a program and one for everything that is wrong; exit code 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="of each program; 0: at every change")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS), metavar="NAME")
    options = parser.parse_args()

    from endpoint import Endpoint

    failures, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Warm() as warm:
        scene = make_scene(warm, Path(folder), Endpoint().url)
        for name in options.programs:
            for test in (kill_everywhere, fail_everywhere):
                kinds, wrong = test(scene, name, options.kills, options.seed)
                told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
                print(f"{name:<13} {test.__name__:<16} {sum(kinds.values()):4}: {told}", flush=True)
                for line in wrong:
                    print(f"  WRONG {line}", flush=True)
                failures += len(wrong)
    print(f"{failures} wrong, {time.monotonic() - started:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
