"""KroneckerFactors in a run: memory, stream, ranks and killed runs give the same bytes; what is refused."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks.gptq import GPTQ
from callbacks.kronecker_factors import KroneckerFactors
from callbacks.rtn import RTN
from moeq.fit.factors import Factors
from moeq.fit.solve import Unit
from moeq.forecast import try_solve_of
from moeq.models.sites import Site
from moeq.quant.gptq import gptq_solve
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.quant.two_sided_solve import TwoSidedSpec
from tests.processes import run
from tests.test_main import QUIET
from tests.tiny import save_tiny

SMALL = {"num_sequences": 6, "length": 16, "batch_size": 2, "sequences_at_once": 6}


def arguments(
    folder: Path, model: Path, *extra: dict[str, Any], factors: bool = True, kept: Path | None = None, **options: Any
) -> list[str]:
    """Of a small fit under two Hessians; its configuration is written beside the folder."""
    init_args = SMALL if kept is None else SMALL | {"folder": str(kept)}
    steps = [{"class_path": "KroneckerFactors", "init_args": init_args}] if factors else []
    steps += [*extra, {"class_path": "HessianCalibration"}, {"class_path": "GPTQ"}, {"class_path": "Record"}]
    data = {"class_path": "tests.on_ranks.FewTokens", "init_args": {"num_sequences": 3}}
    settings = {"name": str(model), "group_size": 16, "bits": 3, **options}
    trainer = {"callbacks": steps, "default_root_dir": str(folder), "logger": False}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"model": settings, "data": data, "trainer": trainer}))
    return ["fit", "--config", str(path), *QUIET]


def blocks(folder: Path) -> dict[str, bytes]:
    """Every block file of a run."""
    return {path.name: path.read_bytes() for path in sorted((folder / "blocks").iterdir())}


def fallbacks(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((folder / "fallbacks.json").read_text())
    return found


@pytest.mark.parametrize(("steps", "told"), [([RTN()], "add GPTQ"), ([], "add GPTQ")])
def test_a_list_that_makes_no_use_of_factors_is_refused(steps: list[Any], told: str) -> None:
    step = KroneckerFactors()
    with pytest.raises(ValueError, match=told):
        step.on_fit_start(SimpleNamespace(callbacks=[step, *steps]), None)  # type: ignore[arg-type]


def test_settings_that_cannot_work_are_refused() -> None:
    for name in ("num_sequences", "length", "batch_size", "sequences_at_once"):
        with pytest.raises(ValueError, match=name):
            KroneckerFactors(**{name: 0})
    module = SimpleNamespace(run=SimpleNamespace(needs=SimpleNamespace(factors=object()), plan={}))
    with pytest.raises(ValueError, match="choose shrink"):
        GPTQ(coverage="rtn").check(module)  # type: ignore[arg-type]


def test_grids_without_even_levels_keep_the_codes_of_gptq(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_EOI, x_EIN = (torch.randn(1, *shape, generator=generator) for shape in ((8, 32), (32, 64)))
    hessian_EII, grid = x_EIN @ x_EIN.mT, GridSpec.of_kind("iq4_nl")
    monkeypatch.setattr("callbacks.gptq.hessians_of", lambda *_: (lambda *_: hessian_EII, []))
    # There are no factors to read.
    factors = Factors(tmp_path, {}, TwoSidedSpec())
    module = SimpleNamespace(
        run=SimpleNamespace(hessians=None, factors=factors, plan={}, fallbacks=[]), solve_spec=SolveSpec(),
        current_pass=SimpleNamespace(parts=()), adapter=SimpleNamespace(storage_dtype=torch.float32),
    )  # fmt: skip
    unit = Unit(Site("w", 0, "dense", "mlp_in", ("w",), ("w",), (8,), 32, 1), (0,), (0,), grid)
    found = GPTQ().solver(module)(unit, weight_EOI)  # type: ignore[arg-type]
    expected = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), torch.float32)
    assert torch.equal(found.codes_EOI, expected.codes_EOI)
    assert found.one_sided_E is None


def test_the_preflight_times_the_solve_under_two_hessians() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_EOI, x_EIN = (torch.randn(1, *shape, generator=generator) for shape in ((8, 32), (32, 64)))
    module = SimpleNamespace(
        adapter=SimpleNamespace(storage_dtype=torch.float32), grid=GridSpec(3, 16), solve_spec=SolveSpec(),
        run=SimpleNamespace(needs=SimpleNamespace(factors=TwoSidedSpec())), trainer=SimpleNamespace(callbacks=[GPTQ()]),
    )  # fmt: skip
    found = try_solve_of(module)(weight_EOI, x_EIN @ x_EIN.mT)  # type: ignore[arg-type]
    assert found.one_sided_E is not None
    module.run.needs.factors = None
    assert try_solve_of(module)(weight_EOI, x_EIN @ x_EIN.mT).one_sided_E is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_streamed_and_killed_runs_give_the_bytes_of_one_in_memory(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    whole, plain, streamed, killed = (tmp_path / name for name in ("whole", "plain", "streamed", "killed"))
    assert run(arguments(whole, model)).returncode == 0
    assert run(arguments(plain, model, factors=False)).returncode == 0
    expected = blocks(whole)
    assert not (whole / "factors").exists()
    assert all(expected[name] != block for name, block in blocks(plain).items())
    done = run([*arguments(streamed, model), "--model.placement=stream", "--model.hidden_gib=0"])
    assert done.returncode == 0, done.stderr
    assert blocks(streamed) == expected
    # Backward, the last block has its factors first; the third time it is the block that is finished.
    for name in ("block_001.safetensors", "block_000.safetensors", "block_001.safetensors"):
        killer = {"class_path": "tests.killer.KillBeforeName", "init_args": {"name": name}}
        done = run(arguments(killed, model, killer))
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run(arguments(killed, model))
    assert done.returncode == 0, done.stderr
    assert blocks(killed) == expected


@pytest.mark.slow
def test_kept_factors_serve_a_fit_of_other_bits_and_no_other_model(tmp_path: Path) -> None:
    model, kept = save_tiny("qwen2_moe", tmp_path / "model"), tmp_path / "kept"
    first, second, alone, other = (tmp_path / name for name in ("first", "second", "alone", "other"))
    assert run(arguments(first, model, kept=kept)).returncode == 0
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("block_*")}
    assert len(written) == len(blocks(first))
    done = run(arguments(second, model, kept=kept, bits=4, restart=True))
    assert done.returncode == 0, done.stderr
    assert "taken from" in done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("block_*")} == written
    assert run(arguments(alone, model, bits=4)).returncode == 0
    for path in (alone / "blocks").iterdir():
        found = load_file(second / "blocks" / path.name)
        assert all(torch.equal(found[name], expected) for name, expected in load_file(path).items())
    assert run(arguments(other, save_tiny("qwen2_moe", tmp_path / "another", seed=1), kept=kept)).returncode == 0
    assert len(list(kept.iterdir())) == 2


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one_and_what_was_shrunk_is_told(tmp_path: Path) -> None:
    """On given sequences: what ranks write together depends on their number, as for calibration data."""
    model = save_tiny("qwen2_moe", tmp_path / "model")
    one, two = tmp_path / "one", tmp_path / "two"
    given = {"class_path": "tests.on_ranks.GivenSequences"}
    assert run(arguments(one, model, given)).returncode == 0
    ranks = ["--trainer.devices=2", "--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy"]
    done = run([*arguments(two, model, given), *ranks, "--trainer.strategy.start_method=fork"])
    assert done.returncode == 0, done.stderr
    assert blocks(two) == blocks(one)
    assert fallbacks(two) == fallbacks(one)
    assert "few tokens of curvature" in {each["reason"] for each in fallbacks(one)}
