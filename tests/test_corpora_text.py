"""Streams, windows and segments: the ids that every number of the project rests on."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from corpora import text as corpora_text
from corpora.errors import UserError
from corpora.files import sha256_of_file
from corpora.text import (
    PROTOCOLS,
    calibration_segments,
    documents,
    evaluation_stream,
    protocol,
    split_windows,
    text_identity,
)
from corpora.tokens import encode, start_token_id, tokenizer_fingerprint

INTACTKV, GPTQ = PROTOCOLS["intactkv"], PROTOCOLS["gptq"]


def word_tokenizer(words: str = "a b c d e f g h i j", **special: str):
    """A tokenizer with one id a word, `<s>` 1 and `</s>` 2, that adds <s> by itself when asked to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    return tmp_path


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def random_words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices("abcdefghij", k=count))


def is_part_of(segment: torch.Tensor, stream: list[int]) -> bool:
    piece = segment.tolist()
    return any(stream[i : i + len(piece)] == piece for i in range(len(stream) - len(piece) + 1))


# BOS ------------------------------------------------------------------------------------------------------------------


def test_encode_never_adds_special_tokens() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer("a b")["input_ids"] == [1, 3, 4]
    assert encode(tokenizer, "a b") == [3, 4]


def test_the_start_token_is_bos_or_else_eos_or_else_an_error() -> None:
    assert start_token_id(word_tokenizer(bos_token="<s>", eos_token="</s>")) == 1
    assert start_token_id(word_tokenizer(eos_token="</s>")) == 2
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        start_token_id(word_tokenizer(pad_token="</s>"))


def test_a_text_with_half_of_a_character_is_refused() -> None:
    """As it comes from a command line, or from a JSON file that no reader of ours read."""
    with pytest.raises(UserError, match=r"holds half of a character \(\\ud83d, behind 'a '\)"):
        encode(word_tokenizer(), "a \ud83d")


# windows --------------------------------------------------------------------------------------------------------------


def test_two_windows_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a b c d e f g h i")  # 1 + 9 tokens: two windows of 4, two tokens dropped
    stream = evaluation_stream(word_tokenizer(), str(file), window=4, protocol=INTACTKV)
    assert stream.ids.tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert stream.windows().tolist() == [[1, 3, 4, 5], [1, 7, 8, 9]]  # "d" (6) was overwritten, nothing is inserted
    stream = evaluation_stream(word_tokenizer(), str(file), window=4, protocol=GPTQ)
    assert stream.windows().tolist() == [[1, 3, 4, 5], [6, 7, 8, 9]]


def test_the_protocols_differ_as_published() -> None:
    assert (INTACTKV.bos_in_every_window, INTACTKV.first_target) == (True, 2)  # 2046 targets in a window of 2048
    assert (GPTQ.bos_in_every_window, GPTQ.first_target) == (False, 1)  # 2047
    assert protocol("gptq") is GPTQ
    with pytest.raises(UserError, match="intactkv, gptq"):
        protocol("other")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_windows_are_a_copy(name: str) -> None:
    stream = torch.arange(10, 22)
    windows = split_windows(stream, 4, None, PROTOCOLS[name], start_id=1)
    windows.fill_(0)
    assert torch.equal(stream, torch.arange(10, 22))


def test_the_limit_counts_windows() -> None:
    assert split_windows(torch.arange(100), 10, 3, GPTQ, 1).shape == (3, 10)
    assert split_windows(torch.arange(100), 10, 99, GPTQ, 1).shape == (10, 10)


@pytest.mark.parametrize(
    ("tokens", "window", "limit", "words"),
    [(9, 10, None, "9 tokens"), (9, 2, None, "3 or more"), (9, 3, 0, "1 or more"), (9, 3, -1, "1 or more")],
)
def test_windows_that_cannot_be(tokens: int, window: int, limit: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_windows(torch.arange(tokens), window, limit, INTACTKV, 1)


# streams --------------------------------------------------------------------------------------------------------------


def test_each_corpus_is_joined_as_published(root: Path) -> None:
    tokenizer = word_tokenizer("a b c ab")
    by_space, by_lines = "a b", "a\n\nb"
    for folder, name, field, joined in [
        ("wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "text", by_lines),
        ("ptb_text_only", "penn_treebank/test-00000-of-00001.parquet", "sentence", by_space),
    ]:
        import pyarrow
        import pyarrow.parquet

        file = root / "datasets" / folder / name
        file.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({field: ["a", "b"]}), file)
        corpus = {"wikitext": "wikitext2", "ptb_text_only": "ptb"}[folder]
        stream = evaluation_stream(tokenizer, corpus, window=3, protocol=INTACTKV)
        assert stream.text_sha256 == corpora_text.text_hash(joined)
        assert stream.n_documents == 2
    write_lines(root / "datasets/sample/evaluation.jsonl", ["a", "b"])
    assert evaluation_stream(tokenizer, "sample", window=3, protocol=GPTQ).text_sha256 == corpora_text.text_hash(
        by_lines
    )


def test_the_raw_text_files_give_the_rows_of_the_hub(root: Path) -> None:
    folder = root / "datasets/wikitext/wikitext-2-raw"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text(" \n = A = \n \n text . \n")
    assert documents("wikitext2", "evaluation") == ["", " = A = \n", "", " text . \n"]
    folder = root / "datasets/ptb_text_only"
    folder.mkdir(parents=True)
    (folder / "ptb.test.txt").write_text(" no it was n't \n yes it was \n")
    assert documents("ptb", "evaluation") == ["no it was n't", "yes it was"]


def test_c4_takes_the_first_1100_documents_and_256_windows(root: Path) -> None:
    texts = ["a b c"] * 1100 + ["never read"]
    write_lines(root / "datasets/allenai/c4/en/c4-validation.00000-of-00008.json", texts)
    stream = evaluation_stream(word_tokenizer(), "c4", window=8, protocol=INTACTKV)
    assert stream.n_documents == 1100
    assert len(stream.ids) == 256 * 8  # of 3301
    assert stream.windows().shape == (256, 8)
    short = evaluation_stream(word_tokenizer(), "c4", window=2048, protocol=INTACTKV)
    assert len(short.ids) == 3301


def test_c4_old_takes_256_pieces_of_single_documents(root: Path) -> None:
    texts = [random_words(size, seed) for seed, size in enumerate([3, 40, 7, 60])]
    write_lines(root / "datasets/allenai/c4/en/c4-validation.00000-of-00008.json", texts)
    tokenizer = word_tokenizer()
    stream = evaluation_stream(tokenizer, "c4-old", window=16, protocol=GPTQ)
    assert len(stream.ids) == 256 * 16
    streams = [[1, *encode(tokenizer, text)] for text in texts]
    assert all(any(is_part_of(piece, ids) for ids in streams) for piece in stream.windows())


def test_the_pile_is_stripped_and_cut_at_1000_documents(root: Path) -> None:
    write_lines(root / "datasets/pile-val-backup/val.jsonl", [" a \n"] * 1000 + ["b"])
    stream = evaluation_stream(word_tokenizer(), "pile", window=3, protocol=INTACTKV)
    assert stream.text_sha256 == corpora_text.text_hash("\n\n".join(["a"] * 1000))


def test_absent_and_unknown_corpora_are_told_apart(root: Path) -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(UserError, match=r"datasets/allenai/c4.*data\.sh c4"):
        evaluation_stream(tokenizer, "c4", window=8, protocol=INTACTKV)
    with pytest.raises(UserError, match=r"no-such.*wikitext2, ptb, c4, pile, sample, c4-old"):
        evaluation_stream(tokenizer, "no-such", window=8, protocol=INTACTKV)
    with pytest.raises(UserError, match="conversations"):
        calibration_segments(tokenizer, "sharegpt", samples=1, length=4, seed=0)
    with pytest.raises(UserError, match="calibrate with c4"):
        calibration_segments(tokenizer, "c4-old", samples=1, length=4, seed=0)


# calibration ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(root: Path) -> dict[str, list[list[int]]]:
    """A stream corpus and a per-document corpus: the id sequences that segments must be parts of."""
    tokenizer = word_tokenizer()
    texts = [random_words(size, seed) for seed, size in enumerate([300, 5, 200, 11, 400])]
    write_lines(root / "datasets/sample/calibration.jsonl", texts)
    write_lines(root / "datasets/allenai/c4/en/c4-train.00000-of-01024.json", texts)
    return {
        "sample": [[1, *encode(tokenizer, "\n\n".join(texts))]],
        "c4": [[1, *encode(tokenizer, text)] for text in texts],
    }


@pytest.mark.parametrize("corpus", ["sample", "c4"])
def test_segments_are_contiguous_parts_of_the_text(corpora: dict[str, list[list[int]]], corpus: str) -> None:
    segments = calibration_segments(word_tokenizer(), corpus, samples=9, length=32, seed=3)
    assert segments.shape == (9, 32)
    assert segments.dtype == torch.int64
    assert all(any(is_part_of(segment, ids) for ids in corpora[corpus]) for segment in segments)


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize("corpus", ["sample", "c4"])
def test_the_seed_decides_and_nothing_else(corpus: str) -> None:
    def draw(**changed: int) -> torch.Tensor:
        options = {"samples": 6, "length": 20, "seed": 42} | changed
        return calibration_segments(word_tokenizer(), corpus, **options)

    random.seed(7)
    first = draw()
    assert random.random() == random.Random(7).random()  # the global generator was left alone
    assert torch.equal(first, draw())
    assert not torch.equal(first, draw(seed=43))
    assert torch.equal(first[:3], draw(samples=3))


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize("corpus", ["sample", "c4"])
def test_bos_first_changes_position_0_only(corpus: str) -> None:
    options = {"samples": 6, "length": 20, "seed": 0}
    plain = calibration_segments(word_tokenizer(), corpus, **options)
    with_bos = calibration_segments(word_tokenizer(), corpus, **options, bos_first=True)
    assert with_bos[:, 0].tolist() == [1] * 6
    assert torch.equal(plain[:, 1:], with_bos[:, 1:])
    assert torch.equal(plain, calibration_segments(word_tokenizer(), corpus, **options))


def test_the_draws_are_those_of_the_published_loaders(corpora: dict[str, list[list[int]]]) -> None:
    length = 32
    random.seed(5)
    (stream,) = corpora["sample"]
    starts = [random.randint(0, len(stream) - length - 1) for _ in range(4)]
    segments = calibration_segments(word_tokenizer(), "sample", samples=4, length=length, seed=5)
    assert segments.tolist() == [stream[start : start + length] for start in starts]

    random.seed(5)
    expected = []
    for _ in range(4):
        while True:
            ids = corpora["c4"][random.randint(0, len(corpora["c4"]) - 1)]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        expected.append(ids[start : start + length])
    assert calibration_segments(word_tokenizer(), "c4", samples=4, length=length, seed=5).tolist() == expected


def test_a_document_as_long_as_a_segment_is_too_short(root: Path) -> None:
    write_lines(root / "datasets/allenai/c4/en/c4-train.00000-of-01024.json", [random_words(31)] * 3)  # 32 with BOS
    with pytest.raises(UserError, match="none of the 3 documents is longer than 32 tokens"):
        calibration_segments(word_tokenizer(), "c4", samples=1, length=32, seed=0)
    assert calibration_segments(word_tokenizer(), "c4", samples=1, length=31, seed=0).shape == (1, 31)


def test_the_redraws_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora_text, "MOST_DRAWS", 20)
    write_lines(root / "datasets/allenai/c4/en/c4-train.00000-of-01024.json", ["a b"] * 1000 + [random_words(50)])
    with pytest.raises(UserError, match="20 draws in a row"):
        calibration_segments(word_tokenizer(), "c4", samples=1, length=32, seed=0)


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("length", 1), ("length", 10**6)])
def test_sizes_that_cannot_be(option: str, value: int) -> None:
    options = {"samples": 2, "length": 8, "seed": 0} | {option: value}
    with pytest.raises(UserError):
        calibration_segments(word_tokenizer(), "sample", **options)


# the cache ------------------------------------------------------------------------------------------------------------


def cache_files(root: Path) -> list[Path]:
    return sorted((root / "outputs/cache/tokens").glob("*.safetensors"))


def test_the_cache_is_keyed_by_text_and_tokenizer(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "text.txt"

    def ids(text: str, tokenizer) -> list[int]:
        file.write_text(text)
        return evaluation_stream(tokenizer, str(file), window=3, protocol=INTACTKV).ids.tolist()

    forward, backward = word_tokenizer("a b c"), word_tokenizer("c b a")
    assert tokenizer_fingerprint(forward) != tokenizer_fingerprint(backward)
    assert ids("a b c", forward) == [1, 3, 4, 5]
    assert ids("a b c", backward) == [1, 5, 4, 3]
    assert ids("c b a", forward) == [1, 5, 4, 3]
    assert len(cache_files(root)) == 3
    assert ids("a b c", word_tokenizer("a b c")) == [1, 3, 4, 5]
    assert len(cache_files(root)) == 3


@pytest.mark.usefixtures("corpora")
def test_cached_ids_are_used_and_a_damaged_cache_is_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"samples": 3, "length": 16, "seed": 0}
    expected = calibration_segments(word_tokenizer(), "c4", **options)
    monkeypatch.setattr(corpora_text, "encode", lambda *_: pytest.fail("tokenized again"))
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)
    monkeypatch.undo()
    monkeypatch.setenv("INTACTKV_ROOT", str(root))
    (cache,) = cache_files(root)
    cache.write_bytes(cache.read_bytes()[:40])
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)
    monkeypatch.setattr(corpora_text, "encode", lambda *_: pytest.fail("the cache was not repaired"))
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)


CHANGES: dict[str, Callable[[dict[str, str], dict[str, torch.Tensor]], object]] = {
    "other ids": lambda _, tensors: tensors["ids"][:2].fill_(5),
    "fewer": lambda _, tensors: tensors.update(ids=tensors["ids"][:1].clone()),
    "a dtype": lambda _, tensors: tensors.update(ids=tensors["ids"].int()),
    "another key": lambda header, _: header.update(ids=header["ids"].replace('"key": "', '"key": "00')),
    "of before": lambda header, _: header.update(key=header.pop("ids")),
    "no key": lambda header, _: header.update(ids="{}"),
}


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize("what", CHANGES)
def test_a_cache_that_was_changed_is_made_again_and_named(
    root: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"samples": 3, "length": 16, "seed": 0}
    expected = calibration_segments(word_tokenizer(), "c4", **options)
    (cache,) = cache_files(root)
    whole = cache.read_bytes()
    with safe_open(cache, framework="pt") as file:
        header, tensors = file.metadata(), {"ids": file.get_tensor("ids").clone()}
    CHANGES[what](header, tensors)
    save_file(tensors, cache, metadata=header)
    assert cache.read_bytes() != whole
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)
    assert f"token cache {cache}" in caplog.text
    assert cache.read_bytes() == whole
    caplog.clear()
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)
    assert not caplog.text


@pytest.mark.usefixtures("corpora")
def test_a_cache_that_can_neither_be_read_nor_written_is_none(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"samples": 3, "length": 16, "seed": 0}
    expected = calibration_segments(word_tokenizer(), "c4", **options)
    (cache,) = cache_files(root)
    cache.unlink()
    cache.mkdir()
    assert torch.equal(calibration_segments(word_tokenizer(), "c4", **options), expected)
    assert f"{cache} is a directory, not a plain file" in caplog.text
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_line_ends_change_neither_the_tokens_nor_the_identity_of_a_text(root: Path, name: str) -> None:
    """Here a line end is a token."""
    tokenizer = word_tokenizer("a b c")
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"\s"), "isolated")
    tokenizer.add_tokens(["\n", "\r"])
    lines = ["a b", "", "c a b"] if name == "text.txt" else ['{"text": "a b"}', '{"text": "c a"}']
    plain = root / name
    plain.write_bytes("\n".join([*lines, ""]).encode())
    options = {"samples": 2, "length": 4}
    truth = evaluation_stream(tokenizer, str(plain), window=3, protocol=INTACTKV)
    made_of = text_identity(tokenizer, str(plain), **options)
    assert made_of["files"] == [sha256_of_file(plain)]  # what was made from it before is found again
    segments = calibration_segments(tokenizer, str(plain), seed=0, **options)
    cached = cache_files(root)
    for content in ("\r\n".join([*lines, ""]), "\r".join([*lines, ""]), "\ufeff" + "\n".join([*lines, ""])):
        plain.write_bytes(content.encode())
        stream = evaluation_stream(tokenizer, str(plain), window=3, protocol=INTACTKV)
        assert stream.ids.tolist() == truth.ids.tolist()
        assert stream.text_sha256 == truth.text_sha256
        assert text_identity(tokenizer, str(plain), **options) == made_of
        assert torch.equal(calibration_segments(tokenizer, str(plain), seed=0, **options), segments)
    assert cache_files(root) == cached


def test_a_padded_call_does_not_change_the_fingerprint() -> None:
    tokenizer = word_tokenizer(bos_token="<s>", pad_token="</s>")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert encode(tokenizer, "a b c") == [3, 4, 5]
