"""The fingerprint of a fit follows what decides its weights, and nothing that changes from process to process."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from callbacks.expert_usage import ExpertUsage
from callbacks.gptq import GPTQ
from callbacks.rotation import Rotation
from moeq.fit.fingerprint import batches_digest, describe_step, run_fingerprint, stable_form


class Opaque:
    """An object whose repr holds its address."""

    def __init__(self, value: int) -> None:
        self.value, self._cache = value, object()


@dataclass
class Settings:
    rate: float = 0.5
    names: set[str] = field(default_factory=lambda: {"a", "b", "c"})


class Foreign:
    """A callback that knows nothing of moeq."""

    def __init__(self, settings: Any, act: Callable[..., Any] = torch.relu) -> None:
        self.settings, self.act, self.inner = settings, act, Opaque(3)


def configuration(*steps: object, **settings: Any) -> str:
    return run_fingerprint(settings, steps, "model", torch.float32)["configuration"]


def test_the_order_of_steps_counts() -> None:
    assert configuration(Rotation(), GPTQ()) != configuration(GPTQ(), Rotation())


def test_two_steps_of_one_class_both_count() -> None:
    one, two = Rotation(seed=1), Rotation(seed=2)
    assert len({configuration(one), configuration(two), configuration(one, two), configuration(two, one)}) == 4


def test_classes_of_one_name_in_two_modules_differ() -> None:
    other = type("GPTQ", (GPTQ,), {"__module__": "somewhere.else"})
    assert configuration(GPTQ()) != configuration(other())


def test_a_default_that_is_spelled_out_is_the_same_argument() -> None:
    assert configuration(GPTQ()) == configuration(GPTQ(min_tokens=128)) != configuration(GPTQ(min_tokens=129))


def test_what_happens_to_a_step_after_it_was_made_does_not_count() -> None:
    step = GPTQ()
    before = configuration(step)
    step.seen = [1, 2, 3]  # type: ignore[attr-defined]
    assert configuration(step) == before


def test_steps_that_only_write_down_do_not_count() -> None:
    assert configuration(GPTQ(), ExpertUsage()) == configuration(GPTQ())


def test_neutral_settings_do_not_count_and_others_do() -> None:
    assert configuration(restart=True, bits=3) == configuration(restart=False, bits=3) != configuration(bits=4)


SCRIPT = """
import sys
from tests.fit.test_fingerprint import Foreign, Settings, configuration
sys.stdout.write(configuration(Foreign(Settings())))
"""


@pytest.mark.slow
def test_an_attribute_without_a_stable_repr_is_the_same_in_another_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == configuration(Foreign(Settings()))
    assert done.stdout != configuration(Foreign(Settings(rate=0.25)))
    assert done.stdout != configuration(Foreign(Settings(), act=torch.sigmoid))


def test_values_are_told_by_their_content() -> None:
    assert stable_form(Opaque(1)) == stable_form(Opaque(1)) != stable_form(Opaque(2))
    assert stable_form(torch.ones(2)) == stable_form(torch.ones(2)) != stable_form(torch.zeros(2))
    assert stable_form({"b": 1, "a": {3, 1, 2}}) == stable_form({"a": {2, 3, 1}, "b": 1})
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert stable_form(loop) == {"self": "(itself)"}
    assert describe_step(GPTQ())[0] == "callbacks.gptq.GPTQ"


def batches(*rows: list[int], size: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor(rows[i : i + size])} for i in range(0, len(rows), size)]


def test_data_are_told_by_their_rows_in_any_order_and_batches() -> None:
    one = batches_digest(batches([1, 2], [3, 4], [5, 6]))
    assert one == batches_digest(batches([5, 6], [1, 2], [3, 4], size=1))
    assert one != batches_digest(batches([1, 2], [3, 4], [5, 7]))
    assert one != batches_digest(batches([1, 2], [3, 4]))
    masked = [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])} for batch in batches([1, 2], [3, 4])]
    assert batches_digest(masked) != batches_digest(batches([1, 2], [3, 4]))


def test_data_that_are_no_batches_of_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="a calibration batch is a list without a tensor input_ids"):
        batches_digest([[1, 2]])  # type: ignore[list-item]
