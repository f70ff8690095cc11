"""What the original said comes back from disk as if it were there, in whatever layout the model itself runs."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moeq.evaluation.reference_logits import (
    HEADER_BYTES,
    SPARE_BYTES,
    LiveOriginal,
    StoredOriginal,
    choose_mode,
    num_bytes,
    plan_key,
)
from moeq.evaluation.result_digest import result_digest
from moeq.scoring.comparison import compare
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import Scorer
from moeq.tasks.documents import Request
from tests.tiny import tiny_model

CONTEXTS = [(5, 6, 7, 8, 9, 10), (5, 6, 7, 8, 40, 41, 42)]
REQUESTS = [Request(context, ending) for context in CONTEXTS for ending in ((1, 2, 3), (4,), (1, 9), (7,))]
OWNERS = [0] * 4 + [1] * 4
WINDOW = [Request((3,), (4, 5, 6, 7), open_end=True)]


def of(model: str = "sha256:aa") -> str:
    return result_digest(model=model, dtype="bfloat16", reference=None, settings={}, versions={})


def planned(layout: Layout = "plain") -> Plan:
    return plan_requests(REQUESTS, OWNERS, layout)


@pytest.mark.parametrize("layout", ["plain", "prefix", "document"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_comes_back_bit_for_bit(dtype: torch.dtype, layout: Layout, tmp_path: Path) -> None:
    scorer, plan = Scorer(tiny_model("qwen2_moe", dtype=dtype)), planned(layout)
    live = LiveOriginal(scorer).said(plan)
    assert live.scored.plan.layout == layout
    stored = StoredOriginal(tmp_path / "original", of())
    assert not stored.has(plan)
    stored.store(live)
    again = StoredOriginal(tmp_path / "original", of())
    assert again.has(plan)
    read = again.said(plan)
    assert read.scored.logits_NV.dtype == dtype
    assert torch.equal(read.scored.logits_NV, live.scored.logits_NV)
    assert torch.equal(read.scored.plan.targets_N, live.scored.plan.targets_N)
    assert read.routing.keys() == live.routing.keys()
    for name, ids_TK in read.routing.items():
        assert ids_TK.dtype == torch.uint8
        assert torch.equal(ids_TK.long(), live.routing[name])
    assert sorted(path.suffix for path in (tmp_path / "original").iterdir()) == [".json", ".safetensors"]


def test_an_original_that_ran_in_another_layout_compares_as_in_the_same(tmp_path: Path) -> None:
    original, model = Scorer(tiny_model("qwen2_moe")), Scorer(tiny_model("qwen2_moe", seed=1))
    stored = StoredOriginal(tmp_path, of())
    stored.store(original.said(planned("plain")))
    read = stored.said(planned("document"))
    assert read.scored.plan.layout == "plain"
    expected = compare(original.said(planned("document")), model.said(planned("document")))
    values = compare(read, model.said(planned("document")))
    for owner in (0, 1):
        for name, pair in expected[owner].items():
            assert values[owner][name] == pytest.approx(pair, rel=1e-4), name


def test_positions_that_predict_several_tokens_are_stored_once_and_sizes_are_known_before(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    stored = StoredOriginal(tmp_path, of())
    for plan, num_positions in ((planned("document"), 2 * 3), (plan_requests(WINDOW, [0]), 5)):
        stored.store(Scorer(model).said(plan))
        expected = num_bytes(plan, 264, torch.float32, num_choices=2 * 2)
        assert expected == num_positions * 264 * 4 + 2 * plan.num_tokens * 4 + HEADER_BYTES
        size = os.path.getsize(tmp_path / f"{plan_key(plan)}.safetensors")
        assert expected - HEADER_BYTES - 2 * plan.num_tokens * 4 < size <= expected


def test_a_window_is_mapped_not_copied(tmp_path: Path) -> None:
    stored, plan = StoredOriginal(tmp_path, of()), plan_requests(WINDOW, [0])
    stored.store(Scorer(tiny_model("mixtral")).said(plan))
    logits_NV = stored.said(plan).scored.logits_NV
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [row[0].split("-") for row in maps if row[-1].startswith(str(tmp_path))]
    assert any(int(low, 16) <= logits_NV.data_ptr() < int(high, 16) for low, high in ranges)


def test_nothing_to_predict_is_stored_too(tmp_path: Path) -> None:
    stored, plan = StoredOriginal(tmp_path, of()), plan_requests([], [])
    said = Scorer(tiny_model("mixtral")).said(plan)
    stored.store(said)
    assert compare(stored.said(plan), said) == {}


def test_other_requests_are_another_batch(tmp_path: Path) -> None:
    stored = StoredOriginal(tmp_path, of())
    stored.store(Scorer(tiny_model("mixtral")).said(plan_requests(WINDOW, [0])))
    closed = Request(WINDOW[0].context, WINDOW[0].continuation)
    moved = Request((3, 4), (5, 6, 7), open_end=True)
    for other in ([closed], [moved], [*WINDOW, *WINDOW], [Request((3,), (4, 5, 6, 8), open_end=True)]):
        plan = plan_requests(other, [0] * len(other))
        assert not stored.has(plan)
        with pytest.raises(ValueError, match="no logits of the original are stored for this batch"):
            stored.said(plan)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    stored, plan = StoredOriginal(tmp_path, of()), planned()
    stored.store(Scorer(tiny_model("mixtral")).said(plan))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"{path} is truncated or damaged .*; delete it and start again: the original"
    ):
        stored.said(plan)


def test_a_file_of_another_original_is_refused(tmp_path: Path) -> None:
    StoredOriginal(tmp_path / "a", of()).store(Scorer(tiny_model("mixtral")).said(planned()))
    other = StoredOriginal(tmp_path / "b", of("sha256:bb"))
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "b")
    with pytest.raises(ValueError, match="holds the logits of another original"):
        other.said(planned())


def test_a_folder_of_another_original_is_refused(tmp_path: Path) -> None:
    StoredOriginal(tmp_path, of()).store(Scorer(tiny_model("mixtral")).said(planned()))
    with pytest.raises(ValueError, match="another original \\(model: 'sha256:aa' -> 'sha256:bb'\\); delete it"):
        StoredOriginal(tmp_path, of("sha256:bb"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        StoredOriginal(tmp_path, of())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"safetensors files but no manifest.json; give a folder of its own"):
        StoredOriginal(tmp_path, of())


def test_what_the_disk_has_no_room_for_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StoredOriginal(tmp_path / "run/original", of())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=SPARE_BYTES + 5_000_000_000))
    original.check_room(5_000_000_000)
    with pytest.raises(ValueError, match=r"need 5\.2 GB in .* has 5\.0 GB left; lower num_documents"):
        original.check_room(5_200_000_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("requested", "free", "mode"),
    [
        ("auto", 115, "memory"),
        ("auto", 114, "disk"),
        ("memory", 100, "memory"),
        ("disk", 1000, "disk"),
        ("disk", 1, "disk"),
    ],
)
def test_the_original_stays_in_memory_where_both_fit(requested: str, free: int, mode: str) -> None:
    assert choose_mode(requested, 30, 70, free) == mode  # type: ignore[arg-type]


def test_memory_that_both_cannot_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model \(15.0 GB\) and its original \(61.0 GB\) do not both fit into 75.0 GB"
    ):
        choose_mode("memory", 15 * 10**9, 61 * 10**9, 75 * 10**9)
