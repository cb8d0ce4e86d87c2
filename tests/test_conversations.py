"""Conversations to calibrate on: made by a rule or published, the assistant's tokens marked."""

import json

import pytest

from corpora.conversations import conversations, sample_turns, templated_chat
from corpora.errors import UserError

PARAGRAPH = "A long paragraph about {} that says one thing and then another. " * 5
TEMPLATE = (
    "{{ bos_token }}[be kind]{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def text(intactkv_root):
    """Both halves of a sample text: four articles of four paragraphs each."""
    folder = intactkv_root / "datasets" / "sample"
    folder.mkdir(parents=True)
    for role in ("calibration", "evaluation"):
        rows = [
            {"title": f"{role} {i}", "text": "\n".join(PARAGRAPH.replace("{}", f"{role} {i}, {j}") for j in range(4))}
            for i in range(4)
        ]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_rule_asks_for_an_article_and_for_more_of_it(text):
    turns = list(sample_turns("calibration", 42))
    assert len(turns) == 8  # two pairs of paragraphs of each of four articles
    for question, first, more, second in turns:
        title = question.removeprefix("Tell me about ").removesuffix(".")
        assert title in first
        assert title in second
        assert first != second
        assert more == "Please go on."
    assert turns == list(sample_turns("calibration", 42))
    assert turns != list(sample_turns("calibration", 43))


def test_held_out_conversations_are_of_other_articles(text, tiny_tokenizer):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    train, others = conversations(tokenizer, "sample", samples=5, held_out=3, max_length=900, min_assistant=50, seed=1)
    assert (len(train), len(others)) == (5, 3)
    assert all("calibration" in tokenizer.decode(chat.ids) for chat in train)
    assert all("evaluation" in tokenizer.decode(chat.ids) for chat in others)


def test_the_assistants_tokens_are_its_answers_and_their_ends(tiny_tokenizer):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    chat = templated_chat(tokenizer, ["ab", "cd", "ef", "gh"], max_length=500)
    assert tokenizer.decode(chat.ids) == "<s>[be kind]<user>ab<assistant>cd</s><user>ef<assistant>gh</s>"
    assert tokenizer.decode(chat.ids[chat.assistant]) == "cd</s>gh</s>"
    assert chat.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_cutting_keeps_the_beginning(tiny_tokenizer):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    whole = templated_chat(tokenizer, ["ab", "cd", "ef", "gh"], max_length=500)
    short = templated_chat(tokenizer, ["ab", "cd", "ef", "gh"], max_length=30)
    assert short.ids.tolist() == whole.ids[:30].tolist()
    assert short.assistant.tolist() == whole.assistant[:30].tolist()


def test_what_cannot_be_had_is_refused(text, tiny_tokenizer):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    size = {"held_out": 1, "max_length": 900, "min_assistant": 50, "seed": 1}
    with pytest.raises(UserError, match="gives 8 conversations with more than 50 assistant tokens, 9 are asked for"):
        conversations(tokenizer, "sample", samples=9, **size)
    with pytest.raises(UserError, match="unknown conversations 'poems'; choose sharegpt or sample"):
        conversations(tokenizer, "poems", samples=1, **size)
    with pytest.raises(UserError, match="ShareGPT conversations are missing"):
        conversations(tokenizer, "sharegpt", samples=1, **size)
    (text / "calibration.jsonl").unlink()
    with pytest.raises(UserError, match="the sample text is missing"):
        conversations(tokenizer, "sample", samples=1, **size)
    counting = tiny_tokenizer(chat_template="{{ messages | length }}" + TEMPLATE)  # every turn changes the first token
    with pytest.raises(UserError, match="changes earlier turns"):
        templated_chat(counting, ["ab", "cd", "ef", "gh"], max_length=500)
