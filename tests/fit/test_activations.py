from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeq.disk.waiting import WaitingStates
from moeq.fit.activations import ActivationStore, BlockBatches
from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls, run_block, until_reached
from moeq.models.observe import observe
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(family: str, padded: bool) -> None:
    model = tiny_model(family)
    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
    blocks = Adapter(model).blocks
    calls = capture_calls(model, blocks, inputs)
    hidden = calls[0].hidden
    for block, call in zip(blocks, calls, strict=True):
        hidden = run_block(block, hidden, call)
    expected = model.model(**inputs, output_hidden_states=False).last_hidden_state
    kept = mask.bool()
    torch.testing.assert_close(model.model.norm(hidden)[kept], expected[kept])


def test_stubs_come_off() -> None:
    model = tiny_model("mixtral")
    ids = torch.ones(1, 4, dtype=torch.long)
    before = model(ids).logits
    capture_calls(model, Adapter(model).blocks, {"input_ids": ids})
    assert torch.equal(model(ids).logits, before)


def test_only_the_blocks_up_to_the_last_one_asked_for_are_captured() -> None:
    model = tiny_model("qwen2_moe")
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert len(capture_calls(model, Adapter(model).blocks, inputs, last=0)) == 1
    assert len(capture_calls(model, Adapter(model).blocks, inputs)) == 2


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(WaitingStates(0, tmp_path))


def test_a_batch_that_advanced_enters_the_next_block_with_what_the_first_made(store: ActivationStore) -> None:
    model = tiny_model("qwen2_moe")
    blocks = Adapter(model).blocks
    calls = capture_calls(model, blocks, {"input_ids": torch.randint(1, 257, (1, 5))})
    assert store.enter(0, 0, calls[0]) is calls[0]
    expected = run_block(blocks[0], calls[0].hidden, calls[0])
    store.advance(0, 0, calls[0], blocks[0])
    # Stored now: a change of the finished block no longer matters.
    torch.nn.init.zeros_(blocks[0].mlp.experts.down_proj)
    assert torch.equal(store.enter(0, 1, calls[1]).hidden, expected)
    assert store.block_of(0) == 1


def test_a_batch_enters_only_the_block_that_it_has_reached(store: ActivationStore) -> None:
    model = tiny_model("qwen2_moe")
    blocks = Adapter(model).blocks
    calls = capture_calls(model, blocks, {"input_ids": torch.randint(1, 257, (1, 5))})
    with pytest.raises(ValueError, match="batch 3 are at block 0, not at block 1"):
        store.enter(3, 1, calls[1])
    store.advance(3, 0, calls[0], blocks[0])
    store.clear()
    with pytest.raises(ValueError, match="batch 3 are at block 0, not at block 1"):
        store.enter(3, 1, calls[1])


def test_batches_of_a_block_are_read_where_they_wait(tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("zaya"))  # whose blocks hand something on
    inputs, originals = (ActivationStore(WaitingStates(0, tmp_path)) for _ in range(2))
    calls, expected = {}, []
    for number in range(2):
        ids = torch.randint(1, 257, (2, 5))
        captured = capture_calls(adapter.model, adapter.blocks, {"input_ids": ids})
        for block in (0, 1):
            originals.advance(number, block, captured[block], adapter.blocks[block])
        inputs.advance(number, 0, captured[0], adapter.blocks[0])
        entered = inputs.enter(number, 1, captured[1])
        expected.append(run_block(adapter.blocks[1], entered.hidden, entered))
        calls[number] = replace(captured[1], hidden=captured[1].hidden[:0]), torch.ones(2, 5, dtype=torch.bool)
    batches = BlockBatches(inputs, originals, calls)
    assert len(batches) == 2
    for batch, output_BTD in zip(batches, expected, strict=True):
        assert torch.equal(run_block(adapter.blocks[1], batch.hidden_BTD, batch.call), output_BTD)
        assert torch.equal(batch.original_BTD, output_BTD)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_a_pass_that_ends_early_has_shown_every_input_of_its_sites(family: str) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    calls = capture_calls(model, adapter.blocks, {"input_ids": torch.randint(1, 257, (2, 9))})
    block = len(adapter.blocks) - 1
    sites, hidden, call = adapter.sites(block), calls[block].hidden, calls[block]
    for stage in dict.fromkeys(site.stage for site in sites):
        group = tuple(site for site in sites if site.stage == stage)
        seen: list[list[torch.Tensor]] = []
        for ends_early in (True, False):
            rows: list[torch.Tensor] = []
            with ExitStack() as stack:
                stack.enter_context(observe(adapter, group, lambda s, e, x_TI, a, rows=rows: rows.append(x_TI)))
                if ends_early:
                    stack.enter_context(until_reached(*adapter.observed_modules(group)))
                run_block(adapter.blocks[block], hidden, call)
            seen.append(rows)
        assert len(seen[0]) == len(seen[1]) > 0
        assert all(torch.equal(early, full) for early, full in zip(*seen, strict=True))


def test_a_pass_skips_what_follows_its_last_site() -> None:
    model = tiny_model("qwen2_moe")
    adapter = Adapter(model)
    calls = capture_calls(model, adapter.blocks, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    ran: list[str] = []
    hooks = [model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append("mlp"))]
    attention = tuple(site for site in adapter.sites(0) if site.kind == "attention")
    with until_reached(*adapter.observed_modules(attention)):
        run_block(adapter.blocks[0], calls[0].hidden, calls[0])
    assert not ran
    with until_reached([], []):
        run_block(adapter.blocks[0], calls[0].hidden, calls[0])
    assert ran == ["mlp"]
    hooks[0].remove()
