"""A result names a command that runs from the root of any clone, and the machine that it really came from."""

import re

import pytest
import torch

from benchmarks.lab import provenance


def test_a_command_has_the_module_and_paths_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    inside, outside = str(provenance.ROOT / "benchmarks/results/solve.json"), "/elsewhere/solve.json"
    line = provenance.command("benchmarks.lab.provenance", ["--json", inside, "--arms", "kappa 0", "--folder", outside])
    assert line == (
        "OMP_NUM_THREADS=1 python -m benchmarks.lab.provenance --json benchmarks/results/solve.json --arms 'kappa 0' "
        "--folder /elsewhere/solve.json"
    )


def test_the_device_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert provenance.provenance().device == "CPU"
    assert provenance.provenance(torch.device("cuda", 1)).device == "Card 1 (cuda)"
    assert " on Card 1 (cuda), " in str(provenance.provenance("cuda:1"))


def test_the_processor_is_told_with_what_it_can_and_what_it_was_kept_from(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"model name": "Some Processor", "flags": "fpu avx2 avx512f amx_tile"}
    monkeypatch.setattr(provenance, "_cpuinfo", lines.__getitem__)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found = provenance.provenance()
    assert "Some Processor" in found.processor
    assert found.capabilities == "avx2 avx512 amx ONEDNN_MAX_CPU_ISA=AVX2"
    assert found.threads == torch.get_num_threads()


def test_a_commit_is_a_hash_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", provenance.commit())
    answers = {"rev-parse": "1a2b3c4", "status": " M main.py"}
    monkeypatch.setattr(provenance, "_git", lambda *args: answers[args[0]])
    assert provenance.commit() == "1a2b3c4+"
    answers["status"] = ""
    assert provenance.commit() == "1a2b3c4"
