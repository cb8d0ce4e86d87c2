"""Dialogues as token ids: Vicuna's text to the letter, one start token, and [P] in front of every prompt."""

import hashlib
import json
from datetime import datetime

import pytest
from chats import QUESTIONS, turns_of, write_questions
from common import every
from transformers.utils import chat_template_utils

from corpora.chat import rendered
from corpora.conversations import templated_chat
from corpora.errors import UserError
from corpora.sharegpt import VICUNA_PROMPT, VICUNA_SYSTEM
from eval.__main__ import main
from eval.mtbench.answers import behind_prefix, question_file, read_questions
from eval.mtbench.chat_templates import chat_template, vicuna_text
from quantization.__main__ import main as quantization_main
from quantization.runs.prefixes import choose_prefix

PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
WITH_BOS = "{{ bos_token }}" + PLAIN
DATED = "{{ strftime_now('%d %b %Y, %H:%M:%S') }}\n" + PLAIN
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + PLAIN


def sample() -> list:
    return read_questions(question_file("sample"))


def test_vicunas_system_message_is_the_published_one():
    for text, length, start in ((VICUNA_SYSTEM, 154, "1fa69e2371b7"), (VICUNA_PROMPT, 160, "a854a4641e23")):
        assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:12]) == (length, start)


def test_an_answer_is_closed_and_the_next_turn_follows_without_a_space():
    assert vicuna_text(["How?"]) == f"{VICUNA_SYSTEM} USER: How? ASSISTANT:"
    assert vicuna_text(["How?", "So.", "Why?"]) == (
        f"{VICUNA_SYSTEM} USER: How? ASSISTANT: So.</s>USER: Why? ASSISTANT:"
    )


def test_vicunas_text_is_fastchats():
    conversation = pytest.importorskip("fastchat.conversation", reason="fschat is not installed")
    conv = conversation.get_conv_template("vicuna_v1.1")
    for role, text in ((0, "How?"), (1, "So."), (0, "Why?"), (1, None)):
        conv.append_message(conv.roles[role], text)
    assert vicuna_text(["How?", "So.", "Why?"]) == conv.get_prompt()


@pytest.mark.parametrize("template", [None, PLAIN, WITH_BOS])
def test_every_prompt_opens_with_one_start_token_and_the_prefix(tiny_tokenizer, template):
    """The tokenizer adds a start token by itself when asked to, one template spells it, too."""
    tokenizer = tiny_tokenizer(chat_template=template)
    name = "tiny-vicuna" if template is None else "tiny-chat"
    lead = list(choose_prefix("prompt", tokenizer, name).ids)
    assert lead[0] == tokenizer.bos_token_id
    assert len(lead) > 3
    chat = chat_template("auto", tokenizer, name)
    assert chat.name == ("vicuna_v1.1" if template is None else "tokenizer")
    questions = sample()
    assert [len(questions), len({question.category for question in questions})] == [16, 8]
    for question in questions:
        for turns in (question.turns[:1], [question.turns[0], "An answer.", question.turns[1]]):
            ids = chat.ids(turns)
            assert ids[: len(lead)] == lead
            assert ids.count(tokenizer.bos_token_id) == 1
            assert len(ids) > len(lead)


@pytest.mark.slow
def test_the_real_tokenizers_prompts_start_with_its_prefix(smollm2):
    from quantization.runs.opening import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    lead = choose_prefix("prompt", tokenizer, "smollm2-135m").ids
    chat = chat_template("auto", tokenizer, "smollm2-135m")
    assert behind_prefix(chat, sample(), lead, prepend=True) is chat  # nothing lacks it
    for question in sample():
        ids = chat.ids([question.turns[0], "An answer.", question.turns[1]])
        assert tuple(ids[: len(lead)]) == lead
        assert ids[1] != tokenizer.bos_token_id  # it opens every turn there, but stands once in front


def test_an_end_token_in_the_text_is_one_token(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    ids = chat_template("vicuna_v1.1", tokenizer, "any").ids(["a", "b", "c"])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_lacks_the_prefix_is_refused_or_gets_it(tiny_tokenizer):
    chat = chat_template("vicuna_v1.1", tiny_tokenizer(), "any")
    lead = chat.ids(["How"])[:-12]
    assert behind_prefix(chat, sample(), lead[:20], prepend=False) is chat
    other = [*lead[:20], lead[0]]
    with pytest.raises(UserError, match=r"question 9001 .* does not start with the prefix's tokens.*--prepend"):
        behind_prefix(chat, sample(), other, prepend=False)
    behind = behind_prefix(chat, sample(), other, prepend=True)
    turns = ["How?", "So.", "Why?"]
    assert behind.ids(turns) == [*other, *chat.ids(turns)[1:]]  # the prefix brings [BOS]
    assert chat.behind(lead[1:20]).ids(turns) == [*lead[1:20], *chat.ids(turns)]  # this one does not
    assert chat.behind(lead).ids(turns) == chat.ids(turns)


def test_a_prompt_that_is_nothing_but_the_prefix_is_refused(tiny_tokenizer):
    chat, (question, *_) = chat_template("vicuna_v1.1", tiny_tokenizer(), "any"), sample()
    with pytest.raises(UserError, match=r"question 9001 .* is nothing but the prefix"):
        behind_prefix(chat, [question], chat.ids(question.turns[:1]), prepend=True)


def test_templates_that_cannot_do_it_are_refused_in_words(tiny_tokenizer):
    with pytest.raises(UserError, match=r"tiny has no chat template; .*--template vicuna_v1.1"):
        chat_template("auto", tiny_tokenizer(), "tiny")
    with pytest.raises(UserError, match="no EOS token"):
        chat_template("vicuna_v1.1", tiny_tokenizer(eos_token=None), "tiny")
    chat = chat_template("auto", tiny_tokenizer(chat_template=ONE_TURN), "tiny")
    chat.ids(["a"])
    with pytest.raises(UserError, match=r"cannot write a dialogue of 3 turns .one turn only"):
        chat.ids(["a", "b", "c"])


@every(
    ("source", "lost"),
    [("{{ 'x' }}", "question"), ("{{ tools[0] }}", "question"), ("{{ messages[0].content }}", "answer"),
     ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", "second question")],
)  # fmt: skip
def test_a_template_that_leaves_out_a_turn_answers_no_question(source: str, lost: str, tiny_tokenizer) -> None:
    chat = chat_template("tokenizer", tiny_tokenizer(chat_template=source), "tiny")
    with pytest.raises(UserError, match=rf"writes a dialogue without its {lost}; choose --template vicuna_v1\.1"):
        behind_prefix(chat, sample(), (), prepend=False)


BROKEN = {
    "it raises": ("{{ raise_exception('a system message is needed') }}", r"\(a system message is needed\)"),
    "it is no template": ("{% for m in %}", r"\(Expected an expression.*\)"),
    "it adds what cannot be added": ("{{ messages[0].content + 1 }}", r"\(can only concatenate str.*\)"),
    "it looks where nothing is": ("{{ messages[5].content }}", r"\(list object has no element 5\)"),
    "it divides by nothing": ("{{ 1 / (messages|length - 1) }}", r"\(division by zero\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_fails_is_one_line_for_all_who_use_it(case, tiny_tokenizer):
    template, reason = BROKEN[case]
    tokenizer = tiny_tokenizer(chat_template=template)
    for call, way_out in (
        (lambda: choose_prefix("prompt", tokenizer, "tiny"), "give the text itself: --prefix"),
        (lambda: templated_chat(tokenizer, ["a"], max_length=9), "use a model with another template"),
        (lambda: chat_template("tokenizer", tokenizer, "tiny").ids(["a"]), "choose --template vicuna_v1.1"),
    ):
        with pytest.raises(UserError, match=rf"cannot write a dialogue of 1 turn {reason}; .*{way_out}"):
            call()


def test_named_templates_need_a_default(tiny_tokenizer):
    named = tiny_tokenizer(chat_template={"chat": PLAIN, "tools": PLAIN})
    for call in (lambda: choose_prefix("prompt", named, "tiny"), lambda: chat_template("auto", named, "tiny"),
                 lambda: templated_chat(named, ["a", "b"], max_length=9)):  # fmt: skip
        with pytest.raises(UserError, match=r"has the chat templates chat, tools, and none is called default"):
            call()
    some = tiny_tokenizer(chat_template={"default": PLAIN, "tools": "no"})
    assert chat_template("auto", some, "tiny").text(["a"]) == "<user> a\n<assistant>"
    with pytest.raises(UserError, match="a chat template that is no text but a int"):
        chat_template("auto", tiny_tokenizer(chat_template=5), "tiny")


def at(monkeypatch, *when: int) -> None:
    """Let transformers' templates believe that it is then."""

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*when)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def test_the_clock_of_a_template_stands_still(tiny_tokenizer, monkeypatch):
    tokenizer = tiny_tokenizer(chat_template=DATED)
    seen = []
    for day in ((2025, 1, 2, 3, 4, 5), (2031, 12, 24, 18, 0, 0)):
        at(monkeypatch, *day)
        chat = chat_template("auto", tokenizer, "tiny")
        seen.append((chat.ids(["a"]), chat.describe(), choose_prefix("prompt", tokenizer, "tiny").ids,
                     rendered(tokenizer, ["a"], opened=False, way_out="")))  # fmt: skip
        # Outside, a template still tells the time.
        assert str(day[0]) in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert seen[0] == seen[1]
    assert seen[0][3].startswith("26 Jul 2024, 00:00:00\n<user> a")
    assert seen[0][1]["date"] == "2024-07-26"
    assert "date" not in chat_template("auto", tiny_tokenizer(chat_template=PLAIN), "tiny").describe()


def test_what_a_prompt_is_made_of_shows_in_its_description(tiny_tokenizer):
    def told(template=PLAIN, word="tokenizer", **options):
        return chat_template(word, tiny_tokenizer(chat_template=template, **options), "tiny").describe()

    plain = told()
    assert told() == plain
    edited = told(PLAIN.replace("<", "["))
    assert {name for name in plain if plain[name] != edited[name]} == {"template_source", "prompt"}
    unseen = told("{% if messages|length > 7 %}x{% endif %}" + PLAIN)  # an edit that a short dialogue does not show
    assert {name for name in plain if plain[name] != unseen[name]} == {"template_source"}
    special = told("{{ eos_token }}" + PLAIN), told("{{ eos_token }}" + PLAIN, eos_token="<unk>")
    assert {name for name in plain if special[0][name] != special[1][name]} >= {"prompt"}
    assert told(word="vicuna_v1.1")["template_source"] is None


@pytest.fixture
def model(intactkv_root, tiny_checkpoint, tiny_tokenizer):
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=512)
    tiny_tokenizer(chat_template=PLAIN).save_pretrained(directory)
    return directory


def test_answers_to_prompts_of_two_templates_never_meet(model, run_main, tmp_path, monkeypatch):
    call = ("mtbench", "--model", model, "--questions", write_questions(tmp_path / "q.jsonl", QUESTIONS[:3]),
            "--max-new-tokens", 4, "--out", path := tmp_path / "a.jsonl")  # fmt: skip
    template = model / "chat_template.jinja"
    assert run_main(main, *call, "--limit", 2)[0] == 0
    kept = path.read_bytes()
    template.write_text(PLAIN.replace("<", "["))
    code, _, err = run_main(main, *call)
    assert code == 2
    assert f"{path} holds answers that were made with another template_source, prompt" in err
    assert path.read_bytes() == kept
    # A template that prints the time goes on with its own file on another day.
    template.write_text(DATED)
    other = (*call[:-1], tmp_path / "b.jsonl")
    at(monkeypatch, 2025, 1, 2)
    assert run_main(main, *other, "--limit", 2)[0] == 0
    at(monkeypatch, 2026, 3, 4)
    code, out, err = run_main(main, *other, "--json")
    assert code == 0, err
    assert json.loads(out)["answered_now"] == 1
    assert len(turns_of(tmp_path / "b.jsonl")) == 3
    # Another tokenizer under the same template.
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "made with another tokenizer, prompt" in run_main(main, *other)[2]


def test_weights_behind_a_prompt_fit_the_prompt_of_another_day_and_not_of_another_template(
    model, run_main, text, monkeypatch
):
    template = model / "chat_template.jinja"
    template.write_text(DATED)
    at(monkeypatch, 2025, 1, 2)
    out = model.parent / "quantized"
    made = ("--model", model, "--recipe", "gptq", "--bits", 4, "--group-size", 32, "--calibration", text,
            "--calibration-samples", 2, "--calibration-length", 32, "--prefix", "prompt", "--calibrate-behind-prefix",
            "--out", out)  # fmt: skip
    assert run_main(quantization_main, *made)[0] == 0
    at(monkeypatch, 2026, 3, 4)
    call = ("ppl", "--model", out, "--corpus", text, "--window", 64, "--limit", 1, "--prefix")
    code, _, err = run_main(main, *call, "prompt")
    assert code == 0, err
    assert "run it with --prefix prompt" in run_main(main, *call, "bos")[2]
    (out / "chat_template.jinja").write_text("Be kind. " + DATED)
    template.write_text("Be kind. " + DATED)
    code, _, err = run_main(main, *call, "prompt")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert "--prefix prompt stands for other tokens now" in line
    assert "the chat template or the tokenizer has changed" in line
    assert "run it with" not in line
