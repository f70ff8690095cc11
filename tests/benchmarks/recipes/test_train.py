"""The recipe trains the second family: its experts, its parameter groups and its checkpoint."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.recipes.reference_model import save
from benchmarks.recipes.reference_model.fast_layers import linear_cross_entropy
from benchmarks.recipes.reference_model.train import ReferenceMoE
from tests.tiny import tiny_tokenizer

VOCABULARY = 264


def recipe(**settings: Any) -> ReferenceMoE:
    torch.manual_seed(0)
    return ReferenceMoE(family="mixtral", vocab_size=VOCABULARY, num_steps=3, warmup_steps=1, **settings)


def experts_and_gradients(model: Any, implementation: str, routed: tuple[Tensor, ...], grad_TD: Tensor) -> list[Tensor]:
    """Output of the experts of the last block and its gradients by input, router weights and both projections."""
    model.set_experts_implementation(implementation)
    experts = model.model.layers[-1].mlp.experts
    hidden_TD, ids_TK, weights_TK = (tensor.clone() for tensor in routed)
    leaves = [hidden_TD.requires_grad_(), weights_TK.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    out_TD = experts(hidden_TD, ids_TK, weights_TK)
    return [out_TD.detach(), *torch.autograd.grad(out_TD, leaves, grad_TD)]


@pytest.mark.parametrize(("in_bfloat16", "bound"), [(False, 1e-5), (True, 0.01)])
def test_routed_experts_of_mixtral_equal_the_eager_ones(
    generator: torch.Generator, in_bfloat16: bool, bound: float
) -> None:
    model = recipe().model
    hidden_TD, grad_TD = (torch.randn(150, 256, generator=generator) for _ in range(2))
    # The last expert gets no token at all.
    weights_TK, ids_TK = torch.rand(150, 7, generator=generator).topk(2)
    routed = (hidden_TD, ids_TK, weights_TK / weights_TK.sum(1, keepdim=True))
    expected = experts_and_gradients(model, "eager", routed, grad_TD)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        actual = experts_and_gradients(model, "routed_swiglu", routed, grad_TD)
    for ours, theirs in zip(actual, expected, strict=True):
        assert float((ours - theirs).norm()) < bound * float(theirs.norm())


@pytest.mark.parametrize(("in_bfloat16", "bound"), [(False, 1e-5), (True, 0.01)])
def test_the_loss_of_the_head_is_cross_entropy(generator: torch.Generator, in_bfloat16: bool, bound: float) -> None:
    hidden_TD = torch.randn(700, 16, generator=generator, requires_grad=True)
    head_VD = torch.randn(40, 16, generator=generator, requires_grad=True)
    target_T = torch.randint(40, (700,), generator=generator)
    loss = F.cross_entropy(hidden_TD @ head_VD.T, target_T)
    expected = [loss.detach(), *torch.autograd.grad(loss, (hidden_TD, head_VD))]
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        loss = linear_cross_entropy(hidden_TD, head_VD, target_T)
    actual = [loss.detach(), *torch.autograd.grad(loss, (hidden_TD, head_VD))]
    for ours, theirs in zip(actual, expected, strict=True):
        assert float((ours - theirs).norm()) < bound * float(theirs.norm())


@pytest.mark.parametrize(("compute_dtype", "expected"), [("float32", torch.float32), ("stored", torch.bfloat16)])
def test_products_of_a_step_have_the_dtype_that_was_asked_for(
    compute_dtype: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    module, seen = recipe(compute_dtype=compute_dtype), []
    monkeypatch.setattr(module, "log_dict", lambda *args, **options: None)
    module.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    module.training_step(torch.randint(VOCABULARY, (1, 9), generator=generator), 0).backward()
    assert seen == [expected]
    assert module.configure_optimizers()["optimizer"].product_dtype == expected


def test_router_logits_are_those_before_the_softmax(generator: torch.Generator) -> None:
    model = recipe().model
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0].flatten(0, 1)}))
    ids_BT = torch.randint(VOCABULARY, (2, 16), generator=generator)
    logits = model.model(ids_BT, output_router_logits=True).router_logits
    assert len(logits) == len(model.model.layers)
    for i, block in enumerate(model.model.layers):
        torch.testing.assert_close(logits[i], inputs[i] @ block.mlp.gate.weight.T)


def test_routers_are_stepped_by_adamw_and_fused_projections_as_two_matrices() -> None:
    module = recipe()
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    groups = module.configure_optimizers()["optimizer"].param_groups
    by_splits = {group["num_splits"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}
    assert all(name.endswith("mlp.experts.gate_up_proj") for name in by_splits[2])
    assert all(name.endswith(("_proj.weight", "mlp.experts.down_proj")) for name in by_splits[1])
    assert all(name.endswith(("norm.weight", "mlp.gate.weight", "embed_tokens.weight")) for name in by_splits[0])
    assert [len(by_splits[splits]) for splits in (0, 1, 2)] == [4 * 3 + 2, 4 * 5, 4]


def test_two_steps_learn_and_their_checkpoint_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    module = recipe()
    windows_N1 = torch.randint(VOCABULARY, (4, 33), generator=generator)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    losses: list[float] = []
    monkeypatch.setattr(module, "log_dict", lambda values, **_: losses.append(float(values["train/loss"].detach())))
    trainer.fit(module, DataLoader(windows_N1.repeat(2, 1), batch_size=4))
    assert len(losses) == 2
    assert losses[1] < losses[0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["--checkpoint", "last.ckpt", "--tokenizer", "tokenizer", "--output", "model"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["save.py", *arguments])
    save.main()
    model = AutoModelForCausalLM.from_pretrained("model")
    assert model.config.architectures == ["MixtralForCausalLM"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, module.model.get_parameter(name).bfloat16()), name
