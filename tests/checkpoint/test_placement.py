"""A model is streamed where it does not fit, and refused where it can be neither held nor streamed."""

from pathlib import Path

import pytest

from moeq.checkpoint.placement import Asked, choose_placement, stream_obstacle, weights_folder
from tests.tiny import save_tiny

GB = 10**9
PACKED = "it is quantized already"


@pytest.mark.parametrize(
    ("asked", "need", "free", "obstacle", "kind"),
    [
        ("memory", 60, 24, None, "memory"),
        ("memory", 60, 24, PACKED, "memory"),
        ("auto", 24, 24, None, "memory"),
        ("auto", 24, 24, PACKED, "memory"),
        ("auto", 25, 24, None, "stream"),
        ("stream", 60, 24, None, "stream"),
        ("stream", 1, 24, None, "stream"),
    ],
)
def test_a_model_goes_where_it_fits(asked: Asked, need: int, free: int, obstacle: str | None, kind: str) -> None:
    placement = choose_placement(asked, "a/model", need * GB, free * GB, obstacle)
    assert placement.kind == kind
    assert placement.reason.startswith(f"a/model needs {need}.0 GB in memory, of {free}.0 GB that are free, ")
    assert ("as asked" in placement.reason) == (asked == "memory" or (asked == "stream" and need <= free))


def test_what_can_be_neither_held_nor_streamed_is_refused_with_its_numbers() -> None:
    message = r"a needs 60\.0 GB .* 24\.0 GB .* cannot be streamed: it is quantized already; open it where it fits"
    with pytest.raises(ValueError, match=message):
        choose_placement("auto", "a", 60 * GB, 24 * GB, PACKED)
    with pytest.raises(
        ValueError, match=r"a cannot be streamed: it is quantized already; set --model\.placement memory"
    ):
        choose_placement("stream", "a", GB, 24 * GB, PACKED)


def test_a_placement_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'disk'.* must be one of auto, memory, stream"):
        choose_placement("disk", "a", GB, GB, None)  # type: ignore[arg-type]


def test_a_folder_of_weights_can_be_streamed_and_others_say_why_not(tmp_path: Path) -> None:
    folder = save_tiny("qwen2_moe", tmp_path / "model")
    assert stream_obstacle(str(folder)) is None
    assert weights_folder(str(folder)) == folder
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert stream_obstacle(str(folder)) == "its folder has no weights"
