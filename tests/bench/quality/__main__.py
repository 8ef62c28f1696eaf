"""The quality bench: perplexity, time and memory of every recipe and sparsity on one model, over calibration seeds.

    python -m tests.bench.quality MODEL --out DIR --data DATA           runs what is missing, the most telling first
    python -m tests.bench.quality MODEL --out DIR --table [README.md]   runs nothing; shows, or rewrites the README

What is run is in `quality.yaml` (or `--bench smaller.yaml`: models that are really smaller, with their size and speed);
DATA holds its texts. Every run is a process of its own and, once done, a line of DIR/results.jsonl: a bench that was
stopped goes on where it was. What was made with other code, settings, tokens, versions or another number of threads is
made again. DIR also gets the tables and the picture.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import SecateurError
from pipeline.ledger import RunLock
from tests.bench.quality.plan import BENCH, Run, load_bench
from tests.bench.quality.results import Results
from tests.bench.quality.runs import Workshop, fingerprint, open_workshop
from tests.bench.quality.smaller import smaller_section
from tests.bench.quality.tables import Board, board_of, marks_of, rewrite, section


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the dense model's directory")
    parser.add_argument("--bench", default=BENCH.name, metavar="FILE", help=f"a bench beside this file ({BENCH.name})")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, and room for one pruned model")
    parser.add_argument("--data", type=Path, default=Path("data"), help="directory of the bench's texts (data)")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs with this in their name, as --list gives it")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="begin no run that ends later")
    parser.add_argument("--any-code", action="store_true", help="keep results of other versions of the code")
    parser.add_argument("--list", action="store_true", help="say what is missing, and how long it may take")
    parser.add_argument("--table", nargs="?", const=Path("-"), type=Path, metavar="README")
    return parser.parse_args()


def main() -> int:
    """Do what is asked for; return the exit status: 1 where runs have failed."""
    asked = parsed()
    bench = load_bench(BENCH.with_name(Path(asked.bench).name))
    num_failed = 0
    with RunLock(asked.out):
        results = Results(asked.out / "results.jsonl")
        if asked.table is None:
            workshop = open_workshop(bench, asked.model, asked.data, asked.out / "scratch")
            code = None if asked.any_code else workshop.code
            wanted = (None, *bench.runs(asked.only, asked.seeds))
            missing = [run for run in wanted if results.find(run, workshop.facts(run), code) is None]
            if asked.list:
                return tell(missing, results)
            num_failed = work_through(missing, workshop, results, asked.minutes)
        show(board_of(bench, results.all, fingerprint(asked.model)), asked.out, asked.table)
    return int(num_failed > 0)


def tell(missing: Sequence[Run | None], results: Results) -> int:
    """List the runs that are missing, and say how long all of them may take."""
    for run in missing:
        seconds = results.expected(run)
        say(name_of(run) + ("" if seconds is None else f", {seconds:.0f} s"))
    say(f"{len(missing)} runs{time_left(missing, results)}")
    return 0


def work_through(missing: Sequence[Run | None], workshop: Workshop, results: Results, minutes: float) -> int:
    """Make runs in order, but for those likely to end after so many minutes; return how many failed."""
    began, num_failed = time.monotonic(), 0
    for position, run in enumerate(missing):
        if time.monotonic() - began + (results.expected(run) or 0) > minutes * 60:
            say(f"{name_of(run)}: left out, for it would end after {minutes:g} minutes")
            continue
        try:
            result = workshop.carry_out(run)
        except (RuntimeError, SecateurError) as error:
            num_failed += 1
            say(f"{name_of(run)} failed: {str(error).strip()}")
            continue
        results.add(result)
        found = ", ".join(f"{value:.2f} on {text}" for text, value in result.figures.perplexity.items())
        left = time_left(missing[position + 1 :], results)
        say(
            f"{position + 1} of {len(missing)}: {name_of(run)}: {found}; pruned in {result.figures.seconds:.0f} s{left}"
        )
    return num_failed


def time_left(missing: Sequence[Run | None], results: Results) -> str:
    """Say how long runs may take, as far as runs like them have been made."""
    known = [seconds for run in missing if (seconds := results.expected(run)) is not None]
    return f"; about {sum(known) / 60:.0f} min for {len(known)} runs" if known else ""


def show(board: Board, out: Path, readme: Path | None) -> None:
    """Write tables and picture into `out`, and into the README where one is given; else print the tables."""
    if not board.results:
        say("no results yet")
        return
    name = board.bench.name
    content = smaller_section(board) if board.is_weighed else section(board)
    (out / f"{name}.md").write_text(content + "\n", encoding="utf-8")
    picture = None if board.is_weighed else drawn(board, out / f"{name}.svg")
    if readme is None or str(readme) == "-":
        sys.stdout.write(content + "\n")
        return
    if picture is not None:
        shutil.copyfile(picture, BENCH.with_suffix(".svg"))
        shown = BENCH.with_suffix(".svg").relative_to(readme.absolute().parent)
        content += f"\n\n![Perplexity over sparsity, of N:M patterns, and over seconds of pruning]({shown})"
    rewrite(readme, marks_of(board.bench), content)


def drawn(board: Board, path: Path) -> Path | None:
    """Draw the picture; return its path, or None where there is nothing to draw it with."""
    if find_spec("matplotlib") is None:
        say("no picture, for want of matplotlib: pip install 'secateur[bench]'")
        return None
    from tests.bench.quality.plot import draw

    draw(board, path)
    return path


def name_of(run: Run | None) -> str:
    """Return a run's name; the dense model's is `dense`."""
    return "dense" if run is None else str(run)


def say(text: str) -> None:
    """Tell whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
