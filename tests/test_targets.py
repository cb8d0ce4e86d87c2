"""--out: where programs write. What may not be written to is refused before the work, and nothing is left of that."""

import os
import shutil
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from common import FOXES

from corpora.errors import UserError
from corpora.targets import MARK, check_ours, check_target, check_written
from eval.__main__ import main as eval_main
from eval.plots.canvas import Output, plt
from intactkv.__main__ import main as intactkv_main
from quantization.__main__ import main as quantization_main

ENDINGS = ("", ".safetensors", ".png", ".csv", ".jsonl", ".pt", ".md", ".html")
Tree = dict[str, tuple[int, int, bytes]]


def tree(place: Path) -> Tree:
    """Everything there, hidden files too: kind, inode and bytes."""
    found: Tree = {}
    for path in sorted(place.rglob("*")):
        state = path.lstat()
        plain = stat.S_ISREG(state.st_mode)
        found[str(path)] = (stat.S_IFMT(state.st_mode), state.st_ino, path.read_bytes() if plain else b"")
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A pipe, a link to nowhere, one to a file, a directory and somebody else's file of every ending; a socket."""
    for ending in ENDINGS:
        os.mkfifo(tmp_path / f"pipe{ending}")
        (tmp_path / f"dangling{ending}").symlink_to("nowhere")
        (tmp_path / f"foreign{ending}").write_text("mine\n")
        (tmp_path / f"link{ending}").symlink_to(f"foreign{ending}")
        (tmp_path / f"folder{ending}").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine\n")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket.md"))
    return tmp_path


SPECIAL = ("pipe", "dangling", "link")


@pytest.mark.parametrize("name", [*SPECIAL, "folder"])
def test_a_file_is_written_to_no_pipe_link_or_directory(place: Path, name: str) -> None:
    before = tree(place)
    for ending in ENDINGS:
        with pytest.raises(UserError, match=rf"--out .*{name}{ending} is (a pipe|a link|a directory)"):
            check_target(place / f"{name}{ending}")
    with pytest.raises(UserError, match="a device or socket"):
        check_target(place / "socket.md")
    assert tree(place) == before


def test_a_file_is_written_to_no_device(tmp_path: Path) -> None:
    device = tmp_path / "null.md"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only the superuser makes devices")
    with pytest.raises(UserError, match="a device or socket"):
        check_target(device)
    assert stat.S_ISCHR(device.lstat().st_mode)


@pytest.mark.parametrize("name", [*SPECIAL, "foreign"])
def test_a_directory_is_made_in_place_of_nothing_else(place: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"--out .*{name} is there and no directory"):
        check_target(place / name, directory=True)


def test_missing_parents_are_made_and_must_be_places_to_write_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not check_target(place / "a" / "b" / "c.md")
    assert not (place / "a").exists()  # looking makes nothing
    with pytest.raises(UserError, match=r"foreign is no directory"):
        check_target(place / "foreign" / "x.md")
    with pytest.raises(UserError, match=r"the name is too long; give one of up to 180 bytes"):
        check_target(place / ("a" * 181 + ".md"))
    with pytest.raises(UserError, match=r"no directory|cannot be written"):
        check_target(place / "dangling" / "x.md")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everywhere
    with pytest.raises(UserError, match="nothing can be written in"):
        check_target(place / "a" / "b.md")


def test_what_is_read_is_not_written_whatever_it_is_called(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = place / "foreign.md"
    os.link(text, place / "other name.md")
    monkeypatch.chdir(place)
    for path in (text, place / "other name.md", Path("full/../foreign.md")):
        with pytest.raises(UserError, match="is what the program reads; name a file of its own"):
            check_target(path, reads=[text])
    assert check_target(text, reads=[place / "full"])


def test_only_figures_and_tables_of_ours_are_replaced(place: Path, intactkv_root: Path) -> None:
    for name in ("foreign.png", "foreign.md", "foreign.csv"):
        with pytest.raises(UserError, match=f"{name} is there and was not written by this program"):
            check_ours(place / name)
    check_ours(place / "new.md")
    mine = intactkv_root / "outputs" / "figures" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("of an earlier version, without a mark")
    check_ours(mine)
    for name in ("runs/ppl-x.json", "mt_bench/model_answer/a.jsonl", "mt_bench/model_judgment/j.jsonl", "figures/mine",
                 "figures/notes.md", "mine.png"):  # fmt: skip
        other = intactkv_root / "outputs" / name
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("{}")
        with pytest.raises(UserError, match=rf"{name} is there and was not written by this program"):
            check_ours(other)


@pytest.mark.usefixtures("intactkv_root")
def test_a_figure_in_every_format_is_known_again_and_so_are_its_numbers(tmp_path: Path) -> None:
    output = Output(tmp_path / "new", ("png", "pdf", "svg"), 40)
    for _ in range(2):
        output.save(plt.figure(), ["x"], [[1]])
    assert {path.suffix for path in output.written} == {".png", ".pdf", ".svg", ".csv"}
    check_written(output.written)
    for path in output.written[:3]:
        assert MARK.encode() in path.read_bytes()


@pytest.mark.usefixtures("intactkv_root")
def test_the_numbers_of_a_figure_do_not_replace_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("mine\n")
    figure = plt.figure()
    with pytest.raises(UserError, match=r"new.csv is there and was not written by this program"):
        Output(tmp_path / "new", ("png",), 40).save(figure, ["x"], [[1]])
    assert [path.name for path in tmp_path.glob("new*")] == ["new.csv"]


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    mains = {"eval": eval_main, "intactkv": intactkv_main, "quantization": quantization_main}
    return lambda name, *words: run_main(mains[name], *words)


CALLS: dict[str, tuple[tuple[str, ...], str]] = {
    "quantize": (("quantization", "--recipe", "rtn-w4"), ""),
    "export": (("quantization", "export"), ""),
    "search": (("quantization", "export", "--format", "awq-search"), ".pt"),
    "build": (("intactkv", "build", "--prefix", "bos"), ".safetensors"),
    "adapter": (("intactkv", "export", "--prefix", "bos"), ""),
    "calibrate": (("intactkv", "calibrate", "--recipe", "rtn-w4", "--prefix", "bos"), ".safetensors"),
    "train-prefix": (("intactkv", "train-prefix", "--prefix", "bos"), ".safetensors"),
    "discover": (("intactkv", "discover", "--corpus", "text.txt"), ".safetensors"),
    "mtbench": (("eval", "mtbench", "--questions", "sample"), ".jsonl"),
    "table": (("eval", "table"), ".md"),
    "stats": (("eval", "stats", "kv", "--corpus", "text.txt"), ".csv"),
    "plot": (("eval", "plot", "act", "--corpus", "text.txt"), ".png"),
    "report": (("eval", "report", "intactkv-1"), ".html"),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_program_refuses_before_its_work_and_leaves_nothing(
    case: str, place: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]],
    intactkv_root: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also no lock file. What the program would do is stopped where it starts: at the plan."""
    words, ending = CALLS[case]
    monkeypatch.chdir(place)
    (place / "text.txt").write_text(FOXES)
    if case != "table":
        model = shutil.copytree(checkpoint(), place / "model")
        words += ("--model", str(model))
    if case == "plot":
        words += ("--tokens", "8", "--layers", "0")
    names = ["pipe", "dangling", "link", "foreign", "foreign/x", "a" * 240]
    names += ["model", "full"] if not ending else ["folder"] if case != "plot" else []
    before = tree(place)
    for name in names:
        code, out, err = program(*words, "--out", f"{name}{ending}")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"{name}{ending}" in err, err
        assert tree(place) == before, name


def test_the_answers_of_a_program_never_replace_its_questions(
    place: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    questions = place / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "writing", "turns": ["a", "b"]}\n')
    call = partial(program, "eval", "mtbench", "--model", checkpoint(), "--questions", questions, "--force", "--out")
    code, _, err = call(questions)
    assert (code, err.count("\n")) == (2, 1)
    assert "is what the program reads" in err
    code, _, err = call(place / "foreign.jsonl")
    assert (code, "foreign.jsonl" in err) == (2, True)
    assert questions.read_text().startswith('{"question_id": 1')
    assert (place / "foreign.jsonl").read_text() == "mine\n"


def test_a_prefix_is_not_built_over_the_one_that_it_is_built_from(
    tmp_path: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    file = tmp_path / "p.safetensors"
    build = partial(program, "intactkv", "build", "--model", checkpoint(), "--device", "cpu", "--out", file, "--prefix")
    assert build("bos")[0] == 0
    assert build("bos")[0] == 0  # an older one is replaced
    code, _, err = build(file)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--out {file} is what the program reads" in err


def test_a_table_is_written_again_and_no_notes_are_replaced(
    tmp_path: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    text, notes = tmp_path / "text.txt", tmp_path / "notes.md"
    text.write_text(FOXES)
    notes.write_text("| mine |\n")
    ran = program(
        "eval", "ppl", "--model", checkpoint(), "--corpus", text, "--window", 16, "--limit", 2, "--device", "cpu"
    )
    assert ran[0] == 0, ran
    for style, name in (("markdown", "t.md"), ("latex", "t.tex"), ("csv", "t.csv"), ("markdown", "t")):
        for _ in range(2):
            code, out, err = program("eval", "table", "--format", style, "--out", tmp_path / "new" / name)
            assert (code, out.strip()) == (0, str(tmp_path / "new" / name)), err
        printed = program("eval", "table", "--format", style)[1]
        assert (tmp_path / "new" / name).read_text().startswith(printed)
    (record,) = (intactkv_root / "outputs" / "runs").iterdir()
    for kept in (notes, record):
        before = kept.read_bytes()
        code, _, err = program("eval", "table", "--out", kept)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{kept.name} is there and was not written by this program; remove it, or name another file" in err
        assert kept.read_bytes() == before


def test_a_corpus_that_is_not_there_shows_before_the_first_is_run(
    tmp_path: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FOXES)
    call = ("eval", "ppl", "--model", checkpoint(), "--window", 16, "--limit", 2, "--device", "cpu", "--corpus", text)
    code, _, err = program(*call, "--corpus", tmp_path / "nowhere.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert not (intactkv_root / "outputs" / "runs").exists()
    assert program(*call)[0] == 0


def test_what_a_training_leaves_beside_its_prefix_replaces_nothing_either(
    tmp_path: Path, checkpoint: Callable[..., Path], program: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    call = ("intactkv", "train-prefix", "--prefix", "bos", "--model", checkpoint(), "--out", tmp_path / "p.safetensors")
    for ending in ("curve.jsonl", "embeddings.safetensors"):
        (tmp_path / f"p.{ending}").write_text("mine")
        code, _, err = program(*call)
        assert (code, err.count("\n")) == (2, 1)
        assert f"would replace {tmp_path / f'p.{ending}'}, which belongs to no prefix; move it, or name another" in err
        (tmp_path / f"p.{ending}").unlink()
    os.mkfifo(tmp_path / "p.state.safetensors")
    code, _, err = program(*call)
    assert (code, "p.state.safetensors is a pipe" in err) == (2, True)
