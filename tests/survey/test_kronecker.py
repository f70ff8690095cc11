"""Factors gathered block by block are sums over autograd of the whole model; where states wait changes no bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.disk.checked import read_checked
from moeq.disk.waiting import WaitingStates
from moeq.fit.factors import Factors
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe
from moeq.quant.two_sided_solve import TwoSidedSpec
from moeq.survey.fisher import observe_gradients, sampled_tokens
from moeq.survey.gradient_probe import batch_seed
from moeq.survey.kronecker import gather_factors, rank_batches
from moeq.survey.sweeps import unseen
from tests.tiny import tiny_model

# A shared expert; dense and routed blocks with q in two steps; biases and stored transposed; handed on with a gradient.
FAMILIES = ("qwen2_moe", "deepseek_v3", "gpt_oss", "zaya")
CPU, SEED = torch.device("cpu"), 5


def sequences() -> Tensor:
    return torch.randint(1, 257, (5, 12), generator=torch.Generator().manual_seed(2))


def gathered(adapter: Adapter, folder: Path, blocks: list[int], bound: int = 1 << 30) -> dict[str, Tensor]:
    """Tensors of the files of some blocks."""
    factors, waiting = Factors(folder, {"run": "this"}, TwoSidedSpec()), WaitingStates(bound, folder)
    batches = rank_batches(sequences(), 2, CPU)
    gather_factors(adapter, batches, blocks, factors, SEED, waiting, CPU, unseen)
    assert waiting.bytes_in_memory == waiting.bytes_on_disk == 0
    assert not factors.missing(blocks)
    found: dict[str, Tensor] = {}
    for block in blocks:
        found |= read_checked(folder / f"block_{block:03d}.safetensors", "")[1]
    return found


def reference_sums(adapter: Adapter) -> dict[str, Tensor]:
    """Sums of g g^T and x x^T in float64, by autograd of the whole model on one batch after another."""
    model = adapter.model
    model.get_input_embeddings().weight.requires_grad_()  # type: ignore[operator]
    sums: dict[str, Tensor] = {}
    for site in adapter.all_sites():
        for side, size in (("output", sum(site.rows)), ("input", site.in_features)):
            sums[f"{site.name}|{side}"] = torch.zeros(site.num_experts, size, size, dtype=torch.float64)
            sums[f"{site.name}|{side} tokens"] = torch.zeros(site.num_experts, dtype=torch.float64)

    def add(site: Site, side: str, expert: int, rows_NF: Tensor) -> None:
        sums[f"{site.name}|{side}"][expert] += rows_NF.double().mT @ rows_NF.double()
        sums[f"{site.name}|{side} tokens"][expert] += len(rows_NF)

    for batch, ids_BT in enumerate(sequences().split(2)):
        parts: dict[tuple[Site, int], dict[int, Tensor]] = {}

        def on_gradient(
            site: Site, expert: int, rows: slice, g_NO: Tensor, parts: dict[tuple[Site, int], dict[int, Tensor]] = parts
        ) -> None:
            parts.setdefault((site, expert), {})[rows.start] = g_NO

        with observe(adapter, adapter.all_sites(), lambda site, e, x_NI, _: add(site, "input", e, x_NI)):
            model(input_ids=ids_BT)
        with observe_gradients(adapter, adapter.all_sites(), on_gradient, None):
            logits = model(input_ids=ids_BT, use_cache=False).logits
            targets = sampled_tokens(logits.detach(), torch.Generator().manual_seed(batch_seed(SEED, batch)))
            logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().backward()
        for (site, expert), by_row in parts.items():
            add(site, "output", expert, torch.cat([by_row[start] for start in sorted(by_row)], 1))
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_those_of_autograd_of_the_whole_model(family: str, tmp_path: Path) -> None:
    adapter = Adapter(tiny_model(family))
    found = gathered(adapter, tmp_path, list(range(len(adapter.blocks))))
    expected = reference_sums(adapter)
    pools = {name: value for name, value in found.items() if name.endswith("pool")}
    assert found.keys() - pools.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    routed = [site for site in adapter.all_sites() if site.num_experts > 1]
    assert len(pools) == 2 * len(routed)
    for name, value in pools.items():
        torch.testing.assert_close(value, found[name.removesuffix(" pool")].sum(0, keepdim=True))


def test_where_states_wait_and_what_is_gathered_already_change_no_bit(tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("qwen2_moe"))
    whole = gathered(adapter, tmp_path / "whole", [0, 1])
    on_disk = gathered(adapter, tmp_path / "disk", [0, 1], bound=0)
    each = gathered(adapter, tmp_path / "each", [0]) | gathered(adapter, tmp_path / "each", [1])
    for other in (on_disk, each):
        assert other.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in other.items())


def test_what_is_not_finite_is_refused_before_it_is_written(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.get_parameter("model.layers.1.mlp.shared_expert.up_proj.weight").data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite values; load the model"):
        gathered(Adapter(model), tmp_path, [0, 1])
    assert not list(tmp_path.glob("*.safetensors"))
