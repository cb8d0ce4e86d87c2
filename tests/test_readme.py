"""README and docs/ say what is true: what they name exists, their commands are understood, the README's Python runs."""

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from quantization.named import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
         for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}  # fmt: skip
README = PAGES["README.md"]
PLACEHOLDERS = {"NAME", "…", "KIND", "--recipe"}  # of a recipe, in commands that stand for many


def words(line: str) -> list[str]:
    """A command's words, without the marks of what may be left out or chosen."""
    return [word.strip("[]()").split("|")[0] for word in line.partition(" # ")[0].split() if word.strip("[]()")]


def commands(text: str) -> list[list[str]]:
    """Every command of a page: lines of code blocks, joined where they go on, and code within the text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words(line) for line in lines + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def help_of(module: str, *subcommands: str) -> str:
    """What a program says when asked for help; run in this process, since torch takes seconds to import."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [module, *subcommands, "--help"]
    try:
        with redirect_stdout(said), pytest.raises(SystemExit) as stop:
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = argv
    assert stop.value.code == 0, f"python -m {module} {' '.join(subcommands)}"
    return said.getvalue()


def program_calls() -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """(page, module, subcommands, options) of every `python -m` in the pages, each once."""
    found = {}
    for page, text in PAGES.items():
        for line in commands(text):
            if "-m" not in line or "python" not in " ".join(line[: line.index("-m")]):
                continue
            module, *rest = line[line.index("-m") + 1 :]
            if module == "pytest":
                continue
            first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
            named = [word.replace("KIND", "act") for word in rest[:first]]
            subcommands = [word for word in named if re.fullmatch(r"[a-z0-9-]+", word)]
            options = [word.partition("=")[0] for word in rest[first:] if re.match(r"--[a-z]", word)]
            found[page, module, tuple(subcommands), tuple(options)] = None
    return list(found)


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_every_script_exists_and_knows_the_variables_in_front_of_it(page: str) -> None:
    scripts = {script.name for room in ("scripts", "benchmarks") for script in (ROOT / room).rglob("*.sh")}
    for name in re.findall(r"([\w/]+\.sh)\b", PAGES[page].replace("tableN.sh", "table1.sh")):
        assert (ROOT / name).is_file() or name in scripts, name
    common = (ROOT / "scripts" / "common.sh").read_text(encoding="utf-8")
    for line in commands(PAGES[page]):
        if "bash" not in line[:-1]:
            continue
        script = (ROOT / line[line.index("bash") + 1]).read_text(encoding="utf-8")
        for variable in re.findall(r"\b([A-Z_]{2,})=", " ".join(line[: line.index("bash")])):
            assert re.search(rf"\b{variable}\b", script + common), (line, variable)


@pytest.mark.parametrize(("page", "module", "subcommands", "options"), program_calls())
def test_every_program_knows_the_options_that_the_pages_give_it(
    page: str, module: str, subcommands: tuple[str, ...], options: tuple[str, ...]
) -> None:
    if module.startswith("benchmarks."):  # these import everything that they measure
        known = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert [option for option in options if f'"{option}"' not in known] == []
        return
    known = help_of(module, *subcommands)
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_the_text_names_alone_is_one_of_some_program(page: str) -> None:
    source = "".join(file.read_text(encoding="utf-8") for room in ("quantization", "eval", "benchmarks", "intactkv")
                     for file in (ROOT / room).rglob("*.py"))  # fmt: skip
    named = {line[0].partition("=")[0] for line in commands(PAGES[page]) if line and re.match(r"--[a-z]", line[0])}
    assert [option for option in sorted(named) if f'"{option}"' not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_in_the_text_exists(page: str) -> None:
    rooms = r"intactkv|quantization|eval|corpora|benchmarks|scripts|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w/.]*)`", PAGES[page]):
        assert "NAME" in name or "tableN" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_of_a_command_exists(page: str) -> None:
    named = [line[i + 1] for line in commands(PAGES[page]) for i, word in enumerate(line[:-1]) if word == "--recipe"]
    assert [name for name in named if name not in RECIPES and name not in PLACEHOLDERS] == []


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_methods_table_names_recipes_that_exist_and_some_of_every_family(page: str) -> None:
    """A name may be shortened to its end, `-w6a6`, or to what is exchanged in those before, `w4a8kv4`."""
    rows = re.findall(r"^\|.*arxiv\.org.*\|$|^\|.*the same paper.*\|$", PAGES[page], re.MULTILINE)
    families = set()
    for row in rows:
        names = [name for name in re.findall(r"`([\w.-]+)`", row) if not name.startswith("--")]
        families |= (own := {name.split("-")[0] for name in names if name in RECIPES})
        known = [name for name in RECIPES if name.split("-")[0] in own]
        assert [name for name in names if not any(f"-{name.strip('-')}-" in f"-{full}-" for full in known)] == []
    assert families == {name.split("-")[0] for name in RECIPES} - {"fp16"}


def test_the_layout_names_every_folder_and_no_other() -> None:
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    named, top = set(), ""
    for line in layout.strip("\n").splitlines():
        column = line[: re.search(r"(?<=\S)\s{2,}|$", line).start()]  # type: ignore[union-attr]
        folders = re.findall(r"(\w+)/", column)
        assert folders, line
        if not line.startswith(" "):
            top = folders[-1]
        named |= {f"{top}/{folder}" if line.startswith(" ") else folder for folder in folders}
    tops = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))} - {
        "outputs"
    }
    rooms = {"/".join(path.relative_to(ROOT).parts[:2]) for path in ROOT.glob("*/*/*.py")}
    assert named == tops | rooms


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    if not (ROOT / "modelzoo" / "smollm2" / "smollm2-135m" / "config.json").exists():
        pytest.skip("scripts/prepare/model.sh smollm2 135m has not run")
    (tmp_path / "modelzoo").mkdir()
    (tmp_path / "modelzoo" / "smollm2").symlink_to(ROOT / "modelzoo" / "smollm2")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "INTACTKV_ROOT": str(tmp_path)}
    example = README.partition("```python\n")[2].partition("```")[0]
    (command,) = re.findall(r"^\.venv/bin/python (-m quantization .*)$", README, re.MULTILINE)
    for arguments in (command.split(), ["-c", example]):
        result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True,
                                text=True, timeout=600, check=False)  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert "assistant" in result.stdout
    assert "Paris" in result.stdout.rpartition("assistant")[2]
