"""Fingerprints are equal exactly where what they are made of is, and say what differs."""

from typing import Any

import pytest

from moeq.evaluation.result_digest import differences, result_digest

PARTS: dict[str, Any] = {
    "model": "sha256:aa",
    "dtype": "bfloat16",
    "reference": None,
    "settings": {"num_shots": 5, "sampling": {"temperature": 0.2, "seed": 0}},
    "versions": {"torch": "2.13.0"},
}


def test_the_order_of_settings_does_not_matter() -> None:
    turned = {**PARTS, "settings": dict(reversed(PARTS["settings"].items()))}
    assert result_digest(**turned) == result_digest(**PARTS)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("model", "sha256:bb", ["model: 'sha256:aa' -> 'sha256:bb'"]),
        ("dtype", "float16", ["dtype: 'bfloat16' -> 'float16'"]),
        ("reference", "sha256:cc", ["reference: None -> 'sha256:cc'"]),
        (
            "settings",
            {"num_shots": 0, "sampling": {"temperature": 0.2, "seed": 1}},
            ["settings.num_shots: 5 -> 0", "settings.sampling.seed: 0 -> 1"],
        ),
        (
            "settings",
            {"num_shots": 5},
            ["settings.sampling.seed: 0 -> None", "settings.sampling.temperature: 0.2 -> None"],
        ),
        ("versions", {"torch": "2.14.0"}, ["versions.torch: '2.13.0' -> '2.14.0'"]),
    ],
)
def test_a_changed_part_changes_it_and_is_named(part: str, value: Any, said: list[str]) -> None:
    before, now = result_digest(**PARTS), result_digest(**{**PARTS, part: value})
    assert before != now
    assert differences(before, now) == said


def test_equal_fingerprints_have_no_differences() -> None:
    assert differences(result_digest(**PARTS), result_digest(**PARTS)) == []


def test_settings_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        result_digest(**{**PARTS, "settings": {"temperature": float("nan")}})


def test_versions_of_what_computes_nothing_do_not_count() -> None:
    more = {**PARTS["versions"], "platform": "Linux-6.1", "lightning": "2.6.6"}
    assert result_digest(**{**PARTS, "versions": more}) == result_digest(**PARTS)
