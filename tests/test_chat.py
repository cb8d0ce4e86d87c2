"""The chat: what the model reads and what stays in the cache, scripts and commands, transcripts, Ctrl-C."""

import io
import json
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from common import error_line, every

from corpora.errors import UserError
from corpora.json_files import with_sum
from eval import chat
from eval.__main__ import main
from eval.chat import PROMPTS, Conversation, cache_state, first_divergence, weight_bytes
from eval.generation import Generation
from eval.mtbench.chat_templates import chat_template
from eval.programs import chat as program_file
from eval.runs import record_at
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.kv_cache import KIVI, PerHead

BOS, EOS, UNK, PAD = 1, 2, 3, 0
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CONTEXT = 512
LINES = ["What is a fox?", "And a dog?", "Why?"]
STOPS = Generation((EOS, UNK, PAD), PAD)  # of a random model, whose special tokens say nothing


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint, tiny_tokenizer) -> Path:
    """A tiny checkpoint with a chat template in its own zoo."""
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=CONTEXT)
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, UNK, PAD]}))
    return directory


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.txt"
    file.write_text("\n".join([*LINES[:2], "", "/stats", "/reset", LINES[2], "/help", "/exit", "never read"]) + "\n")
    return file


@pytest.fixture
def program(run_main, monkeypatch):
    """program(arguments…, piped=None) -> (exit code, stdout, stderr) of `eval chat`, run in this process."""

    def run(*arguments, piped: bytes | None = None):
        monkeypatch.setattr(sys, "stdin", None if piped is None else io.TextIOWrapper(io.BytesIO(piped)))
        return run_main(main, "chat", *arguments)

    return run


def talk_of(tiny_model, tiny_tokenizer, *, prefix=False, kv=None, template=TEMPLATE, new=12, **options) -> Conversation:
    """A conversation with a tiny model that says no special tokens, behind its own [BOS] where asked."""
    tokenizer = tiny_tokenizer(chat_template=template)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    model.lm_head.weight[[PAD, BOS, EOS, UNK]] = 0
    intact = build_prefix(model, torch.tensor([BOS])) if prefix else None
    plain = chat_template("tokenizer", tokenizer, "tiny")
    return Conversation(attach(model, intact, kv), plain, STOPS, new, CONTEXT, **options)


def transcript_of(file: Path):
    return json.loads(file.read_text())


# what the model reads -------------------------------------------------------------------------------------------------


@every("template", [TEMPLATE, "<s>" + TEMPLATE, "<s><s>" + TEMPLATE])
def test_a_prompt_of_any_turn_has_one_start_token(template, tiny_model, tiny_tokenizer):
    talk = talk_of(tiny_model, tiny_tokenizer, template=template)
    for line in LINES:
        said = talk.answer(line)
        held = talk.cache.tokens[0].tolist()
        assert held[0] == BOS
        assert held[: said["prompt"]].count(BOS) == 1


@every("prefix", [False, True])
@every("kv", [None, PerHead(bits=4), PerHead(bits=2), KIVI(bits=2, group_size=16, residual=32)])
def test_keeping_the_past_says_what_feeding_it_again_says(prefix, kv, tiny_model, tiny_tokenizer):
    kept, anew = (talk_of(tiny_model, tiny_tokenizer, prefix=prefix, kv=kv) for _ in range(2))
    for turn, line in enumerate(LINES):
        said = kept.answer(line)
        anew.cache = None
        again = anew.answer(line)
        assert said["ids"] == again["ids"]
        assert again["fed"] == said["prompt"] - prefix
        # Beside the new line there is the last token of the answer, which nothing was predicted from.
        if turn:
            assert said["fed"] < len(line) + 35
        if isinstance(kv, KIVI):
            behind = said["prompt"] + len(said["ids"]) - 1 - prefix
            rounded = behind - behind % 32, max(0, behind - 32)  # keys in whole residuals, values behind one
            assert said["quantized"] == pytest.approx(sum(rounded) / 2 / behind)
        else:
            assert said["quantized"] == (0.0 if kv is None else 1.0)


def test_the_cache_holds_the_dialogue_as_the_template_writes_it(tiny_model, tiny_tokenizer):
    talk = talk_of(tiny_model, tiny_tokenizer)
    for line in LINES:
        talk.answer(line)
    rendered = talk.template.ids([*talk.turns, "next"])
    held = talk.cache.tokens[0].tolist()
    assert rendered[: len(held)] == held
    assert talk.turns[::2] == LINES


def test_a_template_that_writes_the_past_otherwise_gets_it_fed_again_and_that_is_said_once(
    program, model, script, tiny_tokenizer, caplog, tmp_path
):
    shouting = TEMPLATE.replace("m.content", "(m.content if loop.last else m.content | upper)")
    tiny_tokenizer(chat_template=shouting).save_pretrained(model)
    script.write_text("\n".join(LINES))
    code, _, err = program("--model", model, "--script", script, "--max-new-tokens", 4, "--out", tmp_path / "t.json")
    assert code == 0, err
    said = json.loads((tmp_path / "t.json").read_text())["answers"]
    assert [answer["fed"] for answer in said] == [answer["prompt"] for answer in said]
    assert caplog.text.count("fed again") == 1


def test_a_cache_of_which_nothing_was_quantized_is_said(program, model, script, caplog):
    words = ("--model", model, "--script", script, "--kv", "kivi", "--kv-bits", 2, "--kv-group-size", 16)
    for residual, said in ((CONTEXT, 1), (16, 0)):
        caplog.clear()
        code, _, err = program(*words, "--set", f"kv_cache.residual={residual}", "--max-new-tokens", 4)
        assert code == 0, err
        assert caplog.text.count("none of the cache was rounded") == said


def test_an_answer_is_the_greedy_one_of_the_plain_model(tiny_model, tiny_tokenizer):
    talk = talk_of(tiny_model, tiny_tokenizer, new=6)
    ids = talk.template.ids(LINES[:1])
    expected = list(ids)
    with torch.no_grad():
        while len(expected) < len(ids) + 6 and expected[-1] not in STOPS.stops:
            expected.append(int(talk.model.model(torch.tensor([expected])).logits[0, -1].argmax()))
    said = talk.answer(LINES[0])
    assert said["ids"] == expected[len(ids) :]
    assert said["fed"] == said["prompt"] == len(ids)


def test_what_is_streamed_is_the_answer(tiny_model, tiny_tokenizer):
    talk, parts = talk_of(tiny_model, tiny_tokenizer, new=30), []
    said = talk.answer(LINES[0], parts.append)
    assert "".join(parts) == said["answer"]
    assert len(said["answer"]) > 5
    assert said["seconds"] > said["seconds_to_first"] > 0


def test_a_drawn_answer_is_the_seeds(tiny_model, tiny_tokenizer):
    def drawn(**options):
        return talk_of(tiny_model, tiny_tokenizer, **options).answer(LINES[0])["ids"]

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=1e-6, seed=1) == drawn()


def test_a_dialogue_without_room_is_refused_and_stays_as_it_was(tiny_model, tiny_tokenizer):
    talk = talk_of(tiny_model, tiny_tokenizer)
    talk.answer(LINES[0])
    turns = list(talk.turns)
    with pytest.raises(UserError, match="which leaves none for an answer; /reset begins a new one"):
        talk.answer("x" * CONTEXT)
    assert talk.turns == turns
    last = talk.answer("x" * (CONTEXT - 3 - len(talk.template.ids([*talk.turns, ""]))))
    assert len(last["ids"]) <= 3
    assert last["stopped"] in ("context", "end")


def test_bytes_are_those_of_the_tensors(tiny_model, tiny_tokenizer):
    talk = talk_of(tiny_model, tiny_tokenizer)
    said = talk.answer(LINES[0])
    held = said["prompt"] + len(said["ids"]) - 1
    assert (
        said["cache_bytes"] == cache_state(talk.cache)[0] == 2 * 3 * 2 * 16 * 4 * held
    )  # K, V; layers, heads, D, float32
    stored = sum(p.numel() * p.element_size() for p in talk.model.model.state_dict().values())
    assert 0 <= weight_bytes(talk.model.model) - stored <= 8 * 16  # and the inverse frequencies of RoPE


# comparing ------------------------------------------------------------------------------------------------------------


def test_the_first_divergence_is_the_first_other_token():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([], [1]) == 0


@pytest.mark.parametrize("prefix", ["none", "prompt", "bos"])
def test_full_precision_never_diverges_from_itself(prefix, program, model, script, tmp_path):
    out = tmp_path / "t.json"
    code, printed, err = program("--model", model, "--script", script, "--prefix", prefix, "--max-new-tokens", 10,
                                 "--compare", "--out", out)  # fmt: skip
    assert code == 0, err
    transcript = json.loads(out.read_text())
    assert [said["reference"]["first_divergence"] for said in transcript["answers"]] == [None] * 3
    assert [said["reference"]["ids"] for said in transcript["answers"]] == [
        said["ids"] for said in transcript["answers"]
    ]
    assert "Beside full precision" in printed


def test_a_quantized_model_diverges_and_each_answer_is_compared_behind_the_same_past(
    program, model, tmp_path, tiny_tokenizer
):
    out = tmp_path / "t.json"
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    code, _, err = program("--model", model, "--script", tmp_path / "lines.txt", "--recipe", "rtn", "--bits", 2,
                           "--group-size", 32, "--max-new-tokens", 10, "--compare", "--out", out)  # fmt: skip
    assert code == 0, err
    answers = json.loads(out.read_text())["answers"]
    assert any(said["reference"]["first_divergence"] is not None for said in answers)
    from quantization.runs.opening import load_model, load_tokenizer

    plain = chat_template("auto", load_tokenizer(model), "tiny-llama")
    dense, turns = load_model(model, torch.float32, torch.device("cpu")), []
    for said in answers:
        turns.append(said["user"])
        ids = plain.ids(turns)
        with torch.no_grad():
            first = int(dense(torch.tensor([ids])).logits[0, -1].argmax())
        assert said["reference"]["ids"][0] == first
        assert said["reference"]["first_divergence"] == first_divergence(said["ids"], said["reference"]["ids"])
        turns.append(said["answer"])


# scripts, commands, transcripts ---------------------------------------------------------------------------------------


def test_a_script_is_answered_line_by_line_and_its_commands_are_obeyed(program, model, script, tmp_path):
    out = tmp_path / "t.json"
    code, printed, err = program("--model", model, "--script", script, "--kv-bits", 4, "--prefix", "bos",
                                 "--max-new-tokens", 8, "--out", out)  # fmt: skip
    assert code == 0, err
    transcript = json.loads(out.read_text())
    answers = transcript["answers"]
    assert [said["user"] for said in answers] == LINES
    assert [said["dialogue"] for said in answers] == [1, 1, 2]
    assert all(len(said["ids"]) <= 8 for said in answers)
    for line in [*LINES, "/stats", "/reset", "/help"]:
        assert f"> {line}\n" in printed
    assert "never read" not in printed
    assert f"weights  {transcript['weight_bytes'] / 1e6:,.1f} MB" in printed
    assert "100.0% of the elements rounded, behind 1 of the prefix" in printed
    assert "tokens per second" in printed
    assert "/exit   leave" in printed
    assert str(out) in printed
    assert transcript["settings"]["kv"]["bits"] == 4


def test_the_lines_of_standard_input_are_a_script_where_it_is_no_terminal(program, model, script, tmp_path):
    texts = []
    for number, (words, piped) in enumerate(((("--script", script), None), ((), script.read_bytes()))):
        out = tmp_path / f"{number}.json"
        assert program("--model", model, *words, "--max-new-tokens", 6, "--out", out, piped=piped)[0] == 0
        texts.append([said["ids"] for said in json.loads(out.read_text())["answers"]])
    assert texts[0] == texts[1]


def test_the_published_questions_each_begin_anew(program, model, tmp_path):
    out = tmp_path / "t.json"
    code, _, err = program("--model", model, "--prompt", "riddle", "--prompt", "distillation",
                                 "--max-new-tokens", 4, "--out", out)  # fmt: skip
    assert code == 0, err
    answers = json.loads(out.read_text())["answers"]
    assert [(said["dialogue"], said["user"]) for said in answers] == list(enumerate(PROMPTS.values(), 1))
    assert tuple(PROMPTS) == program_file.PROMPTS


def test_a_script_leaves_a_record_that_is_read_back(program, model, script, tmp_path):
    words = ("--model", model, "--prompt", "riddle", "--kv-bits", 4, "--prefix", "bos", "--max-new-tokens", 4)
    out = tmp_path / "t.json"
    assert program(*words, "--out", out)[0] == 0
    code, printed, err = program(*words, "--json")
    assert code == 0, err
    record = json.loads(printed)  # and nothing else: the conversation goes to stderr
    assert f"> {PROMPTS['riddle']}" in err
    assert [said["ids"] for said in record["answers"]] == [said["ids"] for said in transcript_of(out)["answers"]]
    assert record["settings"]["prompts"] == ["riddle"]
    assert record_at(Path(record["path"])) == record
    assert json.loads(program(*words, "--json")[1]) == record
    assert json.loads(program(*words, "--json", "--force")[1])["started"] >= record["started"]
    others = [(*words, "--prefix", "none"), (*words, "--max-new-tokens", 5), (*words, "--prompt", "distillation"),
              ("--model", model, "--script", script, *words[4:])]  # fmt: skip
    found = {json.loads(program(*other, "--json")[1])["identity"] for other in others}
    assert len(found - {record["identity"]}) == len(others)


def test_a_record_of_a_conversation_that_says_nothing_is_refused(program, model):
    record = json.loads(program("--model", model, "--prompt", "riddle", "--max-new-tokens", 2, "--json")[1])
    path, _ = Path(record.pop("path")), record.pop("sha256")
    path.write_text(json.dumps(with_sum(record | {"answers": []})))
    with pytest.raises(UserError, match="answers"):
        record_at(path)


def test_only_a_transcript_is_replaced(program, model, script, tmp_path):
    out = tmp_path / "t.json"
    words = ("--model", model, "--script", script, "--max-new-tokens", 2, "--out", out)
    assert program(*words)[0] == 0
    assert program(*words)[0] == 0
    transcript = json.loads(out.read_text())
    changed = transcript | {"answers": transcript["answers"][:1]}
    for content, said in ((json.dumps({"a": 1}), "the transcript"), ("mine", "not readable JSON"),
                          (json.dumps(changed), "its sum is another")):  # fmt: skip
        out.write_text(content)
        code, _, err = program(*words)
        assert code == 2
        assert said in error_line(err)
        assert out.read_text() == content
    out.write_text(json.dumps(with_sum({k: v for k, v in changed.items() if k != "sha256"})))
    assert program(*words)[0] == 0


BAD_INPUT = {
    "a command that is none": ("/rest\n", (), "line 1: /rest is no command; give /reset, /stats, /exit, /help"),
    "nothing to say": ("/stats\n\n", (), "says nothing to the model"),
    "half a character": (b"\xff\xfe", (), "save it as UTF-8"),
    "a prefix of no dialogue": ("hi", ("--prefix", "A fox."), "does not start with the prefix's tokens"),
    "nothing to put in front": ("hi", ("--prepend",), "--prepend puts a prefix in front, but none was named"),
    "two scripts": ("hi", ("--prompt", "riddle"), "leave --script or --prompt out"),
    "a longer line than the model": ("x" * CONTEXT, (), "positions, which leaves none for an answer"),
    "no tokens": ("hi", ("--max-new-tokens", "0"), "--max-new-tokens: 0 is not allowed"),
    "a temperature below none": ("hi", ("--temperature", "-1"), "--temperature: -1 is not allowed"),
    "a record and a transcript": ("hi", ("--json", "--out", "t.json"), "leave it out, or --out and --compare"),
    "no record to make again": ("hi", ("--force",), "add --json, or leave it out"),
    "a transcript of another kind": ("hi", ("--out", "t.txt"), "ends in .json"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line(case, program, model, script):
    content, words, said = BAD_INPUT[case]
    script.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = program("--model", model, "--script", script, *words)
    assert code == 2
    assert said in error_line(err)


def test_standard_input_that_is_no_text_is_refused(program, model):
    for piped, said in ((b"\xff", "standard input is no text in UTF-8"), (None, "standard input is closed")):
        code, _, err = program("--model", model, piped=piped)
        assert code == 2
        assert said in error_line(err)


def test_a_model_without_a_chat_template_is_refused(program, model, script):
    (model / "chat_template.jinja").unlink()
    code, _, err = program("--model", model, "--script", script)
    assert code == 2
    assert "tiny-llama has no chat template" in error_line(err)


def test_what_was_said_before_a_mistake_is_kept(program, model, script, tmp_path):
    script.write_text(f"{LINES[0]}\n{'x' * CONTEXT}\n")
    code, _, err = program("--model", model, "--script", script, "--max-new-tokens", 4, "--out", tmp_path / "t.json")
    assert code == 2
    assert "leaves none for an answer" in error_line(err)
    assert [said["user"] for said in json.loads((tmp_path / "t.json").read_text())["answers"]] == LINES[:1]


# a terminal -----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Standard input of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(run_main, monkeypatch):
    """typed(lines, arguments…) -> (exit code, stdout, stderr) of a conversation in a terminal."""

    def run(lines: str, *arguments):
        monkeypatch.setattr(sys, "stdin", Terminal(lines))
        return run_main(main, "chat", *arguments)

    return run


def test_in_a_terminal_mistakes_are_told_and_the_end_of_the_input_ends(typed, model, tmp_path):
    out = tmp_path / "t.json"
    code, printed, err = typed(
        f"/rest\n\n{'x' * CONTEXT}\nWhy?\n", "--model", model, "--max-new-tokens", 3, "--out", out
    )
    assert code == 0, err
    assert "/rest is no command; /help lists them" in printed
    assert "which leaves none for an answer" in printed
    assert [said["user"] for said in json.loads(out.read_text())["answers"]] == ["Why?"]


def test_ctrl_c_ends_the_answer_and_twice_the_program(typed, model, tmp_path, monkeypatch):
    out, presses = tmp_path / "t.json", iter([1, 0, 2])
    before = signal.getsignal(signal.SIGINT)

    class Pressed(chat._Told):
        def put(self, value):
            if self.next_tokens_are_prompt:
                self.presses = next(presses)
            elif self.presses:
                self.presses -= 1
                signal.raise_signal(signal.SIGINT)
            super().put(value)

    monkeypatch.setattr(chat, "_Told", Pressed)
    monkeypatch.setattr(chat, "StoppingCriteriaList", partial(_late, chat.StoppingCriteriaList))
    code, _, err = typed("One?\nTwo?\nThree?\n", "--model", model, "--max-new-tokens", 9, "--out", out)
    assert code == 130, err
    first, second = json.loads(out.read_text())["answers"]
    assert (first["stopped"], len(first["ids"])) == ("interrupted", 2)
    assert second["stopped"] in ("length", "end")
    signal.signal(signal.SIGINT, before)


def _late(of, criteria):
    """The stopping criteria, but asked only about an answer of two tokens or more: room for two presses."""
    (ended,) = criteria
    calls = []

    def asked(ids, *arguments, **keywords):
        calls.append(1)
        done = ended(ids, *arguments, **keywords)
        return done if len(calls) > 1 else torch.zeros_like(done)

    return of([asked])
