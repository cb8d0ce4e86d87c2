"""Conversations that calibrate a prefix, in the model's own chat format, with the assistant's tokens marked.

    sharegpt    the published data, in Vicuna's format (`corpora.sharegpt`)
    sample      conversations made from the articles of the sample text by a rule, for models without that data:
                "Tell me about TITLE." is answered by a paragraph of the article, "Please go on." by the next one

A model with a chat template is trained on its own template, the loss on what stands between the opening and the end of
each assistant's turn. Training takes articles of the calibration half, held-out samples those of the evaluation half.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.catalog import corpus_files
from corpora.chat import rendered, template_source
from corpora.errors import UserError
from corpora.json_files import fitted
from corpora.readers import read_rows
from corpora.sharegpt import Chat, sharegpt_samples, vicuna_chat
from corpora.tokens import encode, start_token_id

__all__ = ["SOURCES", "conversations", "sample_turns", "templated_chat"]

SOURCES = ("sharegpt", "sample")
SHORTEST = 200  # characters of a paragraph that is an answer


class _Article(TypedDict):
    title: str
    text: str


def conversations(
    tokenizer: Any, source: str, *, samples: int, held_out: int, max_length: int, min_assistant: int, seed: int
) -> tuple[list[Chat], list[Chat]]:
    """Chats to train on and chats held out, which share no record or article.

    Raises UserError for an unknown source, or if it is missing or too small.
    """
    for name, count in (("samples", samples), ("held_out", held_out)):
        if count < 0:
            raise UserError(f"conversations: {name} is {count}; give 0 or more")
    if source == "sharegpt":
        found = sharegpt_samples(
            tokenizer, samples=samples + held_out, max_length=max_length, min_assistant=min_assistant, seed=seed
        ).chats
        return list(found[:samples]), list(found[samples:])
    if source != "sample":
        raise UserError(f"unknown conversations {source!r}; choose {' or '.join(SOURCES)}")

    def made(role: str, count: int) -> list[Chat]:
        chats: list[Chat] = []
        for turns in sample_turns(role, seed):
            if len(chats) == count:
                break
            chat = templated_chat(tokenizer, turns, max_length=max_length)
            if int(chat.assistant.sum()) > min_assistant:
                chats.append(chat)
        if len(chats) < count:
            raise UserError(
                f"the sample text gives {len(chats)} conversations with more than {min_assistant} assistant tokens, "
                f"{count} are asked for; ask for fewer"
            )
        return chats

    return made("calibration", samples), made("evaluation", held_out)


def sample_turns(role: str, seed: int) -> Iterator[list[str]]:
    """Turns of the conversations about the articles of one role, the user's first, in a random order.

    Raises UserError if the sample text is not here.
    """
    files = corpus_files("sample", role)
    if not files:
        raise UserError("the sample text is missing; run 'bash scripts/prepare/data.sh sample'")
    made = []
    for number, row in enumerate(read_rows(files), start=1):
        fitted(row, _Article, f"article {number} of {files[0]}", mend="prepare it again")
        paragraphs = [p.strip() for p in row["text"].split("\n") if len(p.strip()) >= SHORTEST]
        for i in range(0, len(paragraphs) - 1, 2):
            made.append([f"Tell me about {row['title']}.", paragraphs[i], "Please go on.", paragraphs[i + 1]])
    random.Random(seed).shuffle(made)
    yield from made


def templated_chat(tokenizer: Any, turns: list[str], *, max_length: int) -> Chat:
    """Alternating turns (the user's first) in the tokenizer's chat template, or Vicuna's format where it has none; cut
    to `max_length` tokens. Raises UserError for a template that fails, or whose beginning depends on what follows."""
    if template_source(tokenizer) is None:
        return vicuna_chat(tokenizer, turns, max_length=max_length)

    def tokens(count: int, opened: bool) -> list[int]:
        text = rendered(tokenizer, turns[:count], opened=opened, way_out="use a model with another template")
        ids, start = encode(tokenizer, text), start_token_id(tokenizer)
        return ids if ids[:1] == [start] else [start, *ids]

    ids: list[int] = []
    assistant: list[bool] = []
    for count in range(1, len(turns) + 1, 2):
        opened = tokens(count, True)
        answered = tokens(min(count + 1, len(turns)), False)
        if opened[: len(ids)] != ids or answered[: len(opened)] != opened:
            raise UserError(
                "the tokenizer's chat template changes earlier turns when later ones follow, so the assistant's tokens "
                "cannot be found in it; use a model with another template"
            )
        assistant += [False] * (len(opened) - len(ids)) + [True] * (len(answered) - len(opened))
        ids = answered
        if len(ids) >= max_length:
            break
    return Chat(torch.tensor(ids[:max_length]), torch.tensor(assistant[:max_length]))
