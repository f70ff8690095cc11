"""Every configuration runs, through the command line, on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from main import main
from moeq.report import read_results
from tests.tiny import save_tiny

CONFIGS = sorted(Path("configs").glob("*.yaml"))
FIT_CONFIGS = [path for path in CONFIGS if "eval" not in path.stem]
EVALUATION = [
    "--data.evaluation.window_length=32", "--data.evaluation.num_windows=2", "--data.evaluation.num_arithmetic=2",
]  # fmt: skip
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "model")


def small_data(config: Path) -> list[str]:
    """Overrides that make the data of a configuration tiny."""
    if "moequant" in config.stem:
        options = ["--data.num_sequences=4", "--data.length=24"]
        return options + (["--data.compare_text=null"] if "w4" in config.stem else [])
    # Group sizes below 32 are none that vLLM reads.
    groups = ["--model.group_size=32"] if "vllm" in config.stem else []
    return [*groups, "--data.length=24", f"--data.num_windows={1 if 'rtn' in config.stem else 4}"]


def fit(config: Path, model: Path, folder: Path, *options: str) -> None:
    main(
        [
            "fit", "--config", str(config), f"--model.name={model}", "--model.group_size=16",
            f"--trainer.default_root_dir={folder}", *small_data(config), *QUIET, *options,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("config", FIT_CONFIGS, ids=lambda path: path.stem)
def test_fit_config_quantizes_exports_and_records(config: Path, tiny: Path, tmp_path: Path) -> None:
    fit(config, tiny, tmp_path)
    for name in ("config.yaml", "manifest.json", "allocation.json", "errors.csv", "fallbacks.json", "summary.md"):
        assert (tmp_path / name).is_file(), name
    verification = json.loads((tmp_path / "verification.json").read_text())
    assert verification["checkpoint"]["logits_equal"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    original = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(1, 30)[None]
    difference = (reloaded(ids).logits - original(ids).logits).abs().max()
    assert 0 < difference < original(ids).logits.abs().max()


def test_eval_config_compares_an_export_with_its_original(tiny: Path, tmp_path: Path) -> None:
    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path)
    options = [
        "--model.reference",
        str(tiny),
        "--trainer.default_root_dir",
        str(tmp_path / "eval"),
        *EVALUATION,
        *QUIET,
    ]
    main(["validate", "--config", "configs/eval.yaml", "--model.name", str(tmp_path / "export"), *options])
    (row,) = read_results(tmp_path / "eval" / "results.json")
    assert row.method == "RTN"
    assert row.bits == 3
    assert 3 < row.average_bits < 5
    assert row.kl_mean is not None
    assert row.kl_mean > 0
    assert set(row.perplexity) == {"prose", "python", "gsm8k", "arithmetic"}
    assert 0 < row.router_agreement < 1
    assert (tmp_path / "eval" / "config_validate.yaml").is_file()


def test_the_original_agrees_with_itself(tiny: Path, tmp_path: Path) -> None:
    names = ["--model.name", str(tiny), "--model.reference", str(tiny), "--trainer.default_root_dir", str(tmp_path)]
    main(["validate", "--config", "configs/eval.yaml", *names, *EVALUATION, *QUIET])
    (row,) = read_results(tmp_path / "results.json")
    assert row.kl_mean == pytest.approx(0, abs=1e-6)
    assert row.top1_agreement == row.router_agreement == 1
    assert row.average_bits == 16


def test_the_same_seed_gives_the_same_export(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(Path("configs/moequant_w3.yaml"), tiny, tmp_path / name)
    a, b = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_affinity_changes_routed_experts_and_not_attention_of_the_first_block(tiny: Path, tmp_path: Path) -> None:
    from moeq.export.checkpoint import read_quantized

    config = Path("configs/gptq_text_w3.yaml")
    fit(config, tiny, tmp_path / "gptq")
    fit(config, tiny, tmp_path / "agq", "--model.affinity_power=1")
    plain, weighted = (read_quantized(tmp_path / name / "export") for name in ("gptq", "agq"))
    changed = {name for name in plain if not torch.equal(plain[name].codes_OI, weighted[name].codes_OI)}
    assert any("experts.3." in name for name in changed)
    assert any("shared_expert" in name for name in changed)
    assert not any("layers.0.self_attn" in name for name in changed)


def test_an_allocation_of_one_run_is_the_plan_of_the_next(tiny: Path, tmp_path: Path) -> None:
    from moeq.export.checkpoint import read_quantized

    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path / "first")
    path = tmp_path / "first" / "allocation.json"
    plan = json.loads(path.read_text())
    changed = "model.layers.0.mlp.experts.5.up_proj"
    plan["weights"][changed]["bits"] = 8
    path.write_text(json.dumps(plan))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n"
        f"    - {{class_path: callbacks.bit_allocation.BitAllocation, init_args: {{plan: {path}}}}}\n"
        "    - class_path: callbacks.rtn.RTN\n    - class_path: callbacks.export.Export\n"
    )
    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path / "second", "--config", str(overlay))
    bits = {name: weight.bits for name, weight in read_quantized(tmp_path / "second" / "export").items()}
    assert {name for name, value in bits.items() if value == 8} == {changed}
    assert set(bits.values()) == {3, 8}


def test_help_answers_without_importing_torch() -> None:
    code = "import sys, main; main.main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'lightning')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "fit" in done.stdout
    assert "validate" in done.stdout
