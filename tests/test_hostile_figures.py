"""Figures of names and curves that strangers wrote, and on a disk that is full: drawn as they stand, or in one line."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from corpora.errors import UserError
from corpora.writing import write_all
from eval.plots.calibration import draw_calibration, read_curve
from eval.plots.canvas import FORMATS, Output, file_name, literal, plt

NAMES = [r"$\frac{", "$x$", r"100 % of_a_b^c {\LaTeX}", "\x1b[31mred", "a\0b", "_hidden", "\ud800", "two\nlines", "$"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_words_in_every_format(name, tmp_path):
    figure, axes = plt.subplots()
    axes.plot([1, 200], label=literal(name))
    axes.set_title(name)
    axes.set_yscale("log")
    axes.set_xticks([0, 1], [literal(name), "b"])
    legend = axes.legend()
    figure.suptitle(name)
    output = Output(tmp_path / "name", tuple(FORMATS), 50)
    output.save(figure, ("name",), [(name,)])
    assert sorted(path.suffix for path in output.written) == [".csv", ".pdf", ".png", ".svg"]
    assert [text.get_text() for text in legend.get_texts()] == [literal(name)]
    ElementTree.parse(tmp_path / "name.svg")  # control characters would be no XML
    lines = (tmp_path / "name.svg").read_text()
    if name.isprintable() and "--" not in name:
        assert f"<!-- {literal(name)} -->" in lines
    assert r"<!-- $\mathdefault{10^{2}}$ -->" in lines  # the powers along the axis stay formulas


def test_a_name_of_any_length_makes_a_file(tmp_path):
    for name in ("m" * 400, "长" * 300, "../../x", "..", "a\0b"):
        figure, _ = plt.subplots()
        output = Output(tmp_path / file_name(name, "ppl", "seed5"), ("png",), 50)
        output.save(figure, ("a",), [], part="layer3")
        assert {path.parent for path in output.written} == {tmp_path}
    assert file_name("m" * 400, "seed5") != file_name("m" * 400, "seed6")


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """From its call on, no file of this process may grow beyond 3,000 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows", [1, 2000], ids=["figure too large", "numbers too large"])
def test_a_full_disk_keeps_the_old_figure_and_its_numbers(suffix, rows, tmp_path, small_files):
    Output(tmp_path / "a", (suffix,), 10).save(plt.figure(), ("n",), [("old",)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {f"a.{suffix}", "a.csv"}
    figure, axes = plt.subplots(figsize=(1, 1) if rows > 1 else (6, 6))
    if rows > 1:
        axes.axis("off")
    else:
        axes.plot(list(range(1000)), [i * i % 977 for i in range(1000)])
    small_files()
    with pytest.raises(OSError, match=r"large") as error:
        Output(tmp_path / "a", (suffix,), 100 if rows == 1 else 10).save(figure, ("n",), [(i,) for i in range(rows)])
    assert error.value.errno == 27
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_several_files_are_written_or_none(tmp_path):
    write_all({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"1", b"2"]
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        write_all({tmp_path / "a": b"3", tmp_path / "c": b"4"})
    assert (tmp_path / "a").read_bytes() == b"1"


ROW = {"step": 1, "loss": 0.5, "gradient": 0.1, "seconds": 0.2}
BAD_LINES = {
    "no JSON": "{", "a list": "[1]", "no step": '{"loss": 1}', "a negative step": '{"step": -1, "loss": 1}',
    "a loss as a word": '{"step": 1, "loss": "1"}', "null": '{"step": 1, "loss": null}',
    "NaN": '{"step": 1, "loss": NaN}', "a negative loss": '{"step": 1, "held_out": -1}',
    "digits": '{"step": ' + "9" * 5000 + ', "loss": 1}', "nesting": "[" * 5000, "no loss": '{"step": 1}',
    "half a character": '{"step": 1, "loss": 1, "x": "\\ud800"}',
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_step_is_named(case, tmp_path):
    path = tmp_path / "a.curve.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    assert read_curve(path) == [ROW]
    path.write_text(f"\n{json.dumps(ROW)}\n\n")
    assert read_curve(path) == [ROW]  # a blank line is none, as in every file of JSON lines
    path.write_text(f"{json.dumps(ROW)}\n{BAD_LINES[case]}\n")
    with pytest.raises(UserError, match=r"curve") as error:
        read_curve(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_what_is_no_curve_is_refused(tmp_path):
    for name, reason in (("a.safetensors", "no curve"), ("gone.jsonl", "is missing"), ("empty.jsonl", "is empty")):
        if name.startswith("empty"):
            (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=reason):
            read_curve(tmp_path / name)


def test_curves_of_one_name_a_loss_of_zero_and_none_held_out_are_all_drawn(tmp_path):
    curves = []
    for folder, rows in (
        ("a", [{"step": 0, "held_out": 0.0}, ROW]),
        ("b", [ROW]),
        ("_c", [{"step": 0, "held_out": 2}]),
    ):
        curves.append(tmp_path / folder / "x.curve.jsonl")
        curves[-1].parent.mkdir()
        curves[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = Output(tmp_path / "figure", ("png",), 50)
    draw_calibration(curves, output)
    named = {line.partition(",")[0] for line in (tmp_path / "figure.csv").read_text().splitlines()[1:]}
    assert named == {str(path) for path in curves}
    assert Path(output.written[0]).suffix == ".png"
