"""What fits is in memory, what does not is streamed, and what can be neither is refused before anything is done."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeq.evaluation import placing
from moeq.evaluation.placing import choose_places, refuse_generation, waiting_in
from moeq.evaluation.reference_logits import SPARE_BYTES
from moeq.scoring.scorer import TWO_PASSES
from moeq.tasks.registry import find_task

GB = 10**9
CPU = torch.device("cpu")
SIZES = {"large": 57 * GB, "export": 15 * GB, "small": 2 * GB}


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models by name, of which the export is packed; 24 GB are free."""
    packed = {"export": SimpleNamespace(quantization_config={})}
    monkeypatch.setattr(placing, "model_bytes", lambda name, *_, **__: SIZES[name])
    monkeypatch.setattr(placing, "load_config", lambda name, **_: packed.get(name, SimpleNamespace()))
    monkeypatch.setattr(
        placing, "stream_obstacle", lambda name, **_: "it is quantized already" if name in packed else None
    )
    monkeypatch.setattr(placing, "free_bytes", lambda _: 24 * GB)


def settings(name: str, reference: str | None, placement: str = "auto", mode: str = "auto") -> dict[str, Any]:
    return {
        "name": name, "reference": reference, "placement": placement, "reference_mode": mode, "dtype": "auto",
        "compute_dtype": "auto",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reference", "placement", "expected"),
    [
        ("small", None, "auto", ("memory", None, None)),
        ("large", None, "auto", ("stream", None, None)),
        ("large", None, "memory", ("memory", None, None)),
        ("small", None, "stream", ("stream", None, None)),
        ("export", "small", "auto", ("memory", "memory", "memory")),
        ("export", "large", "auto", ("memory", "stream", "disk")),
        ("export", "large", "stream", ("memory", "stream", "disk")),
        ("export", "small", "stream", ("memory", "stream", "disk")),
        ("small", "large", "auto", ("memory", "stream", "disk")),
        ("large", "small", "auto", ("stream", "memory", "disk")),
        ("large", "large", "auto", ("stream", "stream", "disk")),
        ("export", "large", "memory", ("memory", "memory", "disk")),
    ],
)
def test_each_model_goes_where_it_fits(
    name: str, reference: str | None, placement: str, expected: tuple[str | None, ...]
) -> None:
    places = choose_places(settings(name, reference, placement), CPU)
    assert (places.model.kind, places.original and places.original.kind, places.mode) == expected
    assert places.without == (TWO_PASSES if "stream" in expected else ())
    assert [each.kind for each in places.streamed] == ["stream"] * expected.count("stream")


def test_the_rank_with_the_least_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "gather_lists", lambda items: [*items, GB])
    assert choose_places(settings("small", None), CPU).model.kind == "stream"


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"large needs 65\.5 GB .*24\.0 GB .*choose 'disk' or 'auto'"):
        choose_places(settings("export", "large", mode="memory"), CPU)
    monkeypatch.setattr(placing, "free_bytes", lambda _: 16 * GB)
    with pytest.raises(ValueError, match=r"export needs 17\.2 GB .*16\.0 GB .*; open it where it fits"):
        choose_places(settings("export", None, "stream"), CPU)


def test_tasks_of_text_that_are_not_finished_are_refused_of_a_streamed_model() -> None:
    tasks = {"gsm8k": [0], "sums": [], "boolq": [0]}
    evaluations: Any = [SimpleNamespace(task=find_task(name), unfinished=left) for name, left in tasks.items()]
    with pytest.raises(ValueError, match=r"the tasks \['gsm8k'\] need text .* 65\.5 GB .* or leave these tasks out"):
        refuse_generation(choose_places(settings("large", None), CPU).model, evaluations)
    refuse_generation(choose_places(settings("large", None), CPU).model, evaluations[1:])
    refuse_generation(choose_places(settings("export", "large"), CPU).model, evaluations)


def test_hidden_states_wait_within_the_bound_the_memory_and_half_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=SPARE_BYTES + 50 * GB))
    waiting = waiting_in(tmp_path / "run", 2 * GB, 10 * GB)
    assert (waiting.memory_bytes, waiting.total_bytes) == (2 * GB, 2 * GB + 20 * GB)
    assert waiting_in(tmp_path / "run", 40 * GB).memory_bytes == 3 * GB  # an eighth of what is free
    assert waiting_in(tmp_path / "run", 2 * GB, 60 * GB).total_bytes == 2 * GB
