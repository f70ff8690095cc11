"""Which files the study of GGUF asks for, and how moeq makes them."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.studies.gguf import AUTOROUND, IMATRIX, LLAMA, NEED_IMATRIX, Gguf
from benchmarks.studies.gguf_arms import BUDGETS, GRIDS, OWN, OWN_LEARNED, UNIFORM, steps_of
from callbacks.bit_allocation import BitAllocation


def cases(*args: str) -> Counter[tuple[str, str]]:
    study = Gguf(Gguf.parser().parse_args(args))
    found = study.cases()
    assert len(set(found)) == len(found)
    return Counter((case.quantizer, case.kind) for case in found)


def test_what_uses_data_comes_for_every_seed_and_what_does_not_once() -> None:
    found = cases("--autoround", "python", "--steps", "0")
    for (quantizer, kind), count in found.items():
        assert count == (3 if quantizer in (IMATRIX, OWN, OWN_LEARNED) else 1), (quantizer, kind)
    assert found[AUTOROUND, "q4_0, 0 steps"] == 1
    assert {kind for quantizer, kind in found if quantizer == OWN} == {
        *(f"{budget:g}" for budget in BUDGETS), *UNIFORM, *GRIDS
    }  # fmt: skip


def test_types_that_need_importances_have_no_row_without() -> None:
    found = cases()
    assert not any(quantizer == AUTOROUND for quantizer, _ in found)
    for kind in NEED_IMATRIX:
        assert found[IMATRIX, kind] == 3
        assert (LLAMA, kind) not in found


@pytest.mark.parametrize("kind", ["4.5", "Q4_0", "Q3_K"])
def test_learning_is_one_more_step_after_the_same_ones(kind: str) -> None:
    plain, settings = steps_of(kind, Path("survey.json"), learned=False)
    learned, same = steps_of(kind, Path("survey.json"), learned=True)
    assert settings == same
    assert [type(step).__name__ for step in learned] == [*(type(step).__name__ for step in plain), "LearnedRounding"]
    assert settings["grid"] == ("q3_k" if kind == "Q3_K" else "full_range")


def test_learned_files_choose_among_evenly_spaced_levels() -> None:
    offered = []
    for learned in (False, True):
        plan = steps_of("4.5", Path("survey.json"), learned=learned)[0][0]
        assert isinstance(plan, BitAllocation)
        offered.append(set(plan.spec.choices or ()))
    assert offered[0] - offered[1] == {"iq4_nl"}
