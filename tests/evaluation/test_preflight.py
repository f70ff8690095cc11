"""What an evaluation is expected to take follows from the passes of its batches and the shapes of its models."""

import pytest
import torch

from moeq.evaluation.preflight import Pace, Role, TaskWork, evaluation_phases, measure_pace, probe_shape
from moeq.models.adapter import Adapter
from moeq.models.sizes import hidden_bytes, model_bytes
from moeq.preflight.phases import Phase
from tests.tiny import tiny_model

TASK = TaskWork("words", num_tokens=5000, largest=400, longest=50, positions=300, all_positions=4000)
GB = 10**9


def role(name: str, *, streamed: bool, pace: Pace | None = None) -> Role:
    adapter = Adapter(tiny_model("qwen3_moe"))
    sizes = model_bytes(adapter, streamed=streamed)
    return Role(name, adapter, sizes, sizes.total, pace)


def phases_of(model: Role, original: Role | None = None, *, beside: bool = False, bound: int = GB) -> list[Phase]:
    found = evaluation_phases([TASK], model, original, beside=beside, hidden_bytes_bound=bound)
    return list(found)


def test_a_model_in_memory_is_loaded_and_runs_the_tasks() -> None:
    model = role("model", streamed=False)
    load, task = phases_of(model)
    assert (load.kind, task.kind, task.label) == ("load model", "task words", "words")
    assert task.moments[0].device["model"] == model.sizes.total
    assert task.moments[0].device["logits"] == 300 * 264 * (4 + 8)
    assert task.moments[0].host["hidden states"] == 0


def test_a_streamed_model_holds_a_block_and_hidden_states_up_to_their_bound() -> None:
    model = role("model", streamed=True)
    task = phases_of(model)[1]
    assert task.moments[0].device["block"] == model.sizes.blocks[0]
    assert "model" not in task.moments[0].device
    waiting = hidden_bytes(model.adapter, 5000)
    assert task.moments[0].host["hidden states"] == waiting
    assert phases_of(model, bound=waiting // 3)[1].moments[0].host["hidden states"] == waiting // 3


def test_an_original_before_the_model_leaves_its_logits_and_one_beside_it_its_weights() -> None:
    model, original = role("model", streamed=False), role("reference", streamed=False)
    before = phases_of(model, original)
    assert [phase.kind for phase in before] == ["original", "load model", "task words"]
    assert before[0].disk == 4000 * 264 * 4
    beside = phases_of(model, original, beside=True)
    assert [phase.kind for phase in beside] == ["load model", "task words"]
    assert beside[1].moments[0].device["original"] == original.sizes.total
    assert beside[1].moments[0].device["logits"] == 2 * phases_of(model)[1].moments[0].device["logits"]


def test_time_is_tokens_times_blocks_and_for_a_streamed_model_its_files() -> None:
    pace = Pace(token=0.001, read=1e6)
    held, streamed = role("model", streamed=False, pace=pace), role("model", streamed=True, pace=pace)
    assert phases_of(held)[1].seconds == pytest.approx(5000 * 2 * 0.001)
    assert phases_of(streamed)[1].seconds == pytest.approx(10.0 + sum(streamed.sizes.stored) / 1e6)
    assert phases_of(role("model", streamed=True))[1].seconds is None


def test_the_batch_that_is_measured_is_as_long_as_the_rows_are() -> None:
    assert probe_shape([TASK]) == (40, 50)
    assert probe_shape([]) == (2048, 1)
    adapter = Adapter(tiny_model("mixtral"))
    pace = measure_pace(adapter, torch.arange(64).view(4, 16), stored=1000)
    assert pace.token > 0
    assert pace.read > 0
