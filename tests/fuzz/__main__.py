"""python -m tests.fuzz: a longer seeded run, or one case by the name that a run printed."""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Run, print a table on stdout and, with --out, every failing case in a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of damages (default: 0)")
    parser.add_argument(
        "--calls", type=int, default=50, help="of every kind of file, ten times as many of options (default: 50)"
    )
    parser.add_argument("--kind", action="append", help="only this one; may be given several times")
    parser.add_argument("--case", help="one case, by the name that a run printed")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --case: leave the damaged world there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the failing cases to this file")
    parser.add_argument("--list", action="store_true", help="print the kinds and stop")
    options = parser.parse_args()

    import torch
    from tqdm import tqdm

    from fuzz.campaign import run_case, run_kind, table
    from fuzz.engine import Call, Case, scratch
    from fuzz.kinds import KINDS
    from fuzz.options import run_option, run_options

    torch.set_num_threads(1)
    if options.list:
        print("\n".join(f"{kind.name:20} {', '.join(kind.files)}" for kind in KINDS.values()))
        return
    known = [*KINDS, "options"]
    unknown = [name for name in options.kind or () if name not in known]
    if unknown:
        parser.error(f"unknown kind {unknown[0]}; known are {', '.join(known)}")
    with scratch() as place:
        if options.case:
            is_option = options.case.startswith("option:")
            case = None if is_option else Case.named(options.case)
            done = run_option(place, options.case) if case is None else run_case(place, case, keep=options.keep)
            print(f"{done.name}\n{done.done}\n{done.fault or 'all is well'}: {done.told}\n{done.outcome.code}")
            print(done.outcome.out[-2000:], done.outcome.err[-3000:], sep="\n")
            return
        names = options.kind or known
        calls: dict[str, list[Call]] = {}
        broken: list[str] = []
        started = time.monotonic()
        with tqdm(total=options.calls * (len(names) + 9 * ("options" in names)), unit="call", mininterval=1) as bar:
            for name in names:
                calls[name] = []
                many = run_kind(place, KINDS[name], options.seed, options.calls) if name in KINDS else None
                try:
                    for one in many or run_options(place, options.seed, 10 * options.calls):
                        calls[name].append(one)
                        bar.update()
                        bar.set_postfix_str(name)
                except RuntimeError as error:  # a world that cannot be built, an intact control that fails
                    broken.append(f"{name}: {error}")
                if options.out:
                    options.out.write_text(failures(calls))
        print(table(calls))
        if not options.out:
            print(failures(calls))
        print("".join(f"NO CONTROL {line}\n" for line in broken), end="")
        print(f"{sum(map(len, calls.values()))} calls in {time.monotonic() - started:.0f} s, seed {options.seed}")


def failures(calls):  # type: ignore[no-untyped-def]
    """The failing cases by kind, fault and place."""
    lines = []
    for kind, done in calls.items():
        groups: dict[tuple[str, str], list] = {}
        for one in done:
            if one.fault:
                place = one.outcome.frame.split(": ")[0] if one.fault == "traceback" else ""
                groups.setdefault((one.fault, place), []).append(one)
        if groups:
            lines.append(f"\n===== {kind}: {sum(map(len, groups.values()))} of {len(done)} calls fail")
        for (fault, place), ones in sorted(groups.items(), key=lambda item: (item[0][0] != "traceback", -len(item[1]))):
            lines.append(f"--- {fault} × {len(ones)}  {place}")
            lines += [f"    {one.name}   {one.done!a}\n        {one.told}" for one in ones]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
