"""The container recipes: what they copy is there, both do the same, and nothing that is heavy or private gets in.

Whether an image builds is not tested: it takes a registry and minutes.
"""

import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from common import ROOT

DOCKER = (ROOT / "container" / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "container" / "intactkv.def").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
HOME = "/opt/intactkv"


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKER, flags=re.MULTILINE))
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def sections() -> dict[str, list[str]]:
    """The lines of every section of the Apptainer recipe, comments left out; "" is the head."""
    found: dict[str, list[str]] = {"": []}
    for line in APPTAINER.splitlines():
        if line.startswith("%"):
            name = line[1:]
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name if len(found) > 1 else ""].append(line.strip())
    return found


def tracked() -> list[str]:
    """Files of the checkout that git holds."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("git, which says what the checkout holds, is not here")
    told = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.splitlines()


def is_ignored(file: str) -> bool:
    """By the rules of .dockerignore: the last one that fits decides; a folder takes its files along."""
    parts = Path(file).parts
    ignored = False
    for rule in IGNORED:
        plain = rule.removeprefix("!").removeprefix("**/")
        places = ["/".join(parts[: i + 1]) for i in range(len(parts))] + (list(parts) if "**/" in rule else [])
        if any(fnmatch(place, plain) for place in places):
            ignored = not rule.startswith("!")
    return ignored


def test_what_the_dockerfile_copies_is_there_and_all_of_the_code_comes_along() -> None:
    copied = [shlex.split(words) for name, words in instructions() if name == "COPY"]
    for _, *files, _ in copied:
        assert all((ROOT / file).exists() for file in files)
    assert copied[-1][1:] == [".", "."]
    left_out = [file for file in tracked() if is_ignored(file) and not file.startswith(".ci/")]
    assert left_out == []


@pytest.mark.parametrize("file", [
    ".git/config", ".venv/bin/python", ".venv-oldest/x", "cluster.env", "outputs/runs/x.json", "eval/__pycache__/a.pyc",
    "modelzoo/llama-2/llama-2-7b/model.safetensors", "datasets/wikitext/x.parquet", ".mypy_cache/x",
])  # fmt: skip
def test_what_is_made_or_private_stays_out_of_the_image(file: str) -> None:
    assert is_ignored(file)


def test_the_apptainer_recipe_copies_all_of_the_code_to_the_same_place() -> None:
    pairs = [line.split() for line in sections()["files"]]
    assert all((ROOT / source).exists() and target == f"{HOME}/{source}" for source, target in pairs)
    sources = [source for source, _ in pairs]
    within = [file for file in tracked() if not any(file == s or file.startswith(f"{s}/") for s in sources)]
    assert [file for file in within if not file.startswith(".ci/")] == []


def test_both_recipes_start_from_one_image_and_run_the_same_scripts() -> None:
    (base,) = [words for name, words in instructions() if name == "FROM"]
    assert f"From: {base.removeprefix('docker.io/library/')}" in sections()[""]
    assert base.rpartition(":")[2].startswith("3.11")
    ran = "\n".join(words.replace("&&", "\n") for name, words in instructions() if name == "RUN")
    scripts = re.findall(r"bash (scripts/\S+(?: [\w-]+)*)", ran)
    assert scripts == re.findall(r"bash (scripts/\S+(?: [\w-]+)*)", "\n".join(sections()["post"]))
    assert all((ROOT / script.split()[0]).is_file() for script in scripts)
    test = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    prepared = re.findall(r"^bash (scripts/\S+(?: [\w-]+)*)", test, re.MULTILINE)
    assert set(prepared) - {"scripts/setup.sh oldest"} == set(scripts)  # so that both commands need no network


def test_the_image_runs_without_root_and_asks_no_hub() -> None:
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("COPY")
    assert ("USER", "intactkv") in instructions()
    for text in (DOCKER, "\n".join(sections()["environment"])):
        assert "HF_HUB_OFFLINE=1" in text
        assert f"PATH={HOME}/.venv/bin:$PATH" in text


@pytest.mark.parametrize("name", ["post", "environment", "runscript"])
def test_a_shell_reads_the_sections_of_the_apptainer_recipe(name: str) -> None:
    subprocess.run(["sh", "-n"], input="\n".join(sections()[name]), text=True, check=True)
