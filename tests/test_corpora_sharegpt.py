"""The ShareGPT walk: Vicuna's format, the assistant's tokens, and which records are taken."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from corpora.errors import UserError
from corpora.sharegpt import VICUNA_PROMPT, VICUNA_SYSTEM, chat_turns, sharegpt_samples, vicuna_chat
from corpora.tokens import encode
from tests.test_corpora_text import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    words = [*VICUNA_SYSTEM.split(), "USER:", "ASSISTANT:", *"abcdefghij"]
    return word_tokenizer(" ".join(dict.fromkeys(words)))


def record(*turns: str, first: str = "human") -> dict:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]}


def test_the_prompt_is_the_published_one() -> None:
    for text, length, digest in [(VICUNA_SYSTEM, 154, "1fa69e2371b7"), (VICUNA_PROMPT, 160, "a854a4641e23")]:
        assert len(text) == length
        assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_a_chat_by_hand(tokenizer) -> None:
    chat = vicuna_chat(tokenizer, ["a b", "c d e", "f", "g"])
    system, (user, assistant) = encode(tokenizer, VICUNA_SYSTEM), encode(tokenizer, "USER: ASSISTANT:")
    a, b, c, d, e, f, g = encode(tokenizer, "a b c d e f g")
    assert chat.ids.tolist() == [1, *system, user, a, b, assistant, c, d, e, user, f, assistant, g]
    assert chat.ids[chat.assistant].tolist() == [c, d, e, g]


def test_every_chat_starts_with_bos_and_the_prompt(tokenizer) -> None:
    chat = vicuna_chat(tokenizer, ["a", "b"])
    prompt = [1, *encode(tokenizer, VICUNA_PROMPT)]
    assert chat.ids[: len(prompt)].tolist() == prompt


def test_a_chat_is_cut(tokenizer) -> None:
    whole = vicuna_chat(tokenizer, ["a", "b " * 500])
    cut = vicuna_chat(tokenizer, ["a", "b " * 500], max_length=100)
    assert cut.ids.tolist() == whole.ids[:100].tolist()
    assert cut.assistant.tolist() == whole.assistant[:100].tolist()


def test_turns_before_the_first_human_one_are_dropped() -> None:
    assert chat_turns(record("hello", "a", "b", first="gpt")) == ["a", "b"]


def test_an_empty_turn_adds_nothing(tokenizer) -> None:
    """The published code builds a turn's text only if there is any; the system message stands before the first one."""
    system = encode(tokenizer, VICUNA_SYSTEM)
    user, assistant, a, b, c = encode(tokenizer, "USER: ASSISTANT: a b c")
    assert vicuna_chat(tokenizer, ["a", "b", "", "c"]).ids.tolist() == [1, *system, user, a, assistant, b, c]
    first = vicuna_chat(tokenizer, ["", "b", "a", "c"])
    assert first.ids.tolist() == [1, *system, b, user, a, assistant, c]
    assert first.ids[first.assistant].tolist() == [b, c]
    assert vicuna_chat(tokenizer, ["a", "", "b"]).ids.tolist() == [1, *system, user, a, assistant, user, b, assistant]


MALFORMED = [
    ("text", "no turns in the field 'conversations'"),
    ({}, "no turns"),
    ({"conversations": []}, "no turns"),
    ({"conversations": "none"}, "no turns"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "no turn from 'human'"),
    ({"conversations": [{"from": "human", "value": None}]}, "a turn that has no text in the field 'value'"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turns that do not alternate"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}, "a turn from 'bing', known"),
    ({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}, "a turn from 'user'"),
    ({"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]}, "a turn from 'system'"),
    ({"conversations": [{"from": "human", "value": "a \ud83d"}]}, "half of a character in a turn"),
    ({"conversations": ["a", "b"]}, "a turn that has no text"),
    ({"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]}, "a turn from None"),
]


@pytest.mark.parametrize(("malformed", "reason"), MALFORMED)
def test_malformed_records_say_what_is_wrong(malformed: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chat_turns(malformed)


def test_records_that_are_left_out_are_counted_and_their_roles_named(
    tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = record("a", "b " * 60)
    strange = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([good, strange, strange, {}, record("a", "b \ud83d")]))
    named = "2 with a turn from 'user', known are 'human' and 'gpt'"
    with pytest.raises(UserError, match=rf"of its 5 records 0 are too short, 4 malformed: {named}; 1 with "):
        sharegpt_samples(tokenizer, file, samples=2)
    file.write_text(json.dumps([good, good, strange, strange]))
    samples = sharegpt_samples(tokenizer, file, samples=2, seed=1)
    assert sum(samples.malformed.values()) == 2
    assert f"malformed records were left out: {named}" in caplog.text


def test_the_walk_takes_the_first_long_enough_records_of_the_shuffled_list(tokenizer, tmp_path: Path) -> None:
    records = [record(f"{'a ' * i}b", "c " * (60 if i % 3 else 50)) for i in range(20)]
    records[4] = records[7] = {"conversations": "none"}
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(records))
    order = list(records)
    random.seed(42)
    random.shuffle(order)
    taken, malformed, short = [], 0, 0
    for item in order:
        if item["conversations"] == "none":
            malformed += 1
            continue
        turns = chat_turns(item)
        if len(turns[1].split()) <= 50:  # exactly 50 is not enough
            short += 1
        else:
            taken.append(vicuna_chat(tokenizer, turns).ids.tolist())
        if len(taken) == 6:
            break
    samples = sharegpt_samples(tokenizer, file, samples=6)
    assert [chat.ids.tolist() for chat in samples.chats] == taken
    assert (sum(samples.malformed.values()), samples.short) == (malformed, short)


def test_too_few_records_and_no_file_are_told(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"ShareGPT_V4\.3_unfiltered_cleaned_split\.json"):
        sharegpt_samples(tokenizer)
    file = tmp_path / "datasets/ShareGPT_Vicuna_unfiltered/ShareGPT_V4.3_unfiltered_cleaned_split.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([record("a", "b " * 60), record("a", "b"), {}]))
    with pytest.raises(UserError, match=r"gives 1 conversations .* 2 are asked for \(of its 3 records 1 are"):
        sharegpt_samples(tokenizer, samples=2)
    assert len(sharegpt_samples(tokenizer, samples=1).chats) == 1
