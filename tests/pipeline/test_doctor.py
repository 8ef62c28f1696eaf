"""The examination: true on this machine, and a way out for whatever is wrong with it."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from pipeline import doctor
from pipeline.doctor import Finding, examine
from tests.pipeline.paging.engines import needs_aio


def examined(spool: Path, device: torch.device | None = None) -> dict[str, Finding]:
    """The findings by name, measured with little work."""
    findings = examine(spool, disk_bytes=100_000, matmul_size=16, device=device)
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def test_a_sound_machine_has_nothing_wrong_with_it(tmp_path: Path) -> None:
    findings = examined(tmp_path, torch.device("cpu"))
    assert [finding for finding in findings.values() if finding.ok is False] == []
    assert findings["torch"].value == torch.__version__
    assert findings["python"].value == sys.version.split()[0]
    assert {"transformers", "datasets", "safetensors", "gguf", "cores", "host memory"} < findings.keys()
    assert any(name.startswith("device") for name in findings)


def test_disk_and_arithmetic_are_measured_in_their_units(tmp_path: Path) -> None:
    findings = examined(tmp_path, torch.device("cpu"))
    for name in ("spool write, threads", "spool read, threads"):
        rate, unit = findings[name].value.split()
        assert float(rate) > 0
        assert unit == "MB/s"
    for dtype in ("float32", "bfloat16"):
        rate, unit = findings[f"matmul {dtype} on cpu"].value.split()
        assert float(rate) > 0
        assert unit == "TFLOP/s"


def test_the_spool_is_left_as_it_was(tmp_path: Path) -> None:
    examined(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    findings = examined(tmp_path / "not" / "yet")
    assert findings["spool"].ok
    assert findings["spool"].value.startswith(f"{tmp_path}/not/yet, ")
    assert "spool read, threads" in findings
    assert not (tmp_path / "not").exists()


def test_a_relative_spool_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert examined(Path("not/yet"))["spool"].ok


def test_a_spool_that_cannot_be_written_is_a_finding_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = examined(tmp_path / "file" / "spool", torch.device("cpu"))
    assert findings["spool"].ok is False
    assert "Not a directory" in findings["spool"].value
    assert findings["spool"].advice.startswith("set memory.spool to a directory this user can write")
    assert not any(name.startswith("spool write") for name in findings)
    assert "matmul float32 on cpu" in findings


def test_a_full_disk_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    spool = examined(tmp_path)["spool"]
    assert spool.ok is False
    assert "No space left on device" in spool.value
    assert list(tmp_path.iterdir()) == []


@needs_aio
def test_aio_that_is_built_is_used_and_measured_beside_the_threads(tmp_path: Path) -> None:
    findings = examined(tmp_path)
    assert (findings["deepspeed aio"].value, findings["deepspeed aio"].ok) == ("built", True)
    assert findings["spool engine"].value == "aio"
    for name in ("spool write, aio", "spool read, aio", "spool write, threads", "spool read, threads"):
        assert findings[name].value.endswith(" MB/s")


def test_aio_that_is_not_built_says_how_and_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("doctor", "paging.engines"):
        monkeypatch.setattr(f"pipeline.{module}.is_installed", lambda: True)
        monkeypatch.setattr(f"pipeline.{module}.is_built", lambda: False)
    findings = examined(tmp_path)
    assert (findings["deepspeed aio"].value, findings["deepspeed aio"].ok) == ("not built", None)
    assert "secateur doctor --build" in findings["deepspeed aio"].advice
    assert "libaio-dev" in findings["deepspeed aio"].advice
    assert findings["spool engine"].value == "threads"
    assert "spool write, aio" not in findings


def test_without_deepspeed_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("doctor", "paging.engines"):
        monkeypatch.setattr(f"pipeline.{module}.is_installed", lambda: False)
    findings = examined(tmp_path)
    assert (findings["deepspeed aio"].value, findings["deepspeed aio"].ok) == ("not installed", None)
    assert "pip install 'secateur[paging]'" in findings["deepspeed aio"].advice
    assert findings["spool engine"].value == "threads"


def test_aio_that_is_built_and_does_not_work_here_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_installed", "is_built"):
        monkeypatch.setattr(doctor, name, lambda: True)
    monkeypatch.setattr(doctor, "why_not_aio", lambda directory: "the system refuses to lock 8 bytes")
    findings = examined(tmp_path)
    assert (findings["deepspeed aio"].value, findings["deepspeed aio"].ok) == ("built, unusable here", False)
    assert "refuses to lock" in findings["deepspeed aio"].advice
    assert findings["spool engine"].value == "threads"


def test_a_slow_disk_is_told_apart_from_a_fast_one() -> None:
    assert doctor._bandwidth("spool read", 90e6).value == "90 MB/s"
    assert "local solid-state disk" in doctor._bandwidth("spool read", 90e6).advice
    assert doctor._bandwidth("spool read", 3e9).advice == ""


def test_a_missing_library_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    missing = examined(tmp_path)["no-such-library"]
    assert (missing.value, missing.ok, missing.advice) == ("missing", False, "pip install no-such-library")


def test_a_missing_gguf_is_no_fault_but_names_what_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    missing = examined(tmp_path)["gguf"]
    assert (missing.value, missing.ok) == ("missing", None)
    assert "only demo-model needs it: pip install 'secateur[demo]'" in missing.advice


def test_an_old_python_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    python = examined(tmp_path)["python"]
    assert python.ok is False
    assert python.advice == "install Python 99.0 or newer"


def test_a_device_that_cannot_multiply_is_a_finding(tmp_path: Path) -> None:
    finding = examined(tmp_path, torch.device("meta"))["matmul float32 on meta"]
    assert finding.ok is False
    assert finding.value.startswith("fails: ")
    assert finding.advice == "set compute.dtype to another type"


def test_more_threads_than_cores_are_advised_against(tmp_path: Path) -> None:
    num_threads, too_many = torch.get_num_threads(), (os.cpu_count() or 1) + 1
    torch.set_num_threads(too_many)
    try:
        cores = examined(tmp_path, torch.device("meta"))["cores"]
    finally:
        torch.set_num_threads(num_threads)
    assert cores.value.endswith(f"torch uses {too_many} threads")
    assert cores.advice.startswith("set OMP_NUM_THREADS=")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_is_named_with_its_memory_and_measured(tmp_path: Path) -> None:
    findings = examined(tmp_path)
    assert "GiB free of" in findings["device cuda:0"].value
    assert findings["matmul bfloat16 on cuda"].value.endswith("TFLOP/s")
    assert findings["copy to device"].value.endswith("GB/s")
