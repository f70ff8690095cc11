"""The backward pass block by block is that of the whole model; the seeds of the tokens that it scores."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.survey import gradient_probe
from moeq.survey.fisher import add_squares, empty_gradients, observe_gradients, sampled_tokens
from moeq.survey.gradient_probe import GradientProbe, batch_seed
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, sweep_forward, unseen
from tests.tiny import tiny_model

# One of each kind: a shared expert, none, dense and routed blocks, biases, linear attention, something that is handed
# on and has a gradient (zaya) or has none, a cap on the logits and inputs per block, multipliers, blocks of one mixer.
FAMILIES = (
    "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "zaya", "glm_moe_dsa", "gemma4_text", "granitemoe",
    "nemotron_h",
)  # fmt: skip


# Taken from ``printf 7,12 | sha256sum``.
@pytest.mark.parametrize(
    ("seed", "batch", "expected"),
    [
        (0, 0, 0x7334821429A99561),
        (0, 1, 0x83B97B859AA5F81B - 2**63),
        (7, 12, 0x49C11943DC5B88D7),
        (-1, 0, 0x7C1C7922A1C30CB2),
    ],
)
def test_the_seed_of_a_batch_is_the_documented_function_of_seed_and_number(
    seed: int, batch: int, expected: int
) -> None:
    assert batch_seed(seed, batch) == expected


def padded_batches() -> dict[int, Inputs]:
    """Batches 0 and 2 of a set, as a rank may have them; one row of the second is padded."""
    ids = torch.randint(1, 257, (2, 3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids[1])
    mask[1, 7:] = 0
    return {0: {"input_ids": ids[0]}, 2: {"input_ids": ids[1], "attention_mask": mask}}


def probe_of(adapter: Adapter, spec: SurveySpec, waiting: WaitingStates) -> GradientProbe:
    """A probe that has found its gradients."""
    probe, states = GradientProbe(adapter, spec, waiting, torch.device("cpu")), BlockStates(waiting)
    sweep_forward(adapter, padded_batches(), states, unseen)
    probe.find(padded_batches(), states, unseen)
    states.clear()
    return probe


def reference_score(model: nn.Module, inputs: Inputs, seed: int | None) -> Tensor:
    """Summed log-likelihood, in the ordinary way, of sampled tokens or (None) of the next ones."""
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    if seed is None:
        logits, targets, mask = logits[:, :-1], inputs["input_ids"][:, 1:], mask[:, 1:]
    else:
        targets = sampled_tokens(logits.detach(), torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)[mask].sum()


def reference_gradients(model: nn.Module, adapter: Adapter, inputs: Inputs) -> list[Tensor]:
    """Gradients of the data's log-likelihood at the outputs of all blocks, by autograd of the whole model."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, made: outputs.append(made[0] if type(made) is tuple else made))
        for block in adapter.blocks
    ]
    gradients = torch.autograd.grad(reference_score(model, inputs, None), outputs)
    for hook in hooks:
        hook.remove()
    return list(gradients)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **({"num_hidden_layers": 3, "layer_types": ["hybrid"] * 3} if family == "zaya" else {}))
    adapter = Adapter(model)
    probe = probe_of(adapter, SurveySpec(costs=("fisher", "gemq"), seed=7), WaitingStates(1 << 30, tmp_path))
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = {site.name: empty_gradients(site, "cpu") for site in adapter.all_sites()}
    model.get_input_embeddings().weight.requires_grad_()
    for batch, inputs in padded_batches().items():
        mask = inputs.get("attention_mask")
        keep = None if mask is None else mask.flatten().bool()
        with observe_gradients(adapter, adapter.all_sites(), add_squares(expected), keep):
            reference_score(model, inputs, batch_seed(7, batch)).backward()
        for block, gradient in enumerate(reference_gradients(model, adapter, inputs)):
            at_output = probe.at_output(batch, block)
            assert at_output is not None
            close(at_output, gradient.flatten(0, -2))
            assert probe.at_output(batch, block) is None  # kept no longer
    assert probe.states.keys() == expected.keys()
    for name, state in probe.states.items():
        assert torch.equal(state.num_tokens_E, expected[name].num_tokens_E), name
        close(state.sum_EO, expected[name].sum_EO)


def test_gradients_reach_earlier_blocks_through_what_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, whole, sums = Adapter(tiny_model("zaya")), gradient_probe.pull_back, []
    for is_cut in (False, True):
        if is_cut:
            monkeypatch.setattr(gradient_probe, "pull_back", lambda *args, **kwargs: (whole(*args, **kwargs)[0], None))
        states = probe_of(adapter, SurveySpec(), WaitingStates(1 << 30, tmp_path)).states
        sums.append(torch.cat([state.sum_EO.flatten() for state in states.values()]))
    assert not torch.allclose(*sums, rtol=1e-3)


def test_where_gradients_wait_changes_no_bit_and_they_leave_when_they_are_taken(tmp_path: Path) -> None:
    adapter, spec, found = Adapter(tiny_model("zaya")), SurveySpec(costs=("fisher", "gemq")), []
    for bound in (0, 20_000, 1 << 30):
        waiting = WaitingStates(bound, tmp_path)
        probe = probe_of(adapter, spec, waiting)
        outputs = [probe.at_output(batch, block) for batch in padded_batches() for block in range(2)]
        assert waiting.bytes_in_memory == waiting.bytes_on_disk == 0
        found.append([*outputs, *(state.sum_EO for state in probe.states.values())])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_every_batch_is_scored_on_tokens_of_its_own_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def seen(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
        seeds.append(generator.initial_seed())
        return sampled_tokens(logits_BTV, generator)

    monkeypatch.setattr(gradient_probe, "sampled_tokens", seen)
    probe_of(Adapter(tiny_model("qwen2_moe")), SurveySpec(seed=7), WaitingStates(1 << 30, tmp_path))
    assert seeds == [batch_seed(7, 0)] * 3 + [batch_seed(7, 2)] * 3


def test_tokens_drawn_sequence_by_sequence_are_those_drawn_for_the_batch() -> None:
    logits, generator = torch.randn(3, 12, 50), torch.Generator().manual_seed(1)
    rows = [sampled_tokens(row, generator) for row in logits.split(1)]
    assert torch.equal(torch.cat(rows), sampled_tokens(logits, torch.Generator().manual_seed(1)))
