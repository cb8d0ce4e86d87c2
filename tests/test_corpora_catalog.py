"""The catalogue: names, places and defaults; the list of `python -m corpora`; the two README files agree with it."""

import json
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pytest
from common import ROOT

from corpora.catalog import (
    CORPORA,
    FAMILIES,
    CalibrationText,
    ModelDefaults,
    corpus_files,
    model_defaults,
    model_directory,
)
from corpora.errors import UserError
from corpora.mmlu import MMLU_ARCHIVE
from corpora.task_data import SAMPLE_TASKS_NAME, TASK_DATA

PUBLISHED = ModelDefaults(("wikitext2", "c4"), 128, None)
SMALL = ModelDefaults(("sample",), 64, CalibrationText("sample", 16, 512), "sample", "sample")


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("smollm2-135m", SMALL),
        ("smollm2-135m/rtn-w4g64-1f3a9c02", SMALL),
        ("/data/modelzoo/smollm2/smollm2-135m/", SMALL),
        ("SmolLM2-135M-Instruct", SMALL),
        ("llama-2-7b", PUBLISHED),
        ("modelzoo/vicuna-v1.5/vicuna-v1.5-7b", PUBLISHED),
        ("opt-125m/smoothquant-w8a8-00112233", PUBLISHED),
        ("somebody/else", PUBLISHED),
        ("", PUBLISHED),
    ],
)
def test_defaults_are_found_by_the_name(name: str, defaults: ModelDefaults) -> None:
    assert model_defaults(name) == defaults


def test_models_lie_in_family_and_family_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    expected = tmp_path / "modelzoo/vicuna-v1.5/vicuna-v1.5-7b"
    assert model_directory("vicuna-v1.5", "7b") == expected
    assert model_directory("vicuna-v1.5", "vicuna-v1.5-7b") == expected  # as the published scripts write it
    assert model_directory("qwen3", "0.6B") == tmp_path / "modelzoo/qwen3/qwen3-0.6b"
    with pytest.raises(UserError, match=r"'9b' of vicuna-v1\.5; known are 7b, 13b"):
        model_directory("vicuna-v1.5", "9b")
    with pytest.raises(UserError, match=r"'vicuna'; known are smollm2, llama, "):
        model_directory("vicuna", "7b")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_the_name_without_its_last_dash_part(family: str) -> None:
    for size in FAMILIES[family].sizes:
        assert model_directory(family, size).name.rpartition("-") == (family, "-", size)


@pytest.mark.parametrize(
    ("corpus", "role", "file"),
    [
        ("wikitext2", "evaluation", "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("wikitext2", "calibration", "wikitext/wikitext-2-raw-v1/train/0000.parquet"),
        ("wikitext2", "evaluation", "wikitext/wikitext-2-raw-v1/wikitext-test.parquet"),
        ("wikitext2", "calibration", "wikitext/train/data-00000-of-00001.arrow"),
        ("wikitext2", "evaluation", "wikitext/wikitext-2-raw-v1/0.0.0/0123abcd/wikitext-test.arrow"),
        ("ptb", "evaluation", "ptb_text_only/penn_treebank/test/0000.parquet"),
        ("ptb", "calibration", "ptb_text_only/ptb.train.txt"),
        ("c4", "evaluation", "allenai/c4/en/c4-validation.00000-of-00008.json.gz"),
        ("c4", "calibration", "allenai/c4/en/c4-train.00000-of-01024.json"),
        ("pile", "evaluation", "pile-val-backup/val.jsonl.zst"),
        ("sharegpt", "calibration", "ShareGPT_Vicuna_unfiltered/ShareGPT_V4.3_unfiltered_cleaned_split.json"),
    ],
)
def test_known_layouts_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str, role: str, file: str
) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    assert corpus_files(corpus, role) == []
    path = tmp_path / "datasets" / file
    path.parent.mkdir(parents=True)
    path.touch()
    (path.parent / f".{path.name}.123.partial").touch()
    assert corpus_files(corpus, role) == [path]


@pytest.mark.parametrize(
    ("corpus", "folder"),
    [("wikitext2", "wikitext/test"), ("c4", "allenai/c4/validation"), ("pile", "pile-val-backup/validation")],
)
def test_what_datasets_caches_in_a_folder_is_no_part_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str, folder: str
) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    directory = tmp_path / "datasets" / folder
    directory.mkdir(parents=True)
    (directory / "cache-0123456789abcdef.arrow").touch()
    assert corpus_files(corpus, "evaluation") == []
    shards = [directory / f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for shard in shards:
        shard.touch()
    assert corpus_files(corpus, "evaluation") == shards


def rows(readme: str, number: int = 0) -> list[list[str]]:
    """Cells of a table of a README, by its number, without its head."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[number].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_data_sets_agrees_with_the_catalogue() -> None:
    table = {row[0].strip("`"): row for row in rows("datasets/README.md")}
    assert sorted(table) == sorted(CORPORA)
    for name, corpus in CORPORA.items():
        assert table[name][1] == f"`{corpus.folder}`"
        assert table[name][2] == (f"`{corpus.hub_id}`" if corpus.hub_id else "none: made from a package")


def test_the_table_of_tasks_agrees_with_what_is_read() -> None:
    table = {row[0].strip("`"): row for row in rows("datasets/README.md", 1)}
    assert list(table) == [*TASK_DATA, "mmlu", SAMPLE_TASKS_NAME]
    assert MMLU_ARCHIVE in table["mmlu"][2]
    for name, task in TASK_DATA.items():
        config, split = re.fullmatch(r"`(.*)`, (\w+)", table[name][3]).groups()
        assert table[name][1:3] == [f"`{task.folders[0]}`", f"`{task.hub_id}`"]
        assert next(iter(task.splits)) == split
        assert f"{config}/{split}-*.parquet" in task.splits[split]
        file = table[name][4].strip("`")
        assert file == "–" or any(PurePath("x", file).match(pattern) for pattern in task.splits[split])


def test_the_table_of_models_agrees_with_the_catalogue() -> None:
    table = {row[0].strip("`"): row for row in rows("modelzoo/README.md")}
    assert list(table) == list(FAMILIES)
    for name, family in FAMILIES.items():
        first, hub_id = next(iter(family.sizes.items()))
        assert re.findall(r"`(.*?)`", table[name][1]) == list(family.sizes)
        assert table[name][2] == (f"`{hub_id}`" if hub_id else "none: made from a package")
        assert table[name][3] == f"`{name}/{name}-{first}`"


PAGES = [page for pattern in ("*.md", "*/*.md", "scripts/**/*.sh", "corpora/*.py", "eval/**/*.py",
                              "quantization/**/*.py") for page in ROOT.glob(pattern)]  # fmt: skip


def test_every_model_that_a_page_a_script_or_a_program_names_is_one_of_the_catalogue() -> None:
    models = {f"modelzoo/{name}/{name}-{size}" for name, family in FAMILIES.items() for size in family.sizes}
    named = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named |= dict.fromkeys(re.findall(r"modelzoo/(?!prefixes|quantized)[\w.-]+/[a-z][\w.]*-[\w.-]*\w", text), page)
    assert {path: page for path, page in named.items() if path not in models} == {}
    assert len(named) > 3


def run(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "corpora", *arguments]
    environment = {"INTACTKV_ROOT": str(root), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(root)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], []])
def test_help_and_list_do_not_wait_for_torch(tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments, root=tmp_path)
    assert result.returncode == 0
    assert "prepare" in result.stdout
    for slow in ("torch", "transformers", "datasets", "pyarrow", "huggingface_hub"):
        assert not re.search(rf"\| +{slow}$", result.stderr, re.MULTILINE), slow


def test_the_list_says_what_is_here(tmp_path: Path) -> None:
    file = tmp_path / "datasets/pile-val-backup/val.jsonl"
    file.parent.mkdir(parents=True)
    file.touch()
    listed = {(row["kind"], row["name"]): row for row in json.loads(run("--json", root=tmp_path).stdout)}
    assert [name for (_, name), row in listed.items() if row["present"]] == ["pile"]
    assert listed["model", "llama-2 7b"]["directory"] == "modelzoo/llama-2/llama-2-7b"
    assert listed["data", "c4"]["get"] == "bash scripts/prepare/data.sh c4"
    assert listed["task", "hellaswag"]["directory"] == "datasets/hellaswag"
    assert listed["task", "hellaswag"]["get"] == "bash scripts/prepare/data.sh hellaswag"
    assert listed["task", "mmlu"]["get"] == f"unpack {MMLU_ARCHIVE} there"
    lines = run(root=tmp_path).stdout.splitlines()
    assert len(lines) == 1 + len(listed)
    assert re.fullmatch(r"data +pile +present +datasets/pile-val-backup +bash scripts/prepare/data\.sh pile", lines[4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "data", "nothing"], "known are wikitext2, ptb, c4, pile, sharegpt, sample"),
        (["prepare", "model", "llama-2"], "7b, 13b, 70b"),
        (["prepare", "model", "gpt", "7b"], "known are smollm2"),
        (["prepare", "data", "sample", "7b"], "one too many"),
        (["prepare", "data", "sample\udcff"], r"the argument 'sample\udcff' is no text in UTF-8"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments, root=tmp_path)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("data.sh", []), ("data.sh", ["a", "b"]), ("model.sh", []), ("model.sh", ["llama-2"]), ("model.sh", list("abc"))],
)
def test_a_script_called_wrongly_says_its_usage_in_one_line(tmp_path: Path, script: str, arguments: list[str]) -> None:
    command = ["bash", str(ROOT / "scripts/prepare" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(rf"error: usage: {script} .*\n", result.stderr)
