"""Plans measured on the assembled model, their slopes, and what is remembered: against whole forward passes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.checkpoint.loading import load_model
from moeq.checkpoint.stream import open_stream
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter, Site
from moeq.quant.spec import GridSpec
from moeq.survey.candidates import Candidates, Plan
from moeq.survey.judge import SurveyJudge, open_judge
from moeq.survey.remembered import RememberingJudge
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from moeq.survey.sweeps import Inputs
from tests.tiny import save_tiny, tiny_model

GRID = GridSpec(4, 16, clip_search=False)
SPEC = SurveySpec(costs=("fisher",), choices=(Choice(2, 16), Choice(4, 64)), grid=GRID, num_gradient_batches=1)


def ids_NT() -> Tensor:
    return torch.randint(1, 257, (6, 10), generator=torch.Generator().manual_seed(3))


def apart() -> dict[int, Inputs]:
    """Two batches, one row of the first padded."""
    first, second = ids_NT()[2:].split(2)
    mask = torch.ones_like(first)
    mask[1, 6:] = 0
    return {4: {"input_ids": first, "attention_mask": mask}, 5: {"input_ids": second}}


def surveyed(adapter: Adapter, waiting: WaitingStates) -> tuple[SurveyJudge, Candidates]:
    """A judge of a model, and its candidates."""
    judge = open_judge(adapter, SPEC, apart(), waiting)
    survey_model(adapter.model, ids_NT()[:2].split(1), SPEC, adapter.residency, judge=judge)
    return judge, judge.candidates


def some_plans(adapter: Adapter) -> list[Plan]:
    """Three: mixed, one that differs in the last block alone, and one that leaves some weights as they are."""
    names = [(site, name) for site in adapter.all_sites() for name in site.weight_names()]
    mixed = {}
    for index, (site, name) in enumerate(names):
        fitting = SPEC.choices_of(site)
        mixed[name] = fitting[index % len(fitting)].grid(GRID)
    last = mixed | {names[-1][1]: SPEC.choices_of(names[-1][0])[0].grid(GRID)}
    return [mixed, last, {name: grid for name, grid in mixed.items() if "self_attn" not in name}]


def weights_of(site: Site, plan: Plan, original_EOI: Tensor, candidates: Candidates) -> Tensor:
    """Row by row, the weights that a plan gives a site."""
    stacks = []
    for expert in range(site.num_experts):
        parts = []
        for leaf, part_OI in zip(site.leaves, original_EOI[expert].split(site.rows), strict=True):
            name = site.weight_name(expert, leaf)
            parts.append(candidates.read(name, Choice.of(plan[name])) if name in plan else part_OI)
        stacks.append(torch.cat(parts))
    return torch.stack(stacks)


def reference_kl(adapter: Adapter, plan: Plan, candidates: Candidates) -> Tensor:
    """Nats per token by whole forward passes; the gradients of the weights are left in the model's parameters."""
    model, originals = adapter.model, {site: adapter.get_weight(site) for site in adapter.all_sites()}
    masks = {
        n: inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool() for n, inputs in apart().items()
    }
    num_tokens, total = sum(int(mask.sum()) for mask in masks.values()), torch.zeros((), dtype=torch.float64)
    for number, inputs in apart().items():
        with torch.no_grad():
            for site, weight in originals.items():
                adapter.set_weight(site, weight)
            reference = model(**inputs).logits.double().log_softmax(-1)
            for site, weight in originals.items():
                adapter.set_weight(site, weights_of(site, plan, weight, candidates))
        changed = model(**inputs).logits.double().log_softmax(-1)
        kl = (reference.exp() * (reference - changed)).sum(-1)[masks[number]].sum() / num_tokens
        if kl.requires_grad:
            kl.backward()
        total += kl.detach()
    with torch.no_grad():
        for site, weight in originals.items():
            adapter.set_weight(site, weight)
    return total


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "zaya"])
def test_plans_of_one_sweep_and_slopes_of_two_are_those_of_whole_models(family: str, tmp_path: Path) -> None:
    adapter, waiting = Adapter(tiny_model(family)), WaitingStates(10_000, tmp_path)
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    judge, candidates = surveyed(adapter, waiting)
    plans = some_plans(adapter)
    expected = [float(reference_kl(adapter, plan, candidates)) for plan in plans]
    waits = waiting.bytes_in_memory + waiting.bytes_on_disk
    assert judge.measure(plans) == pytest.approx(expected, rel=1e-4)
    slopes = [judge.slopes(plan) for plan in (plans[0], plans[2])]
    # What the original model's head reads of 4 sequences, in float32; nothing of any plan.
    hidden_size = before["model.embed_tokens.weight"].shape[1]
    assert waiting.bytes_in_memory + waiting.bytes_on_disk - waits == 4 * 10 * hidden_size * 4
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    adapter.model.requires_grad_(True)
    for plan, found in zip((plans[0], plans[2]), slopes, strict=True):
        adapter.model.zero_grad()
        reference_kl(adapter, plan, candidates)
        gradients = {name: value.grad for name, value in adapter.model.named_parameters() if value.grad is not None}
        assert found.keys() == plan.keys()
        for site in adapter.all_sites():
            zero_EOI = torch.zeros_like(adapter.get_weight(site))
            for name, choice in ((n, c) for n in site.weight_names() if n in plan for c in SPEC.choices_of(site)):
                now = weights_of(site, {name: plan[name]}, zero_EOI, candidates)
                change = weights_of(site, {name: choice.grid(GRID)}, zero_EOI, candidates) - now
                parts = adapter.parameters_of(site, change).items()
                slope = sum(float((gradients[n] * part).sum()) for n, part in parts if n in gradients)
                assert found[name][choice] == pytest.approx(slope, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("family", ["qwen2_moe"])
def test_a_streamed_model_is_judged_to_the_last_bit_as_one_in_memory(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    in_memory = Adapter(load_model(str(folder), "auto", "float32", "cpu"))
    model, stream = open_stream(folder, None, lambda _: torch.float32)
    streamed = Adapter(model, stream)
    found = []
    for adapter, bound in ((in_memory, 1 << 30), (streamed, 0)):
        judge, _ = surveyed(adapter, WaitingStates(bound, tmp_path))
        plans = some_plans(adapter)
        loads = stream.num_loads
        found.append((judge.measure(plans), judge.slopes(plans[0])))
    assert found[0] == found[1]
    # The original once, all plans once, one plan again and back: not for every plan.
    assert stream.num_loads - loads == 4 * len(stream.blocks)


class Counting:
    """A judge that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        self.asked += [f"kl {plan['w'].bits}" for plan in plans]
        return [1 / plan["w"].bits for plan in plans]

    def slopes(self, plan: Plan) -> CostTable:
        self.asked.append(f"slopes {plan['w'].bits}")
        return {"w": {Choice(2, 16): 0.125, Choice(3): -1 / 3}}


def test_a_search_that_goes_on_measures_nothing_again_unless_the_survey_is_another(tmp_path: Path) -> None:
    two, three = {"w": GridSpec(2, 16)}, {"w": GridSpec(3)}
    path, first, second, third = tmp_path / "search.json", Counting(), Counting(), Counting()
    judge = RememberingJudge(first, path, "mark")
    answers = judge.measure([two]), judge.measure([three, two]), judge.slopes(two)
    assert first.asked == ["kl 2", "kl 3", "slopes 2"]
    again = RememberingJudge(second, path, "mark")
    assert (again.measure([two]), again.measure([three, two]), again.slopes(two)) == answers
    assert second.asked == []
    RememberingJudge(third, path, "another mark").measure([two])
    assert third.asked == ["kl 2"]
    assert json.loads(path.read_text())["mark"] == "another mark"
