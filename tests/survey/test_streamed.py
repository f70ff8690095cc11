"""A survey of a model whose blocks come from its files finds, to the last bit, what one of a model in memory does."""

from pathlib import Path

import pytest
import torch

from moeq.allocation.plan import Choice
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.stream import open_stream
from moeq.disk.waiting import WaitingStates
from moeq.quant.spec import GridSpec
from moeq.survey.scores import SCORES
from moeq.survey.survey_spec import COSTS, SurveySpec
from moeq.survey.surveyor import survey_model
from tests.tiny import save_tiny

SPEC = SurveySpec(
    costs=COSTS, scores=SCORES, predictor=True, choices=(Choice(2, 16), Choice(4, 16)),
    grid=GridSpec(group_size=16, clip_search=False), num_gradient_batches=2,
)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "zaya"])
def test_a_survey_of_a_streamed_model_equals_one_in_memory_and_reads_each_block_four_times(
    family: str, tmp_path: Path
) -> None:
    folder, batches = save_tiny(family, tmp_path / "model"), torch.randint(1, 257, (6, 12)).split(2)
    in_memory = survey_model(load_model(str(folder), "auto", "float32", "cpu"), batches, SPEC)
    model, stream = open_stream(folder, None, lambda _: torch.float32)
    streamed = survey_model(model, batches, SPEC, stream, WaitingStates(0, tmp_path))
    assert streamed.to_json() == in_memory.to_json()
    # Forward, forward with rounded structures, in reverse, and the survey itself; not for every batch.
    assert stream.num_loads == 4 * len(stream.blocks)
    assert all(parameter.is_meta for parameter in stream.blocks.parameters())
