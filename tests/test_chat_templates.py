"""Dialogues as token ids: Vicuna's text to the letter, one start token, and [P] in front of every prompt."""

import hashlib

import pytest

from corpora.errors import UserError
from corpora.sharegpt import VICUNA_PROMPT, VICUNA_SYSTEM
from eval.mtbench.answers import behind_prefix, question_file, read_questions
from eval.mtbench.chat_templates import chat_template, vicuna_text
from quantization.runs.prefixes import choose_prefix

PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
WITH_BOS = "{{ bos_token }}" + PLAIN
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
