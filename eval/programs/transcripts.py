"""What was said in a conversation as a file: the transcript that `eval chat --out` writes, answer by answer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from eval.record_forms import Said

__all__ = ["Keeper", "refuse_other"]


class Keeper:
    """What was said so far, in a file if one was named: every answer is on the disk before the next line is read."""

    def __init__(self, out: "Path | None", settings: dict[str, Any]) -> None:
        from datetime import UTC, datetime

        self.out, self.settings = out, settings
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.weight_bytes = 0
        self.answers: list[Said] = []

    def add(self, said: "Said") -> None:
        """Take in an answer."""
        self.answers.append(said)
        self.write()

    def write(self) -> None:
        """Write all answers."""
        from corpora.json_files import with_sum, write_json
        from corpora.machine import environment

        if self.out is not None:
            told = {
                "format": 1,
                "settings": self.settings,
                "weight_bytes": self.weight_bytes,
                "answers": self.answers,
                "started": self.started,
                "environment": environment(),
            }
            write_json(self.out, with_sum(told))


def refuse_other(out: "Path") -> None:
    """Raise UserError if something else than a transcript is where one is written."""
    from corpora.json_files import read_json, without_sum
    from eval.chat import Transcript

    if out.exists():
        what, mend = "the transcript", "name another file with --out FILE.json, or move this one away"
        without_sum(read_json(out, what, Transcript, mend=mend), f"{what} {out}", mend=mend)
