"""python -m eval chat: a conversation with a model behind its prefix, in the terminal or from a script."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from eval.programs.transcripts import Keeper, refuse_other
from quantization.programs.options import add_plan_options, plan_of, show_log
from quantization.programs.out_option import check_out

if TYPE_CHECKING:
    from eval.chat import Conversation
    from eval.record_forms import Said
    from intactkv.prefix import Prefix
    from quantization.runs.plan import Plan

__all__ = ["add", "run"]

log = logging.getLogger(__name__)

COMMANDS = {
    "/reset": "begin a new dialogue",
    "/stats": "speed, memory, and the share of the cache's elements that is rounded",
    "/exit": "leave (or the end of the input)",
    "/help": "this list",
}
EXAMPLES = """\
examples:
  python -m eval chat --model modelzoo/smollm2/smollm2-135m --recipe rtn-w4 --kv-bits 4 --prefix prompt
  python -m eval chat --model modelzoo/smollm2/smollm2-135m --kv-bits 2 --prompt riddle --compare --out riddle.json
  python -m eval chat --model modelzoo/smollm2/smollm2-135m --kv-bits 2 --prompt distillation --json

In a terminal: /reset, /stats, /exit, /help; Ctrl-C ends the answer, twice the program. Where standard input is no
terminal its lines are the script.
"""
PROMPTS = ("riddle", "distillation")  # of eval.chat, which imports torch
LONGEST = 1 << 20  # characters of a script
PROMPT = "> "


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    chat = commands.add_parser(
        "chat",
        help="a conversation in the terminal, or from a script",
        description="A conversation with a model, quantized or not, behind its prefix. The past stays in the cache. "
        "Answers are greedy unless --temperature is given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_options(chat, several=True)
    group = chat.add_argument_group("conversation")
    group.add_argument(
        "--script", type=values.path, metavar="FILE", help="what the user says, one line a turn; commands, too"
    )
    group.add_argument(
        "--prompt",
        action="append",
        choices=PROMPTS,
        help="a published question in place of a script; each of several begins anew",
    )
    group.add_argument(
        "--template",
        default="auto",
        choices=["auto", "vicuna_v1.1", "tokenizer"],
        help="of the dialogue (default: vicuna_v1.1 for Vicuna, the tokenizer's own for all others)",
    )
    group.add_argument(
        "--prepend",
        action="store_true",
        help="put the prefix in front of a dialogue that does not start with it; without this it is refused",
    )
    group.add_argument(
        "--max-new-tokens", type=values.count(), default=128, metavar="T", help="of an answer (default: 128)"
    )
    group.add_argument(
        "--temperature",
        type=values.number(least=0, most=100, like="0.7"),
        default=0.0,
        metavar="X",
        help="of the draw of tokens, with the model's own top-k, top-p and min-p (default: 0, the likeliest token)",
    )
    group.add_argument("--answer-seed", type=values.seed, default=0, metavar="S", help="of the draw (default: 0)")
    chat.add_argument("--out", type=values.path, metavar="FILE.json", help="the transcript (default: none is written)")
    chat.add_argument(
        "--compare",
        action="store_true",
        help="let the full-precision model answer every line behind the same past, when the conversation is over, and "
        "tell the first token in which it differs",
    )
    chat.add_argument(
        "--json", action="store_true", help="keep a run record of a script or --prompt, and print it; the conversation "
        "goes to stderr"
    )  # fmt: skip
    chat.add_argument("--force", action="store_true", help="with --json: talk again, even if there is a record")


def run(options: argparse.Namespace) -> None:
    """Talk, write the transcript, compare."""
    from corpora.storage import identity
    from eval.generation import own_generation
    from eval.mtbench.answers import Question, behind_prefix
    from eval.mtbench.chat_templates import chat_template
    from quantization.runs.checkpoint import dense_directory

    if options.json and (options.out is not None or options.compare):
        raise UserError("--json keeps the conversation in a run record; leave it out, or --out and --compare")
    if options.force and not options.json:
        raise UserError("--force is of the run record, which --json keeps; add --json, or leave it out")
    if options.out is not None:
        check_out(options, ".json")
        refuse_other(options.out)
    show_log()
    plan = plan_of(options, several=True)
    lines = _given(options)
    if options.json and lines is None:
        raise UserError("--json is of a conversation that is a script; give --script FILE or --prompt")
    if options.prepend and not plan.has_prefix:
        raise UserError("--prepend puts a prefix in front, but none was named; add --prefix, or leave it out")
    if options.compare:
        dense_directory(plan.checkpoint, "--compare lets it answer, too")
    plain = chat_template(options.template, plan.tokenizer, plan.checkpoint.family_name)
    said = ["Hello."] if lines is None else [line for line in lines if line not in COMMANDS]
    questions = [Question(number, "chat", (line,)) for number, line in enumerate(said, 1)]
    template = behind_prefix(plain, questions, plan.choice.ids, options.prepend)
    generation = own_generation(plan.checkpoint.directory, plan.tokenizer)
    settings = plan.describe() | {
        **template.describe(),
        "context": plan.context,
        "prepended": bool(template.lead),
        "generation": generation.describe(),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.answer_seed,
        "script": None if lines is None else identity({"lines": lines}, 64),
        "prompts": options.prompt or [],
    }

    def conversation(model: Any) -> "Conversation":
        from eval.chat import Conversation

        return Conversation(
            model, template, generation, options.max_new_tokens, plan.context, options.temperature, options.answer_seed
        )

    if options.json:
        _record(plan, conversation, lines or [], settings, options.force)
        return
    keep = Keeper(options.out, settings)
    prefix = _talk(plan, conversation, lines, keep)
    if options.compare and keep.answers:
        _compare(plan, prefix, conversation, keep)
    if options.out is not None and keep.answers:
        print(options.out)


# what the user says ---------------------------------------------------------------------------------------------------


def _given(options: argparse.Namespace) -> list[str] | None:
    """The lines of the script; None if they are typed in a terminal. Raises UserError for what is no script."""
    from corpora.files import open_text, refuse_half_characters

    if options.prompt and options.script is not None:
        raise UserError("--prompt is a script of its own; leave --script or --prompt out")
    if options.prompt:
        from eval.chat import PROMPTS as TEXTS

        return [line for name in options.prompt for line in ("/reset", TEXTS[name])][1:]
    if options.script is not None:
        what = f"--script {options.script}"
        with open_text(options.script, "the script") as file:
            text = file.read(LONGEST + 1)
    elif sys.stdin is not None and sys.stdin.isatty():
        return None
    else:
        what, text = "standard input", _piped()
    if len(text) > LONGEST:
        raise UserError(f"{what} is longer than {LONGEST} characters; give a shorter conversation")
    refuse_half_characters(text, what)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        if line.startswith("/") and line not in COMMANDS:
            raise UserError(f"{what}, line {number}: {values.shown(line)} is no command; give {', '.join(COMMANDS)}")
    if all(line in COMMANDS for line in lines):
        raise UserError(f"{what} says nothing to the model; write one line for each turn of the user")
    return lines


def _piped() -> str:
    """All of standard input. Raises UserError if it is no text in UTF-8, or closed."""
    if sys.stdin is None:
        raise UserError("standard input is closed; give --script FILE, or --prompt")
    try:
        return sys.stdin.buffer.read(4 * LONGEST + 4).decode()
    except UnicodeDecodeError:
        raise UserError("standard input is no text in UTF-8; write it in UTF-8") from None


def _read_out(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a script, shown as if they were typed."""
    for line in lines:
        print(f"{PROMPT}{line}")
        yield line


def _typed() -> Iterator[str]:
    """Lines from the terminal, until its input ends."""
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("that line is no text in UTF-8")
            continue
        if line.startswith("/") and line not in COMMANDS:
            print(f"{line} is no command; /help lists them")
        elif line:
            yield line


# the conversation -----------------------------------------------------------------------------------------------------


def _talk(
    plan: "Plan", conversation: "Callable[[Any], Conversation]", script: list[str] | None, keep: "Keeper"
) -> "Prefix | None":
    """Answer every line, and return the prefix; the model itself is let go, so that another one has room.

    script: None for what is typed. A typed line that cannot be answered is told; in a script it is a UserError.
    """
    from eval.chat import weight_bytes

    talk = conversation(plan.load())
    keep.weight_bytes = weight_bytes(talk.model.model)
    told = False
    for line in _typed() if script is None else _read_out(script):
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
        elif line in COMMANDS:
            print(_stats(talk, keep) if line == "/stats" else _help())
        else:
            again = bool(talk.turns)
            try:
                said = _answered(talk, line)
            except UserError as error:
                if script is not None:
                    raise
                print(error)
                continue
            if again and not told and said["fed"] + talk.model.prefix_length == said["prompt"]:
                told = True
                log.warning("the chat template writes the past in other tokens than the model saw, so the dialogue is "
                         "fed again where that happens")  # fmt: skip
            keep.add(said)
    if talk.model.kv is not None and keep.answers and not any(said["quantized"] for said in keep.answers):
        log.warning("none of the cache was rounded: the KV policy keeps more of the newest tokens exact than were said")
    return talk.model.prefix


def _answered(talk: "Conversation", line: str) -> "Said":
    """One answer, printed as it is made."""
    with _ending() as ended:
        said = talk.answer(line, lambda text: print(text, end="", flush=True), ended)
    print(flush=True)
    return said


@contextmanager
def _ending() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only says that the answer shall end; the next one does what it did before."""
    import signal
    import threading

    pressed, before = False, signal.getsignal(signal.SIGINT)

    def first(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed and callable(before):
            before(number, frame)
        pressed = True

    changed = callable(before) and threading.current_thread() is threading.main_thread()
    if changed:
        signal.signal(signal.SIGINT, first)
    try:
        yield lambda: pressed
    finally:
        if changed:
            signal.signal(signal.SIGINT, before)


def _help() -> str:
    return "\n".join(f"{command:8}{told}" for command, told in COMMANDS.items()) + "\nCtrl-C ends the answer"


def _stats(talk: "Conversation", keep: "Keeper") -> str:
    """What `/stats` prints."""
    from eval.chat import cache_state

    cache = talk.cache
    told = [f"weights  {keep.weight_bytes / 1e6:,.1f} MB"]
    if cache is None:
        told.append("cache    empty")
    else:
        front = talk.model.prefix_length
        held, rounded = cache_state(cache)
        share = f"{rounded:.1%} of the elements rounded" if talk.model.kv is not None else "full precision"
        size = f"{held / 1e6:,.3f} MB"
        told.append(f"cache    {size}: {cache.get_seq_length() - front} tokens, {share}, behind {front} of the prefix")
    for name, answers in (("last", keep.answers[-1:]), ("all", keep.answers)):
        if answers:
            tokens, fed = sum(len(said["ids"]) for said in answers), sum(said["fed"] for said in answers)
            seconds, first = (sum(said[what] for said in answers) for what in ("seconds", "seconds_to_first"))
            speed = f"{tokens / seconds:.1f} tokens per second"
            told.append(f"{name:8} {tokens} tokens in {seconds:.2f} s, {speed}; {fed} tokens read in {first:.2f} s")
    return "\n".join(told)


def _record(
    plan: "Plan",
    conversation: "Callable[[Any], Conversation]",
    script: list[str],
    settings: dict[str, Any],
    force: bool,
) -> None:
    """Print the record of a script, which is answered now unless there is one."""
    import json
    from contextlib import redirect_stdout

    from corpora.machine import peak_memory_mb
    from eval.runs import record_of

    def figures() -> dict[str, Any]:
        keep = Keeper(None, settings)
        with redirect_stdout(sys.stderr):
            _talk(plan, conversation, script, keep)
        return {
            "answers": keep.answers,
            "weight_bytes": keep.weight_bytes,
            "seconds": round(sum(said["seconds"] for said in keep.answers), 3),
            "peak_memory_mb": round(peak_memory_mb(plan.device.type), 1),
            **plan.outcome(),
        }

    name = f"{settings['model']}-{settings['weights']}"
    print(json.dumps(record_of("chat", name, settings, figures, force=force), indent=2))


def _compare(
    plan: "Plan", prefix: "Prefix | None", conversation: "Callable[[Any], Conversation]", keep: "Keeper"
) -> None:
    """Let the full-precision twin answer, and print a table. A trained prefix is not its own: it reads the tokens."""
    from eval.chat import divergences
    from eval.tables.render import Table, render
    from intactkv.attach import attach

    own = prefix if prefix is not None and prefix.calibrated is None else None
    rows = []
    for said, reference in zip(keep.answers, divergences(conversation(attach(plan.twin(), own)), keep.answers),
                               strict=True):  # fmt: skip
        said["reference"] = reference
        first = reference["first_divergence"]
        rows.append((values.shown(said["user"]), str(len(said["ids"])), str(len(reference["ids"])),
                     "none" if first is None else str(first)))  # fmt: skip
    keep.write()
    head = ("line", "tokens", "of full precision", "first other token")
    print("\n" + render([Table("Beside full precision, behind the same past", head, tuple(rows))], "markdown"), end="")
