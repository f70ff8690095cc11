from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.sampling.ebss_spec import EBSSSpec, Sampled
from moeq.sampling.effective import ExpertEvidence
from moeq.sampling.parts import REDRAWS, SetWriter, sample_set
from tests.sampling.tables import TableNextToken

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "mode": "stochastic",
    "num_sequences": 20,
    "length": 12,
    "branches": 2,
    "tau": 0.3,
    "starts": 2,
}


class Dying(TableNextToken):
    """Raises at a step, as a killed run stops."""

    last_step = 10**9

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_steps == self.last_step:
            raise InterruptedError("killed")
        return super().step(parent_N, token_N)


def table(last_step: int = 10**9) -> Dying:
    made = Dying(40, torch.Generator().manual_seed(4))
    made.last_step = last_step
    return made


def counted(ids_NT: Tensor) -> ExpertEvidence:
    """Every token with affinity 1, so that effective tokens are tokens."""
    counts_LE = table().count(ids_NT).sum(0).double()
    return ExpertEvidence(counts_LE, counts_LE)


def sampler(folder: Path, sequences_at_once: int = 8, is_degenerate: Any = None, **settings: Any) -> SetWriter:
    harmless = is_degenerate or (lambda ids_NT: [False] * len(ids_NT))
    spec = EBSSSpec(**{**SMALL, **settings})
    return SetWriter(spec, sequences_at_once, torch.arange(40), harmless, counted, folder)


def same(first: Sampled, second: Sampled) -> bool:
    return all(torch.equal(value, getattr(second, name)) for name, value in vars(first).items())


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "stochastic"},
        {"mode": "paper"},
        {"mode": "paper", "sigma_scope": "corpus"},
        {"mode": "corpus"},
        {"mode": "corpus", "min_tokens_per_expert": 30.0},
    ],
)
def test_a_killed_run_continues_and_ends_with_the_same_set(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = table()
    expected = sample_set(sampler(tmp_path / "whole", **settings), whole, CPU)
    with pytest.raises(InterruptedError):
        sample_set(sampler(tmp_path / "killed", **settings), table(whole.num_steps * 2 // 3), CPU)
    assert list((tmp_path / "killed").glob("*.safetensors"))
    rest = table()
    assert same(sample_set(sampler(tmp_path / "killed", **settings), rest, CPU), expected)
    assert rest.num_steps < whole.num_steps
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_sequences_do_not_depend_on_their_chunk(tmp_path: Path) -> None:
    sets = [sample_set(sampler(tmp_path / str(n), n), table(), CPU) for n in (3, 20)]
    assert torch.equal(sets[0].ids_NT, sets[1].ids_NT)


def test_later_chunks_make_up_for_what_earlier_ones_lack(tmp_path: Path) -> None:
    """The same chunk is written as if nothing was finished where chunks do not see each other."""
    together = sample_set(sampler(tmp_path / "a", mode="corpus", balance=True), table(), CPU)
    apart = sample_set(sampler(tmp_path / "b", mode="corpus", balance=False), table(), CPU)
    spread = [float(found.counts_NLE.sum(0).double().std(-1).mean()) for found in (together, apart)]
    assert spread[0] < 0.6 * spread[1]


def test_coverage_stops_the_writing_before_the_maximum(tmp_path: Path) -> None:
    some = sample_set(sampler(tmp_path / "a", mode="corpus", min_tokens_per_expert=30.0), table(), CPU)
    assert len(some.ids_NT) == 16
    assert counted(some.ids_NT).effective_LE().min() >= 30 > counted(some.ids_NT[:8]).effective_LE().min()
    every = sample_set(sampler(tmp_path / "b", mode="corpus", min_tokens_per_expert=1e6), table(), CPU)
    assert len(every.ids_NT) == 20


def test_degenerate_sequences_are_drawn_again_and_counted(tmp_path: Path) -> None:
    def odd_start(ids_NT: Tensor) -> list[bool]:
        return (ids_NT[:, 1] % 4 == 1).tolist()

    sampled = sample_set(sampler(tmp_path, is_degenerate=odd_start, mode="corpus"), table(), CPU)
    assert sampled.redrawn_N.sum() > 0
    still = torch.tensor(odd_start(sampled.ids_NT))
    assert (sampled.redrawn_N[still] == REDRAWS).all()
    assert torch.equal(sampled.counts_NLE, table().count(sampled.ids_NT))
    assert torch.allclose(sampled.nll_N.double(), -table().log_likelihood(sampled.ids_NT), atol=1e-4)


def test_a_set_of_loops_only_ends_after_the_last_redraw(tmp_path: Path) -> None:
    sampled = sample_set(sampler(tmp_path, is_degenerate=lambda ids: [True] * len(ids), mode="corpus"), table(), CPU)
    assert sampled.redrawn_N.tolist() == [REDRAWS] * 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "corpus"}, [2, 3, 3, 2, 3, 3, 1, 1, 2]),
        ({"mode": "paper", "sigma_scope": "corpus"}, [2, 3, 3, 2, 3, 3, 1, 1, 2]),
        ({"mode": "stochastic"}, [8, 0, 0, 0, 8, 0, 0, 0, 4]),
    ],
)
def test_ranks_divide_chunks_that_follow_each_other_and_take_others_whole(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    spec = EBSSSpec(num_sequences=20, **settings)
    ranks = SetWriter(spec, 8, torch.arange(40), lambda _: [], counted, tmp_path, 0, 3)
    shares = [list(share) for chunk in ranks.chunks() for share in ranks.shares(chunk)]
    assert [i for share in shares for i in share] == list(range(20))
    assert [len(share) for share in shares] == expected


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    sample_set(sampler(tmp_path), table(), CPU)
    path = min(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"not a complete part of sampled sequences .* delete it"):
        sample_set(sampler(tmp_path), table(), CPU)


def test_more_sequences_than_first_tokens_are_refused(tmp_path: Path) -> None:
    for mode in ("stochastic", "corpus"):
        with pytest.raises(ValueError, match=r"num_sequences \(41\) must not exceed the 40 tokens"):
            sample_set(sampler(tmp_path, 64, mode=mode, num_sequences=41), table(), CPU)


@pytest.mark.parametrize("mode", ["paper", "stochastic", "corpus"])
def test_the_first_chunks_of_a_set_are_the_set_that_fewer_sequences_make(tmp_path: Path, mode: str) -> None:
    large = sample_set(sampler(tmp_path / "large", mode=mode, num_sequences=20), table(), CPU)
    small = sample_set(sampler(tmp_path / "small", mode=mode, num_sequences=16), table(), CPU)
    assert torch.equal(large.ids_NT[:16], small.ids_NT)
