"""A revision and the trust in code reach whatever reads a source."""

from typing import Any

import pytest

import moeq.module
from moeq.checkpoint.placement import Placement
from moeq.checkpoint.source_options import source_options
from moeq.module import MoEQuantModule

OPTIONS: dict[str, Any] = {"revision": "v2", "trust_remote_code": True}


def test_they_are_options_of_a_run_and_off_where_it_says_nothing() -> None:
    assert source_options(OPTIONS | {"name": "org/moe"}) == OPTIONS
    assert source_options({}) == {"revision": None, "trust_remote_code": False}
    assert source_options(MoEQuantModule().hparams) == {"revision": None, "trust_remote_code": False}


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_a_fit_passes_them_on_to_all_that_reads_its_source(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def reader(name: str, result: Any) -> None:
        monkeypatch.setattr(moeq.module, name, lambda *_, **options: asked.update({name: options}) or result)

    for name in ("load_tokenizer", "load_model", "stream_obstacle"):
        reader(name, None)
    for name in ("model_bytes", "working_bytes"):
        reader(name, 0)
    reader("stream_model", (None, None))
    monkeypatch.setattr(moeq.module, "choose_placement", lambda *_: Placement(kind, "as asked"))
    MoEQuantModule(name="org/moe", **OPTIONS).configure_model()
    reads = {"load_model", "stream_model", "load_tokenizer", "model_bytes", "working_bytes", "stream_obstacle"}
    assert asked.keys() == reads - {"load_model" if kind == "stream" else "stream_model"}
    assert all(options == OPTIONS for options in asked.values()), asked
