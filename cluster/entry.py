"""What a submitted job runs on the cluster: it looks whether everything needed is there, and becomes `secateur run`.

    python -m cluster.entry run JOB     prune, in a working directory that holds the job's settings
    python -m cluster.entry end JOB     end that job's process, which is on this machine, at once

Nothing heavy is imported before the look, so that what is missing is said in words.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

from cluster.package import DISTRIBUTION, PINS, SETTINGS, departures, requirements, unmet

PATIENCE = 10.0
"""Seconds for a process that was told to end at once."""

WAY_OUT = "install it in the cluster's Python, or submit with --install; --python names another interpreter there"


def main() -> None:
    """Do what the arguments say; ends with the exit status of `secateur run`."""
    task, job = sys.argv[1:]
    if task == "end":
        end(job)
        return
    problems = unmet(requirements(distribution(DISTRIBUTION)))
    if problems:
        sys.exit("\n".join(["error: this machine of the cluster lacks what the job needs", *problems, WAY_OUT]))
    if different := departures(Path(PINS).read_text(encoding="utf-8").split()):
        sys.stderr.write(f"versions here differ from those where it was submitted: {', '.join(different)}\n")
    from cluster import cli

    sys.argv = ["secateur", "run", SETTINGS]
    cli.main()


def end(job: str) -> None:
    """End the process of a job: it is signalled as by a second Ctrl-C, and killed where that does not help.

    Ends this process with status 1 where there is none.
    """
    import psutil

    marks = ["-m", "cluster.entry", "run", job]
    found = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-len(marks) :] == marks]
    if not found:
        sys.exit(f"no process of {job} runs on this machine")
    for process in found:
        process.terminate()
    for process in psutil.wait_procs(found, timeout=PATIENCE)[1]:
        process.kill()


if __name__ == "__main__":
    main()
