"""What is read back of other projects' checkpoints is what they mean, and the study counts silent damage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lab.study import case_name
from benchmarks.peers.dense import (
    load_ids,
    parse,
    read_compressed_tensors,
    read_gptq,
    start_report,
    unpack,
    write_dense,
)
from benchmarks.studies.peers import Case, Peers, damage, warnings_of
from benchmarks.studies.peers_report import table

GENERATOR = torch.Generator().manual_seed(0)
OUTPUTS, INPUTS, GROUP = 32, 96, 32
MODULE = "model.layers.0.mlp.experts.3.up_proj"


def reference_pack(codes_RI: Tensor, bits: int) -> Tensor:
    """A Python integer per row, cut into words of 32 bits."""
    rows = []
    for row in codes_RI.tolist():
        stream = sum(code << (bits * position) for position, code in enumerate(row))
        words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def draw(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=GENERATOR)


def expected(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    return torch.stack(
        [scale_OG[:, i // GROUP].float() * (codes_OI[:, i] - zero_OG[:, i // GROUP]) for i in range(INPUTS)], 1
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_survive_a_word_that_they_share(bits: int) -> None:
    codes_RI = draw(bits, 5, 33)
    assert torch.equal(unpack(reference_pack(codes_RI, bits), bits, 33), codes_RI)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_are_scales_times_codes_from_zero(bits: int, symmetric: bool) -> None:
    codes_OI, zero_OG = draw(bits, OUTPUTS, INPUTS), draw(bits, OUTPUTS, INPUTS // GROUP)
    scale_OG = torch.rand(OUTPUTS, INPUTS // GROUP, generator=GENERATOR).bfloat16()
    tensors = {
        f"{MODULE}.weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        f"{MODULE}.weight_scale": scale_OG,
        f"{MODULE}.weight_packed": reference_pack(codes_OI, bits),
    }
    if symmetric:
        zero_OG = torch.full_like(zero_OG, 2 ** (bits - 1))
    else:
        tensors[f"{MODULE}.weight_zero_point"] = reference_pack(zero_OG.T, bits).T
    assert torch.equal(read_compressed_tensors(tensors, MODULE, bits), expected(codes_OI, scale_OG, zero_OG))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_a_gptq_checkpoint_is_scales_times_codes_from_zero(bits: int, zero_offset: int) -> None:
    codes_OI, zero_OG = draw(bits, OUTPUTS, INPUTS), draw(bits, OUTPUTS, INPUTS // GROUP)
    zero_OG[0] = 0
    scale_OG = torch.rand(OUTPUTS, INPUTS // GROUP, generator=GENERATOR).half()
    stored_OG = (zero_OG - zero_offset) % 2**bits
    tensors = {
        f"{MODULE}.g_idx": torch.arange(INPUTS, dtype=torch.int32) // GROUP,
        f"{MODULE}.scales": scale_OG.T,
        f"{MODULE}.qweight": reference_pack(codes_OI, bits).T,
        f"{MODULE}.qzeros": reference_pack(stored_OG.T, bits),
    }
    assert torch.equal(read_gptq(tensors, MODULE, bits, zero_offset), expected(codes_OI, scale_OG, zero_OG))


def original() -> dict[str, Tensor]:
    names = [f"{MODULE}.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight"]
    return {name: torch.randn(4, 6, generator=GENERATOR).bfloat16() for name in names}


def test_damage_that_a_mean_hides_is_counted() -> None:
    before = original()
    none = {"broken_experts": 0, "zeroed_columns": 0, "changed_routers": 0, "changed_others": 0}
    assert damage(before, before) == none
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[f"{MODULE}.weight"].zero_()
    after["model.layers.0.mlp.gate.weight"][0, 0] += 1
    assert damage(before, after) == {**none, "broken_experts": 1, "zeroed_columns": 6, "changed_routers": 1}
    after = dict(before)
    after[f"{MODULE}.weight"] = before[f"{MODULE}.weight"].clone()
    after[f"{MODULE}.weight"][0, 0] = float("nan")
    after["model.norm.weight"] = before["model.norm.weight"] * 2
    assert damage(before, after) == {**none, "broken_experts": 1, "changed_others": 1}


def test_warnings_are_kept_without_places_colours_and_repetition() -> None:
    printed = (
        "\x1b[33m2026-01-02T03:04:05.67 | WARNING - expert 3 skipped in /some/where/model.py\x1b[0m\nall is well\n"
    )
    expected = ["WARNING - expert 3 skipped in model.py"]
    assert warnings_of(printed + printed.replace("03:04", "04:05") + "  warn(\n") == expected


def test_a_dense_folder_has_the_names_and_the_type_of_the_original(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tensors = original()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    arguments = ["--model", str(model), "--ids", "ids.pt", "--bits", "3", "--output", str(tmp_path / "dense"), "--fast"]
    options = parse("", {"--fast": {"action": "store_true"}}, arguments)
    assert options.fast
    assert options.group_size == 64
    report = start_report("peer", options, ())
    with report.timed():
        found = {name: tensor.float() + 1 for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="under no name"):
        write_dense(options, {}, report)
    write_dense(options, found | {"more": torch.zeros(1)}, report)
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == dict.fromkeys(tensors, torch.bfloat16)
    assert torch.equal(written["model.norm.weight"], (tensors["model.norm.weight"].float() + 1).bfloat16())
    saved = json.loads((tmp_path / "dense" / "report.json").read_text())
    assert saved["num_quantized"] == 1
    assert 0 < saved["loaded_mb"] <= saved["peak_mb"]
    with pytest.raises(SystemExit):
        parse("", {}, arguments)


@pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
def test_experts_of_a_mixtral_are_found_under_the_names_of_peers(tmp_path: Path, block: str) -> None:
    model, names = tmp_path / "model", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    model.mkdir()
    experts = {f"model.layers.0.block_sparse_moe.experts.0.{w}.weight": draw(8, 2, 2).bfloat16() for w in names}
    tensors = experts | {"model.layers.0.block_sparse_moe.gate.weight": draw(8, 1, 2).bfloat16()}
    save_file(tensors, model / "model.safetensors")
    arguments = ["--model", str(model), "--ids", "ids.pt", "--bits", "3", "--output", str(tmp_path / "dense")]
    options = parse("", {}, arguments)
    found = {}
    for name, tensor in tensors.items():
        for short, long in names.items():
            name = name.replace(f".{short}.", f".{long}.")
        found[name.replace("block_sparse_moe", block)] = tensor
    write_dense(options, found, start_report("peer", options, ()))
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_ids_are_windows_of_any_of_three_kinds_of_file(tmp_path: Path) -> None:
    ids_NL = draw(8, 3, 5)
    save_file({"ids": ids_NL}, tmp_path / "ids.safetensors")
    torch.save(ids_NL, tmp_path / "ids.pt")
    for kind in ("safetensors", "pt"):
        assert torch.equal(load_ids(tmp_path / f"ids.{kind}"), ids_NL)
    with pytest.raises(ValueError, match=r"must be \.safetensors"):
        load_ids(tmp_path / "ids.txt")
    torch.save(ids_NL[0], tmp_path / "flat.pt")
    with pytest.raises(ValueError, match=r"windows of tokens"):
        load_ids(tmp_path / "flat.pt")


def test_every_result_has_its_own_file() -> None:
    case = Case("mixture", 3, 64, "gptqmodel", 0, 64)
    others = [Case("prose", 3, 64, "gptqmodel", 0, 64), Case("mixture", 3, 0, "gptqmodel", 0, 64)]
    others += [Case("mixture", 3, 64, "gptqmodel_mse", 0, 64), Case("mixture", 3, 64, "gptqmodel", 1, 64)]
    assert len({case_name(one) for one in [case, *others, Case("mixture", 3, 64, "gptqmodel", 0, 8)]}) == 6
    with pytest.raises(SystemExit):
        Peers.parser().parse_args(["--peers", "unknown"])


def test_the_table_shows_mean_and_spread_of_seeds_and_the_sum_of_damage() -> None:
    def row(peer: str, seed: int, kl: float) -> dict[str, object]:
        domains = {"a": {"kl": kl, "router_agreement": 0.5}, "b": {"kl": 3 * kl, "router_agreement": 1.0}}
        report = {"seconds": 10.0, "cpu_seconds": 5.0, "peak_mb": 100.0}
        found = {"broken_experts": 1, "zeroed_columns": 2, "changed_routers": 0, "changed_others": 1}
        case = {"data": "prose", "bits": 3, "group": 0, "tokens": 512, "peer": peer, "seed": seed}
        return {**case, "report": report, "domains": domains, "damage": found}

    lines = table([row("worse", 0, 0.2), row("better", 0, 0.01), row("better", 1, 0.03)]).splitlines()[2:]
    assert lines == [
        "| prose | 512 | 3 | channel | better | 2 | 0.0400 +- 0.0283 | 0.0600 +- 0.0424 | 75.0 +- 0.0 "
        "| 10 | 5 | 100 | 2 | 4 | 2 |",
        "| prose | 512 | 3 | channel | worse | 1 | 0.4000 | 0.6000 | 75.0 | 10 | 5 | 100 | 1 | 2 | 1 |",
    ]
