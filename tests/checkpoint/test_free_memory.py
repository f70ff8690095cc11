"""Free memory is what the tightest limit of a process leaves."""

import resource
from pathlib import Path

import pytest
import torch

from moeq.checkpoint import free_memory
from moeq.checkpoint.free_memory import free_bytes

CPU = torch.device("cpu")


def group(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 2\n")


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "self").write_text("0::/jobs/one\n")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path / "self")
    return tmp_path


def test_without_limits_it_is_what_the_system_has(cgroup: Path) -> None:
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    assert free_bytes(CPU) == pytest.approx(int(available.split()[1]) * 1024, rel=0.2)
    group(cgroup / "jobs/one", "max", 10**9)
    assert free_bytes(CPU) > 10**8


def test_the_tightest_group_counts_without_its_file_caches(cgroup: Path) -> None:
    group(cgroup / "jobs/one", str(10**7), 4 * 10**6, 10**6)
    assert free_bytes(CPU) == 7 * 10**6 + 2
    group(cgroup / "jobs", str(10**7), 9 * 10**6)
    assert free_bytes(CPU) == 10**6 + 2
    group(cgroup, str(10**6), 10**7)
    assert free_bytes(CPU) == 0


def test_a_limit_of_addresses_counts(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 10**7, used + 10**7))
    assert 0 <= free_bytes(CPU) <= 10**7
