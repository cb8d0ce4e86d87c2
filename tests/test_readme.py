"""The README says what is true: its files exist, its Python runs, its commands are understood."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_layout_exists():
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    folder = ROOT
    named = []
    for line in layout.splitlines():
        for name in re.findall(r"(?:^|\s)(\w+\.py|\w+/)(?=\s|$)", line):
            if not line.startswith(" ") and name.endswith("/"):
                folder = ROOT / name
                named.append(folder)
            else:
                named.append(folder / name)
    assert len(named) > 25
    assert [str(path.relative_to(ROOT)) for path in named if not path.exists()] == []


def test_every_module_of_the_packages_is_in_the_layout():
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    for package in ("intactkv", "quantization", "eval"):
        modules = [path.name for path in (ROOT / package).glob("*.py") if not path.name.startswith("__")]
        assert [name for name in modules if name not in layout] == []


def test_every_relative_link_and_script_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"bash (scripts/\S+\.sh)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_python_example_runs(tmp_path):
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
