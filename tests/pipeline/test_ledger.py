"""The ledger keeps what was committed through every crash, and refuses what is not its own."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigChanged, RunDirectoryError, RunLocked, StorageError
from pipeline.ledger import Ledger, RunLock
from pipeline.records import Commit, Header, LinearRecord

HEADER = Header(
    config={"prune": {"sparsity": 0.5, "recipe": ["besa"]}, "output": "runs/x"},
    source="source-1", calibration="tokens-1", versions={"torch": "2.13"},
)  # fmt: skip


def make_commit(block: int, **changes: Any) -> Commit:
    linear = LinearRecord(pruned=5, zeros=6, numel=10, rewritten=True, notes={"damping": 0.01}, sparsity="0.5")
    commit = Commit(
        block=block, file=f"block-{block}.safetensors", sha256=hashlib.sha256(bytes([block])).hexdigest(),
        num_bytes=1000 + block, linears={"self_attn.q_proj": linear}, error=0.1 / 3, seconds={"prune": 1.5},
    )  # fmt: skip
    return replace(commit, **changes)


def begin(run_directory: Path, blocks: range = range(0)) -> Ledger:
    ledger = Ledger.open(run_directory, HEADER)
    for block in blocks:
        ledger.commit(make_commit(block))
    return ledger


def lines_of(run_directory: Path) -> list[bytes]:
    return (run_directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def write_lines(run_directory: Path, lines: list[bytes]) -> None:
    (run_directory / "ledger.jsonl").write_bytes(b"".join(lines))


def sealed(**fields: Any) -> bytes:
    """A line as the format has it, made without the ledger's help."""
    fields.pop("checksum", None)
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    fields["checksum"] = hashlib.sha256(body.encode()).hexdigest()[:16]
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `num_bytes`: a disk that is full in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(code: int, *arguments: object) -> NoReturn:
    raise OSError(code, os.strerror(code))


def test_what_was_recorded_is_there_after_a_reopening(tmp_path: Path) -> None:
    ledger, windows = begin(tmp_path, range(2)), [24]
    ledger.record("perplexity", 27.43)
    ledger.record("perplexity", {"before": 27.43, "windows": windows})
    windows.append(25)  # too late to be recorded
    for again in (ledger, Ledger.open(tmp_path, HEADER), Ledger.read(tmp_path)):
        assert again.header == HEADER
        assert again.commits == {0: make_commit(0), 1: make_commit(1)}
        assert again.notes == {"perplexity": {"before": 27.43, "windows": [24]}}


def test_each_line_is_an_object_with_a_kind_and_a_checksum_of_the_rest(tmp_path: Path) -> None:
    begin(tmp_path, range(1)).record("finished", True)
    assert [json.loads(line)["kind"] for line in lines_of(tmp_path)] == ["header", "commit", "note"]
    assert lines_of(tmp_path)[2] == sealed(kind="note", name="finished", value=True)


def test_the_remaining_blocks_follow_the_committed_ones(tmp_path: Path) -> None:
    assert begin(tmp_path).remaining(3) == range(3)
    assert begin(tmp_path, range(2)).remaining(3) == range(2, 3)
    assert begin(tmp_path).remaining(2) == range(0)


@pytest.mark.parametrize("blocks", [range(0, 3, 2), range(1, 2), range(4)])
def test_commits_that_are_not_the_first_blocks_are_damage(tmp_path: Path, blocks: range) -> None:
    with pytest.raises(RunDirectoryError, match=r"damaged: it commits .* of 3, not .*new output directory"):
        begin(tmp_path, blocks).remaining(3)


def test_what_must_not_be_written_is_not(tmp_path: Path) -> None:
    ledger = begin(tmp_path, range(1))
    with pytest.raises(AssertionError, match="block 0 is committed already"):
        ledger.commit(make_commit(0))
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.commit(make_commit(1, error=float("nan")))
    with pytest.raises(AssertionError, match="opened only to be read"):
        Ledger.read(tmp_path).record("finished", True)
    for changes in ({"pruned": 7}, {"zeros": 11}, {"pruned": -1}):
        with pytest.raises(AssertionError, match="impossible counts"):
            replace(make_commit(1).linears["self_attn.q_proj"], **changes)
    assert list(ledger.commits) == [0]
    assert len(lines_of(tmp_path)) == 2


@pytest.mark.parametrize("file", ["/etc/passwd", "../model.safetensors", "a/../../b", ""])
def test_a_commit_names_no_file_outside_its_directory(tmp_path: Path, file: str) -> None:
    with pytest.raises(AssertionError, match="no path inside a directory"):
        make_commit(0, file=file)
    begin(tmp_path, range(1))
    header, commit = lines_of(tmp_path)
    write_lines(tmp_path, [header, sealed(**{**json.loads(commit), "file": file})])
    with pytest.raises(RunDirectoryError, match=r"(?s)line 2: .*no path inside a directory"):
        Ledger.read(tmp_path)


def test_cut_at_any_byte_the_ledger_opens_with_the_commits_before_the_cut(tmp_path: Path) -> None:
    begin(tmp_path, range(2)).record("finished", True)
    path, lines = tmp_path / "ledger.jsonl", lines_of(tmp_path)
    content, ends = b"".join(lines), [sum(map(len, lines[:count])) for count in range(1, 5)]
    for cut in range(ends[0], len(content) + 1):
        path.write_bytes(content[:cut])
        assert list(Ledger.read(tmp_path).commits) == list(range(sum(end <= cut for end in ends[1:3])))
        assert path.stat().st_size == cut, "reading changed the file"
        assert Ledger.open(tmp_path, HEADER).notes == ({"finished": True} if cut == len(content) else {})
        assert path.stat().st_size == max(end for end in ends if end <= cut)


@settings(max_examples=30, deadline=None)
@given(num_done=st.integers(0, 4), cut=st.integers(0, 500), tail=st.sampled_from([b"", bytes(64), b"{\r\n"]))
def test_after_any_crash_the_run_goes_on_to_the_same_bytes(num_done: int, cut: int, tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        begin(Path(name), range(4))
        lines = [*lines_of(Path(name)), b""]
        torn = lines[1 + num_done][:cut].removesuffix(b"\n") + tail  # some file systems leave zeros
        write_lines(Path(name), [*lines[: 1 + num_done], torn])
        left = Ledger.open(Path(name), HEADER).remaining(4)
        assert left == range(num_done, 4)
        begin(Path(name), left)
        assert lines_of(Path(name)) == lines[:-1]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("intact", "damaged"), [(b":", b";"), (b'"kind"', b'\n"kind"'), (b"{", b"[{")])
def test_damage_before_the_end_is_refused(tmp_path: Path, number: int, intact: bytes, damaged: bytes) -> None:
    begin(tmp_path, range(3))
    lines = lines_of(tmp_path)
    lines[number - 1] = lines[number - 1].replace(intact, damaged, 1)
    write_lines(tmp_path, lines)
    for reopen in (Ledger.read, lambda directory: Ledger.open(directory, HEADER)):
        with pytest.raises(RunDirectoryError, match=rf"line {number}: damaged, .*in a new output directory"):
            reopen(tmp_path)
    assert b"".join(lines_of(tmp_path)) == b"".join(lines)


SENSELESS = {
    (): "damaged, cut short",
    (4,): "damaged, cut short",
    (5,): "damaged, cut short",
    (1,): "a line of the kind 'commit' is .*out of place",
    (0, 0): "a line of the kind 'header' is .*out of place",
    (0, 2): "a line of the kind 'outer' is unknown",
    (0, 3): "6 validation errors for Commit",
    (0, 1, 1): "damaged, it commits block 0 a second time",
}


@pytest.mark.parametrize("order", SENSELESS)
def test_lines_that_make_no_sense_are_refused(tmp_path: Path, order: tuple[int, ...]) -> None:
    begin(tmp_path, range(1))
    lines = [*lines_of(tmp_path), sealed(kind="outer"), sealed(kind="commit", error=0), b'{"kind":', b"[1]\n"]
    write_lines(tmp_path, [lines[number] for number in order])
    message = f"(?s)line {max(1, len(order))}: {SENSELESS[order]}.*a newer version of secateur.*start again"
    with pytest.raises(RunDirectoryError, match=message):
        Ledger.read(tmp_path)


def test_every_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path)
    config = {"prune": {"sparsity": 0.6, "recipe": ["besa"]}, "memory": {"host": "1GiB"}}
    with pytest.raises(ConfigChanged) as raised:
        Ledger.open(tmp_path, replace(HEADER, config=config, source="source-2", calibration="tokens-2"))
    assert str(raised.value).splitlines() == [
        f"{tmp_path} belongs to a run with other settings:",
        '  memory: "(absent)" in the ledger, {"host":"1GiB"} asked for',
        '  output: "runs/x" in the ledger, "(absent)" asked for',
        "  prune.sparsity: 0.5 in the ledger, 0.6 asked for",
        '  the source checkpoint changed: "source-1" in the ledger, "source-2" asked for',
        '  the calibration tokens changed: "tokens-1" in the ledger, "tokens-2" asked for',
        "use another output directory, or restore the setting",
    ]


def test_versions_and_the_order_of_keys_may_change(tmp_path: Path) -> None:
    begin(tmp_path)
    asked = replace(HEADER, versions={}, config=dict(reversed(HEADER.config.items())))
    assert asked.digest == HEADER.digest != replace(HEADER, source="source-2").digest
    assert Ledger.open(tmp_path, asked).header == HEADER


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model" / "weights").mkdir(parents=True)
    (tmp_path / "spool").touch()
    message = r"existing output directory of another job: .*model, spool \(2 in all\); name a new or empty"
    with pytest.raises(RunDirectoryError, match=message):
        Ledger.open(tmp_path, HEADER)
    with pytest.raises(RunDirectoryError, match=r"no ledger\.jsonl, .* name the `output` directory"):
        Ledger.read(tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_what_a_run_leaves_before_its_header_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("model", "spool", "report"):
        (tmp_path / name).mkdir()
    for name in ("lock", ".ledger.jsonl.0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    assert begin(tmp_path, range(1)).remaining(2) == range(1, 2)


@pytest.mark.parametrize("num_bytes_left", [0, 1, 100])
def test_a_line_torn_by_a_full_disk_is_written_again_later(tmp_path: Path, num_bytes_left: int) -> None:
    ledger = begin(tmp_path, range(1))
    size = (tmp_path / "ledger.jsonl").stat().st_size
    with room_for(size + num_bytes_left), pytest.raises(StorageError, match=r"append .*: File too large;"):
        ledger.commit(make_commit(1))
    assert (tmp_path / "ledger.jsonl").stat().st_size == size + num_bytes_left
    assert list(ledger.commits) == list(Ledger.read(tmp_path).commits) == [0]
    ledger.record("short", 1)
    assert lines_of(tmp_path)[2:] == [sealed(kind="note", name="short", value=1)], "the torn line shows behind it"
    ledger.commit(make_commit(1))
    assert Ledger.open(tmp_path, HEADER).commits == {0: make_commit(0), 1: make_commit(1)}


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_what_the_disk_refuses_is_not_committed(tmp_path: Path, call: str, code: int) -> None:
    ledger = begin(tmp_path)
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(os, call, partial(refuse, code))
        with pytest.raises(StorageError, match=f"append to .*: {os.strerror(code)}; make room or put"):
            ledger.commit(make_commit(0))
    assert ledger.commits == {}
    ledger.commit(make_commit(0))
    assert Ledger.open(tmp_path, HEADER).commits == {0: make_commit(0)}


def test_a_lock_has_one_holder_at_a_time_and_names_it(tmp_path: Path) -> None:
    holder = f"in use by process {os.getpid()} on host {os.uname().nodename}, started 2.*: wait for it, stop"
    for _ in range(2):
        with RunLock(tmp_path / "run"), pytest.raises(RunLocked, match=holder):
            RunLock(tmp_path / "run").__enter__()
    assert (tmp_path / "run" / "lock").read_text().count("process") == 1


@pytest.mark.parametrize("fork", ["", "os.fork() or sys.exit(sys.stdin.read())\n"], ids=["held", "released"])
def test_a_lock_outlives_neither_its_process_nor_its_block(tmp_path: Path, fork: str) -> None:
    code = "import os, pathlib, sys; from pipeline.ledger import RunLock\nwith RunLock(pathlib.Path(sys.argv[1])): "
    code += f"{fork}print('ready', flush=True); sys.stdin.read()"  # a forked child lives on, with the file open
    command, root = [sys.executable, "-c", code, str(tmp_path)], Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        process.wait()
        with RunLock(tmp_path):
            pass


def test_what_the_file_system_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = begin(tmp_path / "gone")
    (tmp_path / "gone" / "ledger.jsonl").unlink()
    with pytest.raises(StorageError, match=r"cannot append to .*: No such file"):
        ledger.record("finished", False)
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match=r"cannot set up the run directory .*run: File exists"):
        Ledger.open(tmp_path / "run", HEADER)
    monkeypatch.setattr(fcntl, "flock", partial(refuse, errno.ENOLCK))
    with pytest.raises(StorageError, match=r"cannot lock .*: No locks available"):
        RunLock(tmp_path).__enter__()
