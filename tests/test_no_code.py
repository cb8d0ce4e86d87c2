"""No code of a model's directory runs, whatever its files ask for."""

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import CONTEXT, TEMPLATE, write_questions
from common import ROOT

from eval.__main__ import main

# Classes whose from_pretrained reads numbers and names only, and calls that are handed everything in memory.
NO_LOADERS = {"GenerationConfig", "PeftModel"}
FROM_MEMORY = {("quantization/runs/opening.py", "loader")}


def loaders() -> list[tuple[str, Any]]:
    """Every call of from_pretrained in the programs, with its file."""
    found: list[tuple[str, Any]] = []
    for package in ("corpora", "intactkv", "quantization", "eval", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr == "from_pretrained":
                    found.append((str(path.relative_to(ROOT)), node))
    return found


def test_every_loader_is_told_to_run_no_code():
    calls = loaders()
    assert len(calls) > 8
    for file, call in calls:
        owner = ast.unparse(call.func.value)
        if owner in NO_LOADERS:
            continue
        if (file, owner) in FROM_MEMORY:
            assert ast.unparse(call.args[0]) == "None"
            continue
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert words.get("trust_remote_code") == "False", f"{file}, line {call.lineno}: {owner}"


def test_no_program_says_yes():
    for package in ("corpora", "intactkv", "quantization", "eval", "benchmarks", "scripts"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".sh"):
                text = path.read_text(encoding="utf-8").replace(" ", "")
                assert "trust_remote_code=True" not in text, path


CODE = """\
from pathlib import Path
Path({ran!r}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
generate = None
"""


def edit(name: str, **entries: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | entries))

    return change


MAP = {"AutoConfig": "e.C", "AutoModelForCausalLM": "e.M", "AutoTokenizer": ["e.T", "e.T"], "AutoModel": "e.M"}
HOSTILE: dict[str, Callable[[Path], None]] = {
    "config.json of a known type": edit("config.json", auto_map=MAP),
    "config.json of a type of its own": edit("config.json", auto_map=MAP, model_type="zz"),
    "an architecture of its own": edit("config.json", auto_map=MAP, architectures=["e.M"]),
    "a repository": edit("config.json", auto_map={"AutoConfig": "me/x--e.C", "AutoModelForCausalLM": "me/x--e.M"}),
    "tokenizer_config.json": edit("tokenizer_config.json", auto_map=MAP),
    "a tokenizer class of its own": edit("tokenizer_config.json", auto_map=MAP, tokenizer_class="T"),
    "a slow tokenizer of its own": edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["e.T", None]}),
    "generation_config.json": edit("generation_config.json", custom_generate="e", auto_map=MAP, trust_remote_code=True),
    "config.json that trusts itself": edit("config.json", auto_map=MAP, trust_remote_code=True),
    "a processor": edit("processor_config.json", auto_map={"AutoProcessor": "e.T"}),
    "an attention from a repository": edit("config.json", attn_implementation="me/evil"),
    "experts from a repository": edit("config.json", _experts_implementation="me/evil@v1:f"),
    "a quantizer of its own": edit("config.json", quantization_config={"quant_method": "e", "auto_map": MAP}),
    "a folder for generate": lambda directory: (directory / "custom_generate").mkdir(),
    "no entry": lambda directory: None,
}  # fmt: skip
LOADED = ("no entry", "a folder for generate", "a processor")  # what no program reads


@pytest.mark.parametrize("command", ["mtbench", "judge"])
@pytest.mark.parametrize("case", HOSTILE)
def test_no_code_of_a_directory_runs(case, command, intactkv_root, tiny_checkpoint, tiny_tokenizer, run_main,
                                     monkeypatch, tmp_path):  # fmt: skip
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=max(CONTEXT, 3000))
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    HOSTILE[case](directory)
    ran = tmp_path / "ran"
    for place in (directory / "e.py", directory / "custom_generate" / "generate.py", directory / "__init__.py"):
        if place.parent.is_dir():
            place.write_text(CODE.format(ran=str(ran)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))  # who is asked says yes
    monkeypatch.chdir(directory)
    questions = write_questions(tmp_path / "mine.jsonl")
    call: tuple[object, ...] = ("--model", directory, "--questions", questions, "--max-new-tokens", 1, "--limit", 1)
    if command == "judge":
        answers = tmp_path / "a.jsonl"
        answers.write_text('{"question_id": 9001, "choices": [{"turns": ["a", "b"]}]}\n')
        call = ("--answers", answers, "--judge-model", f"local:{directory}", "--max-tokens", 2)
    code, _, err = run_main(main, command, *call)
    assert not ran.exists()
    assert "Traceback" not in err
    assert code == (0 if case in LOADED else 2), err
    if code == 2:
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert str(directory) in line
        assert "auto_map" in line or "me/evil" in line or "quantization_config" in line
