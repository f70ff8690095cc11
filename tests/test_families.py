"""Every family goes through observation, GPTQ with mixed bits, both exports and a reload in a fresh process.

A run in memory is what most of these tests look at; a streamed one must have its bytes.
"""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig

from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from datamodules.calibration import CalibrationDataModule
from moeq.allocation.plan import uniform_plan
from moeq.checkpoint.loading import load_model
from moeq.disk.waiting import WaitingStates
from moeq.export.moeq_format import read_quantized
from moeq.fit.activations import ActivationStore
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import capture_calls
from moeq.models.experts import activate, project_down, project_in
from moeq.models.not_quantized import is_router
from moeq.models.observe import observe
from moeq.module import MoEQuantModule
from tests.families import FAMILIES, OTHER_TASKS, REFUSED, REFUSED_WRAPPERS, SUPPORTED, WRAPPERS
from tests.processes import call
from tests.same_bytes import assert_no_block_stayed, assert_same_bytes
from tests.test_main import fit
from tests.tiny import save_tiny, tiny_model

# All families are quantized before the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WIDTHS = (2, 3, 4, 8)
PROBE = torch.arange(1, 60).reshape(1, -1)


def opened(folder: Path | str) -> nn.Module:
    """A folder as the class that its configuration names opens it."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    model: nn.Module = getattr(transformers, name).from_pretrained(folder)
    return model.eval()


def reload(folders: list[Path]) -> None:
    """Logits of packed exports, beside them; the process has made none of them."""
    for folder in folders:
        model = opened(folder / "export")
        # Parameters mapped from the file are not aligned, which may change the order of float32 sums.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():  # with gradients, torch may choose other kernels (for inkling's convolutions)
            torch.save(model(PROBE, use_cache=False).logits, folder.parent / "reloaded.pt")


class MixedBits(pl.Callback):
    """Weights get 2, 3, 4 and 8 bits in turn, also the experts of one block."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)

        plan = uniform_plan(pl_module.weight_shapes(), pl_module.grid)
        pl_module.run.plan = {
            name: replace(grid, bits=WIDTHS[index % len(WIDTHS)]) for index, (name, grid) in enumerate(plan.items())
        }


class RandomIds(CalibrationDataModule):
    """Four sequences of 24 random tokens, in two batches."""

    def __init__(self) -> None:
        super().__init__(2)

    def make_ids(self) -> Tensor:
        return torch.randint(1, 257, (4, 24), generator=torch.Generator().manual_seed(1))


@dataclass
class Quantized:
    """One run: its folder, the original model, and the module after the run."""

    folder: Path
    original: nn.Module
    module: MoEQuantModule


class Runs(dict[str, Quantized]):
    """Runs by family; a failed one raises its error when it is asked for."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}

    def __missing__(self, family: str) -> Quantized:
        raise self.errors[family]


def quantize(source: Path, folder: Path, placement: str) -> MoEQuantModule:
    """The module of a run whose folder this is."""
    module = MoEQuantModule(str(source), group_size=16, placement=placement)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without.*logger.*|.*num_training_batches.*")
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, max_epochs=1,
            callbacks=[MixedBits(), HessianCalibration(), GPTQ(), Export()],
        )  # fmt: skip
        trainer.fit(module, datamodule=RandomIds())
    return module


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Quantized]]:
    """Runs by family; then all packed exports reloaded in one fresh process."""
    runs = Runs()
    for family in SUPPORTED:
        try:
            folder = tmp_path_factory.mktemp(family)
            source = save_tiny(family, folder / "model")
            module = quantize(source, folder / "memory", "memory")
            runs[family] = Quantized(folder / "memory", load_model(str(source)), module)
        except Exception as error:  # one family must not hide the others; its own tests raise this
            runs.errors[family] = error
    done = call(reload, [run.folder for run in runs.values()])
    assert done.returncode == 0, done.stderr
    gc.freeze()  # as in conftest.py: the code of all families, and their models for as long as they are needed
    yield runs
    gc.unfreeze()


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, but for the order of sums that MKL leaves open below AVX-512."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0.0, atol=1e-5 * float(other.abs().max()))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model(PROBE, use_cache=False).logits


def in_dtypes_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with each tensor in the dtype in which transformers alone opens it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(other.get_parameter_or_buffer(name).dtype)
    return model


@pytest.mark.parametrize("family", SUPPORTED)
def test_reloaded_logits_equal_the_dense_export_and_the_model_in_memory(
    family: str, quantized: dict[str, Quantized]
) -> None:
    run = quantized[family]
    reloaded = torch.load(run.folder.parent / "reloaded.pt")
    assert reloaded.isfinite().all()
    dense = opened(run.folder / "dense")
    assert same(reloaded, logits(dense))
    assert same(reloaded, logits(in_dtypes_of(run.module.model, dense)))
    assert not same(reloaded, logits(run.original))


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_fit_that_streams_has_the_bytes_of_one_in_memory(
    family: str, quantized: dict[str, Quantized], tmp_path: Path
) -> None:
    memory = quantized[family].folder
    streamed = quantize(memory.parent / "model", tmp_path / "stream", "stream")
    assert_same_bytes(memory, tmp_path / "stream")
    assert_no_block_stayed(streamed)


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_weight_has_the_bits_of_the_plan_and_no_expert_is_lost(
    family: str, quantized: dict[str, Quantized]
) -> None:
    run = quantized[family]
    weights, plan = read_quantized(run.folder / "export"), run.module.run.plan
    assert {name: weight.bits for name, weight in weights.items()} == {name: grid.bits for name, grid in plan.items()}
    before, after = Adapter(run.original), Adapter(run.module.model)
    for site in before.all_sites():
        if site.kind == "routed":
            assert {weights[name].bits for name in site.weight_names()} == set(WIDTHS), site.name
        for name in site.weight_names():
            assert weights[name].codes_OI.unique().numel() > 2, f"{name} is constant"
        old_EOI, new_EOI = before.get_weight(site).float(), after.get_weight(site).float()
        error_E = (new_EOI - old_EOI).flatten(1).norm(dim=1) / old_EOI.flatten(1).norm(dim=1)
        assert (error_E > 0).all(), site.name
        assert (error_E < 0.8).all(), site.name


@pytest.mark.parametrize("family", SUPPORTED)
def test_everything_but_the_weights_of_sites_stays_as_it_is(family: str, quantized: dict[str, Quantized]) -> None:
    run = quantized[family]
    changed = set()
    for site in Adapter(run.original).all_sites():
        changed |= {
            f"{path}.{leaf}" for path in site.modules for leaf in ("weight", "gate_up_proj", "up_proj", "down_proj")
        }
    dense, kept = opened(run.folder / "dense").state_dict(), 0
    for name, tensor in run.original.state_dict().items():
        if name not in changed:
            kept += 1
            assert torch.equal(tensor, dense[name]), name
    assert kept > 5


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_linear_is_quantized_or_a_router_or_reported_with_a_reason(family: str) -> None:
    adapter = Adapter(tiny_model(family))
    covered = {path for site in adapter.all_sites() for path in site.modules}
    kept = {fallback.weight: fallback.detail for fallback in adapter.kept()}
    for name, module in adapter.blocks.named_modules(prefix=adapter.block_prefix):
        if isinstance(module, nn.Linear):
            assert (name in covered) + is_router(name, module) + (name in kept) == 1, name
    assert all(
        adapter.expert_modules().keys() & {site.modules[0]} for site in adapter.all_sites() if site.kind == "routed"
    )
    assert all(kept.values())


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_observed_rows_and_affinities_give_back_the_output_of_the_experts(family: str) -> None:
    model = tiny_model(family)
    adapter, rows, calls = Adapter(model), {}, {}

    def on_rows(site: Site, expert: int, x: Tensor, affinity: Tensor | None) -> None:
        rows.setdefault(site.name, {})[expert] = (x, torch.ones(len(x)) if affinity is None else affinity)

    def on_call(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = (args[1], output)

    ids = torch.randint(1, 257, (2, 13))
    before = model(ids, use_cache=False).logits
    for module in adapter.expert_modules().values():
        module.register_forward_hook(on_call)
    with observe(adapter, adapter.all_sites(), on_rows):
        torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=1e-3, atol=1e-4)
    assert set(rows) == {site.name for site in adapter.all_sites()}
    for site in adapter.all_sites():
        if site.kind != "routed":
            assert len(rows[site.name][0][0]) == ids.numel()
            continue
        module = model.get_submodule(site.modules[0])
        chosen, output = calls[module]
        assert sum(len(x) for x, _ in rows[site.name].values()) == int((chosen < site.num_experts).sum())
        if site.stage == "mlp_down":
            parts = [(project_down(module, e, x), affinity) for e, (x, affinity) in rows[site.name].items()]
            total = sum((affinity[:, None] * y).sum(0) for y, affinity in parts)
            torch.testing.assert_close(total, output.sum(0), rtol=1e-3, atol=1e-4)
            into = next(s for s in adapter.all_sites() if s.modules == site.modules and s.stage == "mlp_in")
            for expert, (x, affinity) in rows[into.name].items():
                inner, same_affinity = rows[site.name][expert]
                torch.testing.assert_close(activate(module, project_in(module, expert, x)), inner)
                assert torch.equal(affinity, same_affinity)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_blocks_run_one_by_one_give_what_the_whole_model_gives(family: str) -> None:
    model = tiny_model(family)
    blocks, ids, seen = Adapter(model).blocks, torch.randint(1, 257, (2, 13)), []
    with blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output)):
        model(ids, use_cache=False)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    store = ActivationStore(WaitingStates(1 << 30, Path()))
    for number, block in enumerate(blocks):  # a new batch of arguments for every block, as in a run
        store.advance(0, number, capture_calls(model, blocks, {"input_ids": ids}, last=number)[-1], block)
    torch.testing.assert_close(store.at(0, "cpu"), expected)


@pytest.mark.parametrize("family", sorted({**REFUSED, **REFUSED_WRAPPERS}))
def test_a_family_that_cannot_work_is_refused_with_the_reason(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    with pytest.raises(ValueError, match={**REFUSED, **REFUSED_WRAPPERS}[family][1]):
        Adapter(tiny_model(family))


@pytest.mark.skipif(transformers.__version__.split(".")[:2] != ["5", "23"], reason="other versions have other families")
def test_every_family_of_transformers_with_the_interface_is_tested_or_refused() -> None:
    folder = Path(transformers.__file__).parent / "models"
    known = {*FAMILIES, *REFUSED, *WRAPPERS, *REFUSED_WRAPPERS, *OTHER_TASKS}
    sources = [path for path in folder.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()]
    assert len(sources) > 50
    unknown = [path.parent.name for path in sources if not {path.parent.name, f"{path.parent.name}_text"} & known]
    assert not unknown


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_command_line_quantizes_with_self_sampled_data(family: str, tmp_path: Path) -> None:
    fit(Path("configs/moequant_w3.yaml"), save_tiny(family, tmp_path / "model"), tmp_path / "run")
    for folder in ("export", "dense"):
        model = opened(tmp_path / "run" / folder)
        assert model(PROBE).logits.isfinite().all()
