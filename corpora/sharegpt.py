"""ShareGPT conversations as the text that calibrates an IntactKV prefix, in Vicuna's format.

The records are shuffled with Python's `random`, seed 42, and walked; the first 128 with more than 50 assistant tokens
among the first 1024 tokens are taken. Each turn is tokenized on its own:

    [BOS] | system + " USER: " + question + " ASSISTANT:" | answer | "USER: " + question + " ASSISTANT:" | answer …

As in the published code no </s> stands between the turns, and an empty turn adds nothing: of an empty question not even
"USER:" and "ASSISTANT:" remain (of the first one the system message and its space).
Departs from the published walk, which stops with an error at other role names, turns that do not alternate, half
characters and the end of the list: such records are left out, counted by their reason and named in a warning.
"""

import logging
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpora.catalog import corpus_directory, corpus_files
from corpora.errors import UserError
from corpora.files import refuse_half_characters
from corpora.readers import read_records
from corpora.tokens import encode, start_token_id

__all__ = ["VICUNA_PROMPT", "VICUNA_SYSTEM", "Chat", "ChatSamples", "chat_turns", "sharegpt_samples", "vicuna_chat"]

log = logging.getLogger(__name__)

# FastChat's template vicuna_v1.1.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_PROMPT = f"{VICUNA_SYSTEM} USER:"  # what every chat starts with: IntactKV_[P] is BOS and this
LONGEST_TURN = 4096  # tokens


@dataclass(frozen=True, eq=False)
class Chat:
    """One conversation in tokens."""

    ids: Tensor  # (T,) int64, starts with BOS
    assistant: Tensor  # (T,) bool: the tokens of the assistant's turns, where the loss is taken


@dataclass(frozen=True, eq=False)
class ChatSamples:
    """The chosen conversations, and what was left out on the way to them."""

    chats: tuple[Chat, ...]
    malformed: dict[str, int]  # how many records, by what is wrong with them
    short: int  # records with too few assistant tokens


def sharegpt_samples(
    tokenizer: Any,
    path: Path | None = None,
    *,
    samples: int = 128,
    max_length: int = 1024,
    min_assistant: int = 50,
    seed: int = 42,
) -> ChatSamples:
    """The first `samples` records of the shuffled file with more than `min_assistant` assistant tokens in `max_length`.

    path: a JSON file of records with `conversations`; None takes the catalogue's. Raises UserError if the file is
    missing or damaged, or holds too few such records.
    """
    if path is None:
        files = corpus_files("sharegpt", "calibration")
        if not files:
            raise UserError(
                f"the ShareGPT conversations are missing in {corpus_directory('sharegpt')}; run "
                "'bash scripts/prepare/data.sh sharegpt' or put ShareGPT_V4.3_unfiltered_cleaned_split.json there"
            )
        path = files[0]
    records = list(read_records(path))
    random.Random(seed).shuffle(records)
    chats: list[Chat] = []
    malformed: Counter[str] = Counter()
    short = 0
    for record in records:
        if len(chats) == samples:
            break
        try:
            turns = chat_turns(record)
        except ValueError as error:
            malformed[str(error)] += 1
            continue
        chat = vicuna_chat(tokenizer, turns, max_length=max_length)
        if int(chat.assistant.sum()) > min_assistant:
            chats.append(chat)
        else:
            short += 1
    left_out = "; ".join(f"{count} with {reason}" for reason, count in malformed.most_common())
    if len(chats) < samples:
        raise UserError(
            f"{path} gives {len(chats)} conversations with more than {min_assistant} assistant tokens among the first "
            f"{max_length}, {samples} are asked for (of its {len(records)} records {short} are too short, "
            f"{malformed.total()} malformed{f': {left_out}' if left_out else ''}); ask for fewer samples, or use the "
            "whole file"
        )
    if left_out:
        log.warning("%s: malformed records were left out: %s", path, left_out)
    return ChatSamples(tuple(chats), dict(malformed), short)


def chat_turns(record: Any) -> list[str]:
    """Texts of a record's turns from the first human one on, human and assistant in turn.

    Raises ValueError, with what is wrong in a few words, for a record of another form.
    """
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError("no turns in the field 'conversations'")
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError("a turn that has no text in the field 'value'")
    roles = [turn.get("from") for turn in turns]
    strange = [role for role in roles if role not in ("human", "gpt")]
    if strange:
        raise ValueError(f"a turn from {strange[0]!r}, known are 'human' and 'gpt'")
    if "human" not in roles:
        raise ValueError("no turn from 'human'")
    first = roles.index("human")
    if any(role != ("human", "gpt")[i % 2] for i, role in enumerate(roles[first:])):
        raise ValueError("turns that do not alternate between 'human' and 'gpt'")
    texts = [turn["value"] for turn in turns[first:]]
    try:
        refuse_half_characters("".join(texts), "")
    except UserError:
        raise ValueError("half of a character in a turn") from None
    return texts


def vicuna_chat(tokenizer: Any, turns: list[str], *, max_length: int = 1024) -> Chat:
    """Alternating turns (the human's first) in Vicuna's format, cut to `max_length` tokens."""
    ids, assistant = [start_token_id(tokenizer)], [False]
    for i, text in enumerate(turns):
        human = i % 2 == 0
        if human and text:
            text = f"USER: {text} ASSISTANT:"
        if i == 0:
            text = f"{VICUNA_SYSTEM} {text}"
        turn = encode(tokenizer, text)[:LONGEST_TURN]
        ids += turn
        assistant += [not human] * len(turn)
        if len(ids) >= max_length:
            break
    return Chat(torch.tensor(ids[:max_length]), torch.tensor(assistant[:max_length]))
