"""Every configuration runs, through the command line, on tiny models."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from main import main
from moeq.quant.learned import LearnedSpec
from moeq.report.results import read_results
from moeq.survey.kronecker_spec import KroneckerSpec
from moeq.tasks.registry import GROUPS, expand, task_names
from moeq.tuning.tuning_spec import TuningSpec
from tests.evaluation_data import write_evaluation_data
from tests.tiny import save_tiny
from tests.two_level import save_wide

CONFIGS = sorted(Path("configs").glob("*.yaml"))
EVAL_CONFIGS = [path for path in CONFIGS if "eval" in path.stem]
FIT_CONFIGS = [path for path in CONFIGS if path not in EVAL_CONFIGS]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
# A twentieth of the text that configurations name, all of which is turned into tokens.
SHORT_TEXT = "assets/reference-moe/texts/arithmetic.txt"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose window holds what the tasks ask of it."""
    return save_tiny(
        "qwen2_moe", tmp_path_factory.mktemp("reader") / "model", max_position_embeddings=2048, num_hidden_layers=1
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("evaluation") / "data")


def small_data(config: Path) -> list[str]:
    """Overrides that make the data of a configuration tiny; which there are depends on its datamodule."""
    data = yaml.safe_load(config.read_text())["data"]
    number = {"EBSSDataModule": "num_sequences", "TextDataModule": "num_windows"}[data["class_path"].rpartition(".")[2]]
    return [
        f"--data.length={min(24, data['init_args']['length'])}",
        f"--data.{number}={min(4, data['init_args'][number])}",
        *texts(config, SHORT_TEXT),
    ]


def texts(config: Path, other: str | None = None) -> list[str]:
    """Options that name the texts of a configuration, or another text in place of them."""
    given = yaml.safe_load(config.read_text())["data"]["init_args"]
    return [f"--data.{name}={other or given[name]}" for name in ("path", "compare_text") if given.get(name)]


def on_two_levels(config: Path) -> bool:
    """Whether a configuration asks for a grid whose groups are its own."""
    return yaml.safe_load(config.read_text())["model"].get("grid", "full_range") != "full_range"


def small_groups(config: Path) -> list[str]:
    """Groups that fit into the rows of a tiny model; those below 32 are none that runtimes read."""
    if on_two_levels(config):
        return []
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    options = [each.get("init_args", {}) for each in callbacks]
    served = any(each.get("runtime", "research") != "research" for each in options)
    served |= any(set(each.get("formats", ())) - {"moeq", "dense"} for each in options)
    return [f"--model.group_size={32 if served else 16}"]


def fit_and_draw(config: Path, model: Path, folder: Path, *options: str) -> None:
    """Run fit."""
    with (
        patch.object(TuningSpec, "__post_init__", few_tokens),
        patch.object(KroneckerSpec, "__post_init__", few_tokens),
        patch.object(LearnedSpec, "__post_init__", few_steps),
    ):
        main(
            [
                "fit", "--config", str(config), f"--model.name={model}", *small_groups(config),
                f"--trainer.default_root_dir={folder}", *small_data(config), *QUIET, *options,
            ]
        )  # fmt: skip


def few_tokens(spec: TuningSpec | KroneckerSpec) -> None:
    """Few tokens for what the original writes beside its calibration data, whatever a configuration asks for."""
    for name, value in {"num_sequences": 8, "length": 16, "batch_size": 2}.items():
        object.__setattr__(spec, name, value)


def few_steps(spec: LearnedSpec) -> None:
    """Few steps of learned rounding, whatever a configuration asks for."""
    object.__setattr__(spec, "num_steps", 4)


def fit(config: Path, model: Path, folder: Path, *options: str) -> None:
    """Run fit without its figures, which take a third of the time on a tiny model."""
    with patch("callbacks.figures._drawings", return_value={}):
        fit_and_draw(config, model, folder, *options)


def validate(config: Path, model: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run validate; what it wrote to results.json."""
    names = [f"--model.name={model}", f"--trainer.default_root_dir={folder}"]
    main(["validate", "--config", str(config), *names, *QUIET, *options])
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def as_scalars(results: dict[str, Any]) -> dict[str, float]:
    """Values of results.json by the names that TensorBoard has for them."""
    found = {}
    for task in results["tasks"]:
        for group, metrics in {"": task["metrics"], **task["groups"]}.items():
            for metric, measured in metrics.items():
                name = "/".join(part for part in (task["task"], group, metric) if part)
                found[name] = measured["value"]
                if measured["stderr"] is not None:
                    found[f"{name}_stderr"] = measured["stderr"]
    return found


def logged(folder: Path) -> dict[str, float]:
    """The last value of every scalar in TensorBoard's files, but those that Lightning adds."""
    events = EventAccumulator(str(folder / "lightning_logs/version_0"))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if "/" in tag}


# What an edit needs runs the short ones.
LONG_CONFIGS = (
    "moequant_best_w2", "moequant_best_w3", "moequant_best_w4", "moequant_learned_w3", "moequant_awq_w4",
    "quantmoe_predictor", "quantmoe_outlier",
    "gguf_mixed", "mlx_mixed", "gguf_q3k",
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG_CONFIGS else [])
        for path in FIT_CONFIGS
    ],
)
def test_fit_config_quantizes_exports_and_records(config: Path, tiny: Path, wide: Path, tmp_path: Path) -> None:
    model = wide if on_two_levels(config) else tiny
    fit_and_draw(config, model, tmp_path, *texts(config))
    steps = [step["class_path"] for step in yaml.safe_load(config.read_text())["trainer"]["callbacks"]]
    assert (tmp_path / "figures").is_dir() == any(step.endswith("Figures") for step in steps)
    for name in ("config.yaml", "manifest.json", "allocation.json", "errors.csv", "fallbacks.json", "summary.md"):
        assert (tmp_path / name).is_file(), name
    verification = json.loads((tmp_path / "verification.json").read_text())
    assert verification["checkpoint"]["logits_equal"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    original = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(1, 30)[None]
    difference = (reloaded(ids).logits - original(ids).logits).abs().max()
    assert 0 < difference < original(ids).logits.abs().max()


@pytest.mark.parametrize("config", EVAL_CONFIGS, ids=lambda path: path.stem)
def test_eval_config_writes_every_metric_with_its_error(config: Path, reader: Path, data: Path, tmp_path: Path) -> None:
    options = [f"--data.data_dir={data}", "--data.window_length=64", "--data.execute_code=true"]
    if config.stem == "eval":
        options.append(f"--model.reference={reader}")
    if config.stem == "eval_moequant":
        options.append("--data.num_documents=4")
    results = validate(config, reader, tmp_path, *options)
    domains = ["prose", "python", "gsm8k", "arithmetic"] if config.stem == "eval" else []
    names = [
        *domains,
        *(task.name for task in expand(yaml.safe_load(config.read_text())["data"]["init_args"]["tasks"])),
    ]
    assert [task["task"] for task in results["tasks"]] == names
    for task in results["tasks"]:
        assert {"kl", "top1_agreement", "router_agreement"} <= task["metrics"].keys() or config.stem != "eval"
        for metric, measured in task["metrics"].items():
            assert math.isfinite(measured["value"]), (task["task"], metric)
            assert math.isfinite(measured["stderr"]), (task["task"], metric)
            assert measured["num_documents"] == task["num_documents"] >= 2
        assert bool(task["protections"]) == (task["kind"] == "Code")
        assert len(task["sha256"]) == 64
        assert Path(task["origin"]).is_file()
    scalars = as_scalars(results)
    assert logged(tmp_path) == {name: pytest.approx(value, rel=1e-6) for name, value in scalars.items()}
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} " in table for name in names)
    groups = {f"{name}_groups" for name in names if "mmlu" in name}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"tasks", *groups}
    assert (tmp_path / "config_validate.yaml").is_file()


@pytest.mark.slow
def test_every_task_of_the_catalog_that_no_configuration_names_runs(reader: Path, data: Path, tmp_path: Path) -> None:
    configured = {name for group in GROUPS.values() for name in group}
    names = [name for name in task_names() if name not in configured]
    options = [f"--data.tasks=[{','.join(names)}]", "--data.num_documents=2", "--data.execute_code=true"]
    results = validate(Path("configs/eval_moequant.yaml"), reader, tmp_path, f"--data.data_dir={data}", *options)
    assert [task["task"] for task in results["tasks"]] == names
    assert all(task["num_documents"] == 2 for task in results["tasks"])
    (row,) = results["rows"]
    assert row["partial"]
    assert row["perplexity"].keys() | row["accuracy"].keys() | {"sums"} == set(names)


def test_an_export_is_compared_with_its_original(tiny: Path, data: Path, tmp_path: Path) -> None:
    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path)
    options = [f"--model.reference={tiny}", f"--data.data_dir={data}", "--data.window_length=64"]
    validate(Path("configs/eval.yaml"), tmp_path / "export", tmp_path / "eval", *options)
    (row,) = read_results(tmp_path / "eval" / "results.json")
    assert row.method == "RTN"
    assert row.bits == 3
    assert 3 < row.average_bits < 5
    assert row.kl_mean is not None
    assert row.kl_worst is not None
    assert 0 < row.kl_mean < row.kl_worst
    assert set(row.perplexity) == {"prose", "python", "gsm8k", "arithmetic"}
    assert row.router_agreement is not None
    assert 0 < row.router_agreement < 1
    assert row.exact_match == 0


def test_the_original_agrees_with_itself(tiny: Path, data: Path, tmp_path: Path) -> None:
    options = [f"--model.reference={tiny}", f"--data.data_dir={data}", "--data.window_length=64"]
    validate(Path("configs/eval.yaml"), tiny, tmp_path, *options)
    (row,) = read_results(tmp_path / "results.json")
    assert row.kl_mean == pytest.approx(0, abs=1e-6)
    assert row.top1_agreement == row.router_agreement == 1
    assert row.average_bits == 16


@pytest.mark.slow
def test_the_same_seed_gives_the_same_export(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(Path("configs/moequant_w3.yaml"), tiny, tmp_path / name)
    a, b = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.slow
def test_affinity_changes_routed_experts_and_not_attention_of_the_first_block(tiny: Path, tmp_path: Path) -> None:
    from moeq.export.moeq_format import read_quantized

    config = Path("configs/gptq_text_w3.yaml")
    fit(config, tiny, tmp_path / "gptq")
    fit(config, tiny, tmp_path / "agq", "--model.affinity_power=1")
    plain, weighted = (read_quantized(tmp_path / name / "export") for name in ("gptq", "agq"))
    changed = {name for name in plain if not torch.equal(plain[name].codes_OI, weighted[name].codes_OI)}
    assert any("experts.3." in name for name in changed)
    assert any("shared_expert" in name for name in changed)
    assert not any("layers.0.self_attn" in name for name in changed)


def test_an_allocation_of_one_run_is_the_plan_of_the_next(tiny: Path, tmp_path: Path) -> None:
    from moeq.export.moeq_format import read_quantized

    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path / "first")
    path = tmp_path / "first" / "allocation.json"
    plan = json.loads(path.read_text())
    changed = "model.layers.0.mlp.experts.5.up_proj"
    plan["weights"][changed]["bits"] = 8
    path.write_text(json.dumps(plan))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n"
        f"    - {{class_path: BitAllocation, init_args: {{plan: {path}}}}}\n"
        "    - class_path: RTN\n    - class_path: Export\n"
    )
    fit(Path("configs/rtn_w3.yaml"), tiny, tmp_path / "second", "--config", str(overlay))
    bits = {name: weight.bits for name, weight in read_quantized(tmp_path / "second" / "export").items()}
    assert {name for name, value in bits.items() if value == 8} == {changed}
    assert set(bits.values()) == {3, 8}
