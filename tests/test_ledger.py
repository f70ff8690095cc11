"""What the steps of a run change on purpose stands in its ledger, and in that of a run that was continued."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from callbacks.awq import AWQ
from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.record import Record
from callbacks.rotation import Rotation
from callbacks.router_calibration import RouterCalibration
from callbacks.rtn import RTN
from moeq.export.ledger import LedgerError
from tests.test_placements import fit
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
ROUTERS = [f"model.layers.{block}.mlp.gate.weight" for block in range(2)]
NORMS = [f"model.layers.{block}.{norm}_layernorm.weight" for block in range(2) for norm in ("input", "post_attention")]


def read(folder: Path) -> dict[str, dict[str, str]]:
    """Entries of a run's ledger by key."""
    tensors = json.loads((folder / "ledger.json").read_text())["tensors"]
    assert isinstance(tensors, dict)
    return tensors


def changed(folder: Path) -> dict[str, str]:
    return {key: entry["detail"] for key, entry in read(folder).items() if entry["fate"] == "changed"}


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_each_change_names_the_step(placement: str, tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model")
    fit([RTN(), Export()], model, tmp_path / "rtn", placement)
    assert changed(tmp_path / "rtn") == {}
    fit([HessianCalibration(), GPTQ(), RouterCalibration(), Export()], model, tmp_path / "refit", placement)
    assert changed(tmp_path / "refit") == dict.fromkeys(ROUTERS, "refitted to the decisions of the original")
    fit([HessianCalibration(), AWQ(), Export()], model, tmp_path / "awq", placement)
    assert set(changed(tmp_path / "awq").values()) == {"took channel scales (AWQ)"}
    assert set(changed(tmp_path / "awq")) >= {*NORMS, *ROUTERS}
    fit([Rotation(), RTN(), Export()], model, tmp_path / "rotated", placement)
    found = changed(tmp_path / "rotated")
    assert set(found.values()) == {"rotated (hadamard)"}
    assert {"model.embed_tokens.weight", "lm_head.weight", *NORMS, *ROUTERS} <= found.keys()


def test_a_continued_run_knows_what_the_run_before_changed(tmp_path: Path) -> None:
    class Killed(Callback):
        affects_weights = False

        def on_train_epoch_start(self, trainer: object, pl_module: object) -> None:
            if pl_module.current_pass.block == 1:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    model = save_tiny("qwen3_moe", tmp_path / "model")
    steps = [HessianCalibration, GPTQ, RouterCalibration, Export, Record]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit([*(step() for step in steps), Killed()], model, tmp_path / "run", "memory")
    fit([step() for step in steps], model, tmp_path / "run", "memory")
    assert changed(tmp_path / "run") == dict.fromkeys(ROUTERS, "refitted to the decisions of the original")
    assert "2 changed" in (tmp_path / "run" / "summary.md").read_text()


def test_a_tensor_that_is_not_accounted_for_leaves_no_export(tmp_path: Path) -> None:
    class Careless(Callback):
        def on_fit_start(self, trainer: object, pl_module: object) -> None:
            pl_module.model.get_parameter("model.norm.weight").mul_(2)  # type: ignore[attr-defined]

    model = save_tiny("qwen3_moe", tmp_path / "model")
    with pytest.raises(LedgerError, match=r"model\.norm\.weight \(differs in export, differs in dense\)"):
        fit([Careless(), RTN(), Export()], model, tmp_path / "run", "memory")
    assert not (tmp_path / "run" / "export").exists()
    assert not (tmp_path / "run" / "dense").exists()
    assert (tmp_path / "run" / "ledger.json").exists()
