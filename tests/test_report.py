"""The report: one HTML file of published tables with ours beside them."""

import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, error_line
from html_pages import Tree, loads
from report_worlds import ENVIRONMENT, answer, answer_all, drawn

from corpora.targets import REPORT
from eval import runs
from eval.__main__ import main, parser
from eval.programs.asked import scope_of, scope_of_words, words_of
from eval.report import html as html_module
from eval.report import pictures
from eval.report.gains import charts_of
from eval.report.html import html_of
from eval.report.page import Shown, report_of
from eval.tables.asked import Run, cells_of
from eval.tables.beside import paper_table
from eval.tables.compare import filled
from eval.tables.declared import ALONE, BOS, BOS_ALONE, Measure, Method, Paper, Row, Scope, with_arms
from eval.tables.noted import note
from eval.tables.papers import PAPERS
from eval.tables.render import Figure

EVIL = """<script>alert(1)</script>"' onmouseover=x </style><!-- {{ 7*7 }}"""
MODEL, OTHER = Path("modelzoo/llama-2/llama-2-7b"), Path("modelzoo/smollm2/smollm2-135m")
TASKS = tuple(Measure(name, "tasks", name, better="higher") for name in ("piqa", "boolq"))
MEAN = Measure("mean", "tasks", better="higher", average_of=("piqa", "boolq"))
WORDS = Measure("riddle", "chat", "Who am I?", better="words")
PPL, OLD = Measure("C4", "ppl", "c4"), Measure("WikiText-2", "ppl", "wikitext2")
GPTQ, RTN, RTN_4 = Method("GPTQ", "gptq-w3", calibrates=True), Method("RTN", "rtn-w3"), Method("RTN", "rtn-w4")
PAPER = Paper(
    "made-up", "us", "A table that nobody published", "Table 0", "all that there is", ("llama-2-7b",),
    (PPL, OLD, *TASKS, MEAN, WORDS),
    (
        Row("FP16", Method("FP16"), ALONE, {"llama-2-7b": (7.28, 5.5, 79.0, 84.0, 81.5, "a riddle")}),
        Row("RTN", RTN, ALONE, {"llama-2-7b": (8.97, 6.6, 70.0, None, None, None)}),
        Row("RTN", RTN, BOS, {"llama-2-7b": (8.61, 6.3, 71.0, None, None, None)}),
        Row("GPTQ", GPTQ, ALONE), Row("GPTQ", GPTQ, BOS),
        Row("RTN, 4 bits", RTN_4, ALONE), Row("RTN, 4 bits", RTN_4, BOS),
    ), ("its mean is wrong",),
)  # fmt: skip
SEEDS = Scope(seeds=(1, 2, 3))


def value(row: Row, measure: Measure, run: Run) -> Any:
    """A figure for every run: near the published one, others from 50 to 60."""
    published = row.published.get("llama-2-7b")
    figure = published[PAPER.measures.index(measure)] if published and measure in PAPER.measures else None
    number = figure * (1 + drawn(run) / 50) if isinstance(figure, float) else 50 + 10 * drawn(run)
    return {"lower": number, "higher": number / 100, "words": f"I am\na {row.label} model."}[measure.better]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up table, run for a published model and for another one, over three seeds."""
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTACTKV_ROOT", str(root))
        patch.setattr(runs, "environment", lambda: dict(ENVIRONMENT))
        answer_all(PAPER, MODEL, value, SEEDS)
        answer_all(PAPER, OTHER, value, SEEDS, lambda row, measure: measure.program == "ppl")
        note([(PAPER, [MODEL, OTHER])], ["--seeds", "1", "2", "3"])
    return root


@pytest.fixture
def world(built: Path, intactkv_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(built / "outputs", intactkv_root / "outputs")
    monkeypatch.setattr("eval.tables.papers.PAPERS", {PAPER.name: PAPER})
    return intactkv_root


def page() -> str:
    report = report_of([Shown(PAPER, MODEL, SEEDS), Shown(PAPER, OTHER, SEEDS)])
    return html_of(report, made="today", command="python -m eval report")


# ---- its figures


def test_every_figure_is_that_of_the_table(world: Path) -> None:
    """Ours, theirs and the difference stand in one cell, as `filled` has them, of every row and column."""
    tree = Tree(page()).top
    for place, model in enumerate((MODEL, OTHER)):
        section = [e for e in tree.all("section") if e.attributes.get("class") == "model"][place]
        table = next(section.all("table"))
        lines = [list(line.all("td")) for line in table.all("tr")][1:]
        shown = [[" ".join(cell.text.split()) for cell in line] for line in lines]
        numbers = [cell for cell in filled(PAPER, model, SEEDS) if cell.measure.better != "words"]
        width = len({cell.measure for cell in numbers})
        assert [len(line) for line in shown] == [width] * len(PAPER.rows)
        for words, cell in zip([words for line in shown for words in line], numbers, strict=True):
            assert words.startswith("n/a" if cell.ours is None else str(cell.ours)), (words, cell)
            assert re.findall(r"paper (\S+)", words) == ([] if cell.theirs is None else [f"{cell.theirs:.2f}"]), words
            if cell.difference is not None:
                assert f"{cell.difference:+.2f} " in words
            assert all((word in words) == (word == cell.verdict) for word in ("agrees", "near", "off")), (words, cell)


@pytest.mark.parametrize(("digits", "theirs", "ours", "words"), [
    (2, 7.2867, 7.3, ("7.30", "7.29", "+0.01")), (3, 8.969, 8.972, ("8.972", "8.969", "+0.003")),
    (5, 0.02314, 0.02319, ("0.02319", "0.02314", "+0.00005")), (0, 1234.0, 900.0, ("900", "1.23e+03", "-334")),
])  # fmt: skip
def test_published_figures_and_differences_have_the_digits_of_their_column(
    digits: int, theirs: float, ours: float, words: tuple[str, ...], intactkv_root: Path
) -> None:
    row = Row("FP16", Method("FP16"), ALONE, {MODEL.name: (theirs,)})
    paper = replace(PAPER, measures=(replace(PPL, digits=digits),), rows=(row,))
    answer_all(paper, MODEL, lambda *_: ours)
    ((line,),) = (section.lines for _, section in report_of([Shown(paper, MODEL)]).sections)
    (cell,) = line.cells
    assert (cell.ours, cell.theirs, cell.difference) == words
    (table,) = paper_table(paper, filled(paper, MODEL))
    assert tuple(str(shown) for shown in (table.rows[0][3], table.rows[0][2], table.rows[0][4])) == words


def test_a_section_says_how_much_of_a_cache_was_rounded(intactkv_root: Path) -> None:
    """With the same words as the table on stdout, which also say what full precision of a package is."""
    row = Row("KIVI", Method("KIVI", kv=("--kv", "kivi", "--kv-bits", "2")))
    paper, kv = replace(PAPER, measures=(WORDS,), rows=(row,)), {"kv": {"kind": "KIVI", "bits": 2}}
    for cell in cells_of(paper, OTHER):
        answer(cell.runs[0], "hello", kv)
    ((_, section),) = report_of([Shown(paper, OTHER)]).sections
    said = " ".join(section.notes)
    assert all(words in said for words in ("rounded of what the cache held at the end: KIVI 0.0 %", "dequantized"))
    (table, *_) = paper_table(paper, filled(paper, OTHER))
    assert set(section.notes) <= set(table.notes)


def test_the_mean_of_columns_and_of_seeds_say_of_what_they_are(world: Path) -> None:
    tree = Tree(page()).top
    by_id = {e.attributes["id"]: e for e in tree.all() if "id" in e.attributes}
    gptq = by_id[next(e for e in by_id if e.startswith("made-up-llama-2-7b-gptq-b-c4"))]
    link = next(a for a in gptq.all("a") if a.attributes["class"] == "ours")
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d \(3\)", link.text)
    runs_of_it = [by_id[a.attributes["href"][1:]] for a in by_id[link.attributes["href"][1:]].all("a")][:3]
    values = [float(re.search(r"perplexity\s+(\d+\.\d\d)", run.text)[1]) for run in runs_of_it]
    assert link.text.split()[0] == f"{sum(values) / 3:.2f}" or abs(float(link.text.split()[0]) - sum(values) / 3) < 0.01
    mean = by_id[next(e for e in by_id if re.match("made-up-llama-2-7b-fp16-*mean", e))]
    parts = by_id[next(mean.all("a")).attributes["href"][1:]]
    assert [a.text for a in parts.all("a")][:2] == ["piqa", "boolq"]


def test_answers_stand_side_by_side_and_keep_their_lines(world: Path) -> None:
    table = next(e for e in Tree(page()).top.all("table") if e.attributes.get("class") == "texts")
    first = next(line for line in table.all("tr") if "FP16" in line.text)
    assert [cell.text for cell in first.all("div")] == ["I am\na FP16 model.", "a riddle"]


def test_a_change_is_the_mean_over_columns_of_how_much_lower_or_higher(world: Path) -> None:
    """Perplexity in percent of the method alone, scores in points, ours and published."""
    cells = filled(PAPER, MODEL, SEEDS)
    figure = {(cell.row.label, cell.row.arm.label, cell.measure.head): cell.ours for cell in cells}
    ppl, score = charts_of(cells)
    assert [gain.label for gain in ppl.gains] == ["RTN", "GPTQ", "RTN, 4 bits"]
    rtn = ppl.gains[0]
    shares = [figure["RTN", "[B]", head].value / figure["RTN", "", head].value for head in ("C4", "WikiText-2")]
    assert rtn.ours == pytest.approx(100 * (sum(shares) / 2 - 1))
    assert rtn.theirs == pytest.approx(100 * ((8.61 / 8.97 + 6.3 / 6.6) / 2 - 1))
    points = [figure["RTN", "[B]", head].value - figure["RTN", "", head].value for head in ("piqa", "boolq")]
    rtn = score.gains[0]
    assert rtn.ours == pytest.approx(sum(points) / 2)
    assert rtn.theirs == pytest.approx(1.0)
    assert score.gains[1].theirs is None
    (table,) = paper_table(PAPER, [replace(cell, measure=PPL) for cell in cells if cell.measure == PPL])
    change = next(row[3] for row in table.rows if row[:2] == ("RTN", "[B]: change"))
    assert isinstance(change, Figure)
    (one,) = (chart for chart in charts_of([c for c in cells if c.measure == PPL]))
    assert one.gains[0].ours == pytest.approx(100 * change.value)  # the same, with the same sign


def test_where_alone_reads_other_tokens_the_change_is_against_the_row_that_reads_the_same(world: Path) -> None:
    """Plain windows: [BOS] takes 2 % of a perplexity, keeping it another tenth of what is left."""
    plain = replace(PPL, options=("--protocol", "gptq"))
    paper = replace(PAPER, name="plain", measures=(plain,), rows=with_arms([Row("RTN", RTN)], BOS_ALONE, BOS))
    figures = {ALONE: 10.0, BOS_ALONE: 9.8, BOS: 9.8 * 0.9}
    answer_all(paper, MODEL, lambda row, measure, run: figures[row.arm])
    (chart,) = charts_of(filled(paper, MODEL))
    assert [(gain.arm, gain.ours) for gain in chart.gains] == [("[B]", pytest.approx(-10.0))]
    assert chart.zero == 100
    assert charts_of(filled(replace(paper, rows=(paper.rows[0], paper.rows[2])), MODEL)) == ()


# ---- its form


def test_it_is_whole_and_its_links_lead_somewhere(world: Path) -> None:
    tree = Tree(page()).top
    ids = [e.attributes["id"] for e in tree.all() if "id" in e.attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    links = [a.attributes["href"] for a in tree.all("a")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for name in ("aria-labelledby", "aria-describedby"):
        assert {id_ for e in tree.all() if name in e.attributes for id_ in e.attributes[name].split()} <= set(ids)
    figures = [a for a in tree.all("a") if a.attributes.get("class") == "ours"]
    ran = [cell for model in (MODEL, OTHER) for cell in filled(PAPER, model, SEEDS) if cell.ours is not None]
    assert len(figures) == len(ran)


def test_a_run_tells_how_it_is_made_again(world: Path) -> None:
    """Its card has the record's file, identity, settings and machine, and the command as a reader would type it."""
    tree = Tree(page()).top
    by_id = {e.attributes["id"]: e for e in tree.all() if "id" in e.attributes}
    records = list((world / "outputs" / "runs").glob("*.json"))
    assert len(records) == len([name for name in by_id if name.startswith("run-")])
    for record in records:
        card = by_id[f"run-{record.stem.rpartition('-')[2]}"]
        assert all(words in card.text for words in (record.name, "NVIDIA H200", "2.11.0", "0123456789ab", "float16"))
        assert re.match(r"python -m eval (ppl|tasks|chat) --model modelzoo/", next(card.all("pre")).text)


def test_screen_readers_and_keyboards_find_their_way(world: Path) -> None:
    tree = Tree(page()).top
    (top,) = tree.all("html")
    assert top.attributes["lang"] == "en"
    assert next(tree.all("title")).text
    assert [len(list(tree.all(name))) for name in ("main", "header", "footer", "h1")] == [1, 1, 1, 1]
    assert next(iter(tree.all("a"))).attributes["href"] == "#main"
    for table in tree.all("table"):
        assert next(table.all("caption")).text.strip()
        assert all(head.attributes.get("scope") in ("col", "row") for head in table.all("th"))
        assert all(next(iter(line.children)).name == "th" for line in table.all("tr"))
    for box in tree.all("div"):
        if "scroll" in box.attributes.get("class", ""):
            assert box.attributes["tabindex"] == "0"
            assert box.attributes.get("aria-label") or box.attributes["aria-labelledby"]
    levels = [int(e.name[1]) for e in tree.all("h1", "h2", "h3", "h4")]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all("alt" in image.attributes for image in tree.all("img"))


def _luminance(colour: str) -> float:
    """WCAG 2.2: relative luminance of #rrggbb."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_have_the_contrast_of_wcag_aa(theme: int) -> None:
    style = (Path(html_module.__file__).parent / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[theme]))
    grounds = ("ground", "raised", "behind")
    pairs = [(ink, ground, 4.5) for ink in ("ink", "muted", "link") for ground in grounds]
    pairs += [(word, f"{word}-ground", 4.5) for word in ("agrees", "near", "off")]
    pairs += [(bar, "ground", 3.0) for bar in ("bar", "bar-theirs")]  # of what is drawn
    for ink, ground, least in pairs:
        one, other = sorted((_luminance(colours[ink]), _luminance(colours[ground])))
        assert (other + 0.05) / (one + 0.05) >= least, (ink, ground)


# ---- it needs nothing else, and obeys no record


def test_it_loads_nothing(world: Path) -> None:
    text = page()
    assert loads(text) == []
    assert "://" not in text
    assert loads('<img src="//x/y.png"><style>@import "z"; a { b: url(c) }</style>') != []  # the test sees such a thing
    policy = next(e for e in Tree(text).top.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_policy_names_the_script_and_the_style_that_stand_in_the_page(world: Path) -> None:
    import base64
    import hashlib

    text = page()
    for name in ("script", "style"):
        inside = re.search(rf"<{name}>(.*?)</{name}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src &#39;sha256-{digest}&#39;" in text


def test_a_record_cannot_write_markup(intactkv_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile model, setting, machine, command, answer and figure's name become words."""
    monkeypatch.setattr(runs, "environment", lambda: dict.fromkeys(ENVIRONMENT, EVIL))
    model = Path(EVIL.replace("/", "∕"))
    for cell in cells_of(PAPER, model):
        for run in cell.runs:
            answer(run, {"lower": 6.0, "higher": 0.5, "words": EVIL}[cell.measure.better], {"dtype": EVIL, EVIL: EVIL})
    folder = intactkv_root / "outputs" / "figures"
    folder.mkdir()
    (folder / f"{pictures.plain_name(model.name)}__{EVIL.replace('/', '∕')}.svg").write_text(
        "<svg><script>x()</script></svg>"
    )
    report = report_of([Shown(PAPER, model)])
    report.left_out.append(EVIL)
    text = html_of(report, made=EVIL, command=EVIL)
    tree = Tree(text).top
    assert len(report.pictures) == 1
    assert [e.parent.name for e in tree.all("script")] == ["body"]
    assert not any(name.startswith("on") for e in tree.all() for name in e.attributes)
    assert "7*7" in text
    assert "49" not in [e.text for e in tree.all()]
    assert any(e.text == EVIL for e in tree.all("div"))
    assert loads(text) == []


def test_pictures_of_the_models_shown_are_embedded_and_nothing_else(intactkv_root: Path) -> None:
    folder = intactkv_root / "outputs" / "figures"
    folder.mkdir(parents=True)
    png = (ROOT / "figs" / "pivots.png").read_bytes()
    for name in ("llama-7b__pivots.png", "llama-7b-rtn-w3__act__p1.png", "llama-13b__pivots.png"):
        (folder / name).write_bytes(png)
    (folder / "llama-7b__act.png").write_text("no picture")
    (folder / "llama-7b__link.png").symlink_to(folder / "llama-13b__pivots.png")
    (folder / "llama-7b__big.png").write_bytes(png + bytes(pictures.LARGEST))
    found = pictures.pictures_of(["llama-7b", "absent"])
    assert [(one.name, bool(one.uri)) for one in found] == [
        ("llama-7b-rtn-w3__act__p1.png", True), ("llama-7b__big.png", False), ("llama-7b__pivots.png", True),
    ]  # fmt: skip
    assert found[2].uri.startswith("data:image/png;base64,iVBOR")


# ---- the program


@pytest.fixture
def program(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: run_main(main, "report", *arguments)


def titles(path: Path) -> list[str]:
    """The models that a report has sections of, with their sizes."""
    return [" ".join(e.text.split()) for e in Tree(path.read_text()).top.all("h3") if e.attributes.get("id")]


def test_without_options_the_program_shows_what_was_run_as_it_was_run(world: Path, program: Any) -> None:
    small, words = Scope(limit=4, window=64), ["--window=64", "--limit=4"]
    note([(PAPER, [OTHER, Path("modelzoo/never/never-run")])], words)
    answer_all(PAPER, OTHER, value, small, lambda row, measure: measure.program == "ppl")
    code, out, err = program()
    path = world / "outputs" / "report.html"
    assert (code, out) == (0, f"{path}\n"), err
    reduced = "smollm2-135m limit 4, window 64"
    llama, smol = "llama-2-7b seeds 1 2 3", "smollm2-135m seeds 1 2 3"
    assert sorted(titles(path)) == sorted([llama, smol, reduced])
    assert f"reproduce made-up --model {OTHER} --window=64 --limit=4" in path.read_text()
    for words, expected in {
        ("--limit", 4, "--window", 64): [reduced], ("--model", "llama-2-7b"): [llama],
        ("made-up", "--only", "smollm2-135m", "RTN"): sorted([smol, reduced]),
        ("made-up", "--model", "llama-7b"): ["llama-7b"],
        ("made-up", "--limit", 4, "--window", 64): ["llama-2-7b limit 4, window 64", reduced],
    }.items():  # fmt: skip
        assert program(*words)[0] == 0
        assert sorted(titles(path)) == expected, words
    assert "more finished runs stand in no table here" in path.read_text()
    code, _, err = program("--limit", 5)
    assert code == 2
    assert "nothing that was run fits what is asked for; there are made-up --model llama-2-7b --seeds 1 2 3; " in err
    error_line(err)


def test_the_words_of_a_size_ask_for_the_same_size() -> None:
    """Every option that stands in them comes back, and only what is not as by default."""
    words = ["--seeds", "1", "2", "--corpus=c4", "--corpus=a b.txt", "--protocol=gptq", "--window=64", "--limit=4",
             "--tasks=piqa,boolq", "--data=local", "--calibration=c4", "--recipe", "rtn-w3", "gptq-w3", "--behind",
             "--set=weights.damp=0.1", "--options=--group-size 64 --x 'a b'", "--judge-model=x"]  # fmt: skip
    options = parser().parse_args(["reproduce", "intactkv-1", "--only", "GPTQ", "--model", "x", *words])
    assert sorted(words_of(options)) == sorted(words)
    assert replace(scope_of_words(words), only=("GPTQ",)) == scope_of(options)
    assert words_of(parser().parse_args(["reproduce", "intactkv-1"])) == []
    assert scope_of_words([]) == Scope()


@pytest.mark.parametrize("field", [field.name for field in fields(Scope) if field.name != "only"])
def test_every_part_of_a_size_has_a_word_in_its_name(field: str) -> None:
    """So two sizes have two names; which cells are left out is no part of it."""
    default = getattr(Scope(), field)
    given = {bool: True, tuple: (3,) if field == "seeds" else ("--some", "word")}
    size = Scope(**{field: 7 if default is None else given[type(default)]})
    assert Scope().called == replace(size, only=("GPTQ",), **{field: default}).called == ()
    assert len(size.called) == 1


def test_a_note_that_cannot_be_read_is_named(world: Path, program: Any) -> None:
    for text in ("{", '{"table": "made-up", "model": "x", "words": ["--colour"]}'):
        (world / "outputs" / "asked" / "tables" / "a.json").write_text(text)
        assert program()[0] == 0
        text = (world / "outputs" / "report.html").read_text()
        assert "1 left out: could not be read" in text
        assert "a.json" in text


def test_a_named_table_is_shown_also_where_nothing_was_run(intactkv_root: Path, program: Any) -> None:
    assert "no table was run" in error_line(program()[2])
    assert program("intactkv-1", "--out", intactkv_root / "r.html")[0] == 0
    assert titles(intactkv_root / "r.html") == list(PAPERS["intactkv-1"].models)
    code, _, err = program("intactkv-9")
    assert code == 2
    assert "unknown table intactkv-9" in error_line(err)


def test_it_replaces_only_a_report(world: Path, program: Any) -> None:
    foreign, other = world / "mine.html", world / "report.png"
    foreign.write_text("<p>made by IntactKV</p>")
    assert "no report of this program" in error_line(program("made-up", "--out", foreign)[2])
    assert foreign.read_text() == "<p>made by IntactKV</p>"
    assert "ending in .html" in error_line(program("made-up", "--out", other)[2])
    ours = world / "sub" / "ours.html"
    for _ in range(2):
        assert program("made-up", "--out", ours)[0] == 0
    assert REPORT in ours.read_text()[:2000]


def test_the_report_of_all_tables_is_small_quick_and_needs_no_torch(intactkv_root: Path) -> None:
    code = (
        "import sys; sys.argv = ['x', 'report', 'all', '--out', 'all.html']\n"
        "from eval.__main__ import main; main()\nassert 'torch' not in sys.modules"
    )
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # of the processor: others may be at work, too
    subprocess.run([sys.executable, "-c", code], check=True, cwd=intactkv_root, env={
        "PYTHONPATH": str(ROOT), "INTACTKV_ROOT": str(intactkv_root), "PATH": "",
    })  # fmt: skip
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 5
    text = (intactkv_root / "all.html").read_text()
    assert len(text) < 5_000_000
    assert "reproduce lutgemm-latency<" in text  # a table without a model
    tree = Tree(text).top
    shown = [e for e in tree.all("section") if e.attributes.get("class") == "model"]
    assert len(shown) == sum(len(paper.shown_for) for paper in PAPERS.values())
    assert loads(text) == []


def test_what_departs_in_some_cells_has_a_mark_there(world: Path) -> None:
    """What departs in every cell is said once; other departures have a letter in their cells, which is explained."""
    tree = Tree(page()).top
    first = next(e for e in tree.all("section") if e.attributes.get("class") == "model")
    explained = {e.text.split()[0]: e.text.split(maxsplit=1)[1] for e in first.all("li")}
    places = {mark: cell for cell in filled(PAPER, MODEL, SEEDS) for mark in cell.departs}
    assert set(explained.values()) == set(places)
    cells = [(cell, sup.text.split()) for cell in first.all("td") for sup in cell.all("sup")]
    assert {mark for _, marks in cells for mark in marks} == set(explained)
    smollm = [e for e in tree.all("p") if e.attributes.get("class") == "departs"]
    assert any("model smollm2-135m" in e.text for e in smollm)
    assert isinstance(filled(PAPER, MODEL, SEEDS)[0].ours, Figure)
