"""Answers to MT-bench's questions: what they depend on, where they end, what is on file."""

from typing import Any

import pytest
import torch
from chats import CONTEXT, QUESTIONS, SAMPLED, TEMPLATE, turns_of
from families import plain_logits

from corpora.errors import UserError
from corpora.files import sha256_of_data
from corpora.json_files import fitted
from corpora.json_lines import read_lines
from eval.generation import Generation
from eval.mtbench.answers import (
    ANSWERS,
    CATEGORIES,
    Answerer,
    Question,
    RowSampler,
    read_questions,
    row_generator,
    temperature_of,
    warpers_of,
)
from eval.mtbench.chat_templates import chat_template
from eval.mtbench.json_lines import LineFile, part_of, parts_of
from intactkv.attach import IntactModel, attach
from intactkv.prefix import build_prefix

OWN = Generation((2,), pad=0)


@pytest.fixture
def chat(tiny_tokenizer) -> Any:
    return chat_template("auto", tiny_tokenizer(chat_template=TEMPLATE), "tiny")


@pytest.fixture
def answerer(tiny_model, chat):
    """answerer(**settings) -> Answerer of a tiny model that ends some answers by itself."""

    def make(
        model_type: str = "llama", *, seed: int = 42, max_new_tokens: int = 12, context: int = CONTEXT,
        stops: bool = True,
    ) -> Answerer:  # fmt: skip
        model = tiny_model(model_type, max_position_embeddings=context)
        own = Generation((2,) if stops else (), pad=0)
        return Answerer(attach(model, None), chat, own, seed=seed, max_new_tokens=max_new_tokens, context=context)

    return make


def turns(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [line["choices"][0]["turns"] for line in lines]


# what an answer depends on --------------------------------------------------------------------------------------------


def test_categories_have_fastchats_temperatures():
    by_temperature = {temperature_of(name): set() for name in (*CATEGORIES, "other")}
    for name in (*CATEGORIES, "other"):
        by_temperature[temperature_of(name)].add(name)
    assert by_temperature == {0.7: {"writing", "roleplay", "other"}, 0.1: {"stem", "humanities"},
                              0.0: {"extraction", "math", "coding", "reasoning"}}  # fmt: skip


def test_answers_depend_on_the_seed_where_they_are_drawn_and_only_there(answerer):
    first, same, other = (turns(answerer(seed=seed).lines(QUESTIONS, "m")) for seed in (42, 42, 43))
    assert first == same
    differ = [q.id for q, a, b in zip(QUESTIONS, first, other, strict=True) if a != b]
    assert set(differ) <= set(SAMPLED)
    warm = [q.id for q in QUESTIONS if temperature_of(q.category) == 0.7]
    assert set(warm) <= set(differ)


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2"])
def test_answers_depend_neither_on_the_batch_nor_on_the_order(answerer, model_type):
    together = answerer(model_type)
    expected = dict(zip([q.id for q in QUESTIONS], turns(together.lines(QUESTIONS, "m")), strict=True))
    assert any(all(answer) for answer in expected.values())
    alone = answerer(model_type)
    for question in QUESTIONS[::-1]:
        assert turns(alone.lines([question], "m")) == [expected[question.id]]
    for group in (QUESTIONS[3:7], QUESTIONS[:3][::-1]):
        assert turns(alone.lines(group, "m")) == [expected[question.id] for question in group]


def test_streams_of_turns_and_questions_differ_and_repeat():
    streams = {
        (seed, question, turn): torch.rand(4, generator=row_generator(seed, question, turn)).tolist()
        for seed in (42, 43)
        for question in (81, 82)
        for turn in (0, 1)
    }
    assert len({tuple(values) for values in streams.values()}) == 8
    assert torch.rand(4, generator=row_generator(42, 81, 1)).tolist() == streams[42, 81, 1]


def test_a_greedy_answer_is_the_plain_models(answerer, chat, tiny_model):
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    question = next(q for q in QUESTIONS if q.category == "math")
    (line,) = answerer().lines([question], "m")
    answer = line["choices"][0]["turns"]
    dialogues = ([question.turns[0]], [question.turns[0], answer[0], question.turns[1]])
    for dialogue, said, count in zip(dialogues, answer, line["tokens"], strict=True):
        ids = chat.ids(dialogue)
        new: list[int] = []
        while len(new) < 12 and chat.tokenizer.eos_token_id not in new:
            new.append(int(plain_logits(model, torch.tensor(ids + new))[-1].argmax()))
        assert count == len(new)
        text = chat.tokenizer.decode(new)
        for special in ("<pad>", "<s>", "</s>", "<unk>"):
            text = text.replace(special, "")
        assert said == text.strip()


def test_a_prefix_that_was_put_in_front_is_read_like_text(chat, tiny_model):
    """Behind an intact prefix, and by the same full-precision model that is fed all tokens: the same answers."""
    model, lead = tiny_model("llama", max_position_embeddings=CONTEXT), (1, 20, 33, 50)
    template, said = chat.behind(lead), []
    for prefix in (build_prefix(model, lead), None):
        one = Answerer(attach(model, prefix), template, OWN, seed=42, max_new_tokens=12, context=CONTEXT)
        said.append(turns(one.lines(QUESTIONS, "m")))
    assert said[0] == said[1]
    plain = Answerer(attach(model, None), chat, OWN, seed=42, max_new_tokens=12, context=CONTEXT)
    assert said[0] != turns(plain.lines(QUESTIONS, "m"))
    room = len(template.ids(QUESTIONS[0].turns[:1])) + 5  # the prefix takes its place in the context
    short = Answerer(attach(model, build_prefix(model, lead)), template, Generation((), pad=0), seed=42,
                     max_new_tokens=12, context=room)  # fmt: skip
    assert short.lines(QUESTIONS[:1], "m")[0]["tokens"][0] == 5


def test_draws_follow_the_distribution_and_the_models_top_k(answerer):
    """4000 draws at temperature 0.7: frequencies within 4 standard errors of the softmax of the top three."""
    one = answerer()
    one.own = Generation((2,), pad=0, top_k=3)
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.5, 1.0, 0.9]])
    count = 4000
    sampler = RowSampler([torch.Generator().manual_seed(0)], [warpers_of(one.own, 0.7)])
    drawn = torch.stack([sampler(torch.ones(1, 1, dtype=torch.long), logits).argmax() for _ in range(count)])
    expected = torch.zeros(6)
    expected[[1, 3, 4]] = (logits[0, [1, 3, 4]] / 0.7).softmax(-1)
    found = torch.bincount(drawn, minlength=6) / count
    assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())


def test_the_prompt_of_turn_two_holds_the_own_answer_and_no_temperature_is_passed(answerer, chat, monkeypatch):
    calls = []
    real = IntactModel.generate

    def spy(self, ids, mask=None, **options):
        calls.append((ids, options))
        return real(self, ids, mask, **options)

    monkeypatch.setattr(IntactModel, "generate", spy)
    question = QUESTIONS[0]
    (line,) = answerer().lines([question], "m")
    first = line["choices"][0]["turns"][0]
    assert [ids[0].tolist() for ids, _ in calls] == [
        chat.ids([question.turns[0]]),
        chat.ids([question.turns[0], first, question.turns[1]]),
    ]
    assert all("temperature" not in options and options["do_sample"] is False for _, options in calls)


@pytest.mark.parametrize("model_type", ["llama", "opt"])  # OPT has no positions beyond its context
def test_an_answer_stops_where_the_context_does(answerer, chat, model_type):
    question = QUESTIONS[4]
    context = len(chat.ids([question.turns[0]])) + 8
    one = answerer(model_type, context=context, stops=False)  # nothing else ends it
    (alone,) = one.lines([question], "m")
    assert alone["stopped"] == ["context", "context"]
    assert alone["tokens"] == [8, 0]
    assert alone["choices"][0]["turns"][1] == ""
    assert fitted(alone, ANSWERS.form, "the line")["question_id"] == ANSWERS.key(alone) == question.id
    short = Question(99, "math", ("a", "b"))
    mixed = one.lines([short, question], "m")
    assert mixed[1]["tokens"] == [8, 0]
    assert turns(mixed)[1] == turns([alone])[0]
    assert mixed[0]["stopped"][0] == "length"


def test_an_answer_is_cut_at_a_stop_token_and_cleaned(answerer, chat):
    one = answerer()
    encode = chat.tokenizer.convert_tokens_to_ids
    ids = [encode("Ġ"), encode("a"), encode("<unk>"), encode("b"), encode("Ġ"), 2, encode("c"), 0]
    answer = one.cut(ids, 12)
    assert (answer.text, answer.tokens, answer.stopped) == ("ab", 6, "end")
    assert one.cut(ids[:5], 12).stopped == "length"
    assert one.cut(ids[:5], 5).stopped == "context"


# files ----------------------------------------------------------------------------------------------------------------


def test_lines_are_kept_dropped_and_sorted_by_their_keys(tmp_path):
    path = tmp_path / "a.jsonl"

    def line(number: int, text: str) -> dict[str, Any]:
        return {"question_id": number, "choices": [{"index": 0, "turns": [text, text]}], "tokens": [1, 1],
                "stopped": ["end", "end"]}  # fmt: skip

    file = LineFile(path, ANSWERS)
    for number, text in ((83, "x"), (81, "old"), (82, "z \ud800"), (81, "new")):
        file.append(line(number, text))
    with path.open("a") as raw:
        raw.write('{"question_id": 84, "choices": [{"ind')
    again = LineFile(path, ANSWERS)
    assert (again.dropped, sorted(again.rows)) == (1, [81, 82, 83])
    again.append(line(84, "w"))
    again.finish(lambda row: row["question_id"])
    assert [row["question_id"] for row in read_lines(path, "it")] == [81, 82, 83, 84]
    assert turns_of(path)[81] == ["new", "new"]
    path.write_text(path.read_text().rstrip("\n"))  # whole, but the next line must not join the last
    LineFile(path, ANSWERS).append(line(85, "v"))
    assert sorted(turns_of(path)) == [81, 82, 83, 84, 85]


def test_parts_are_joined_once_whatever_a_kill_leaves(tmp_path):
    """Parts of other runs and of other files, a half line, and a part that was joined but not removed."""
    path = tmp_path / "a[1].jsonl"  # also a pattern

    def line(number: int, text: str) -> dict[str, Any]:
        return {"question_id": number, "choices": [{"index": 0, "turns": [text, text]}], "tokens": [1, 1],
                "stopped": ["end", "end"]}  # fmt: skip

    LineFile(path, ANSWERS).append(line(81, "main"))
    parts = {index: part_of(path, index) for index in (0, 2)}
    for index, numbers in ((0, (82, 83)), (2, (81, 84))):
        for number in numbers:
            LineFile(parts[index], ANSWERS).append(line(number, f"part {index}" if number != 81 else "main"))
    with parts[2].open("a") as raw:
        raw.write('{"question_id": 85, "choices": [{"ind')
    other = part_of(tmp_path / "a1.jsonl", 0)
    LineFile(other, ANSWERS).append(line(90, "other"))
    assert [p.name for p in tmp_path.glob("*.jsonl*") if not p.name.startswith(".")] == [path.name]
    file = LineFile(path, ANSWERS)
    file.join()
    assert turns_of(path) == {n: [t, t] for n, t in ((81, "main"), (82, "part 0"), (83, "part 0"), (84, "part 2"))}
    assert len(path.read_text().splitlines()) == 4
    assert parts_of(path) == []
    assert other.exists()
    before = path.read_bytes()
    LineFile(path, ANSWERS).join()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("{]\n", "line 1, is not readable JSON"),
        ("[]\n", r"line 1, is damaged: \[\] is not"),
        ('{"question_id": 1}\n', "has no 'category'"),
        (
            '{"question_id": "1", "category": "math", "turns": ["a", "b"]}\n',
            "its 'question_id' '1' is not a",
        ),
        (
            '{"question_id": [1], "category": "math", "turns": ["a", "b"]}\n',
            "its 'question_id' .* is not a",
        ),
        ('{"question_id": true, "category": "math", "turns": ["a", "b"]}\n', "its 'question_id' True is not"),
        ('{"question_id": -1, "category": "math", "turns": ["a", "b"]}\n', "its 'question_id' -1 is not"),
        ('{"question_id": 1, "category": null, "turns": ["a", "b"]}\n', "its 'category' None is not"),
        ('{"question_id": 1, "category": "a\\u001b[2J", "turns": ["a", "b"]}\n', "is no name"),
        ('{"question_id": 1, "category": "math", "turns": ["a"]}\n', "has not 2 turns"),
        ('{"question_id": 1, "category": "math", "turns": "ab"}\n', "its 'turns' 'ab' is not a valid list"),
        ('{"question_id": 1, "category": "math", "turns": ["a", " "]}\n', "its 'turns.1' ' ' is no text"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "\\ud83d"]}\n', "half of a character"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b"], "x": NaN}\n', "not finite"),
        ('{"question_id": ' + "9" * 5000 + "}\n", "is not readable JSON"),
        ("[" * 100_000 + "\n", "nested deeper"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n' * 2, "has question 1 twice"),
    ],
)
def test_a_damaged_file_of_questions_is_refused(tmp_path, text, named):
    path = tmp_path / "question.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        read_questions(path)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_do_not_change_the_questions(tmp_path, end, mark):
    path = tmp_path / "question.jsonl"
    text = "".join(f'{{"question_id": {i}, "category": "math", "turns": ["é", "b"]}}\n' for i in (1, 2))
    path.write_text(text, encoding="utf-8")
    plain, digest = read_questions(path), sha256_of_data(path)
    path.write_bytes((mark + text.replace("\n", end)).encode())
    assert read_questions(path) == plain
    assert sha256_of_data(path) == digest
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"the file of questions .*question\.jsonl is text in UTF-16"):
        read_questions(path)
