"""Tables of the study of quantizers."""

from typing import Any

from benchmarks.studies.quantizers_report import against_peers, method_tables


def row(arm: str, seed: int, kl: float, **values: Any) -> dict[str, Any]:
    domains = {name: {"kl": factor * kl, "nll": 0.0, "router_agreement": 0.9} for name, factor in (("a", 1), ("b", 3))}
    given = {"group_size": 64, "bits": 3, "rotation": False, "seconds": 4.0, "peak_mb": 100.0, "tokens": 8192}
    return {"arm": arm, "seed": seed, "domains": domains, **given, **values}


def test_a_method_has_one_row_of_means_for_each_grid_and_with_rotation_another() -> None:
    rows = [row("AGQ", 0, 0.01), row("AGQ", 1, 0.02), row("AGQ", 0, 0.05, rotation=True), row("AGQ", 0, 0.1, bits=2)]
    table = method_tables(rows)
    assert "## 3 bits, groups of 64" in table
    assert "## 2 bits, groups of 64" in table
    assert "| AGQ | 2 | 30.00 +- 14.14 | 45.00 +- 21.21 | 15.00 | 45.00 | 1.00 | 1.00 | 90.0 | 4 | 100 |" in table
    assert "| AGQ, rotated | 1 | 100.00 | 150.00 |" in table


def test_other_quantizers_stand_beside_moeq_on_the_same_grid() -> None:
    peer = {"peer": "other", "bits": 3, "group": 64, "data": "mixture", "seed": 0, "tokens": 8192}
    peer["domains"] = row("", 0, 0.1)["domains"]
    table = against_peers([row("AGQ", 0, 0.01), row("AWQ", 0, 0.02), row("AGQ", 0, 0.5, bits=4)], [peer])
    lines = table.strip().splitlines()[4:]
    assert lines == [
        "| 3 | g64 | moeq (AGQ) | corpus | 8192 | 1 | 20.00 | 30.00 |",
        "| 3 | g64 | other | mixture | 8192 | 1 | 200.00 | 300.00 |",
    ]
