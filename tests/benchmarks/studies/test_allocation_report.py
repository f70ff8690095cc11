"""Tables of the allocation benchmark."""

from benchmarks.studies.allocation_report import findings, table


def entry(row: str, seed: int, kl: float) -> dict[str, object]:
    domains = {"a": {"kl": kl, "nll": 1.0}, "b": {"kl": 3 * kl, "nll": 0.0}}
    return {
        "row": row, "budget": 2.5, "seed": seed, "code_bits": 2.5, "average_bits": 2.75, "bytes": 4200,
        "domains": domains, "exact_match": 0.5,
    }  # fmt: skip


KL = {"random linears": (0.4, 0.8), "attention": (0.1, 0.4)}
ENTRIES = [entry(row, seed, kl) for row, values in KL.items() for seed, kl in enumerate(values)]


def test_rows_are_sorted_by_their_mean_divergence() -> None:
    lines = table(ENTRIES, 2.5).splitlines()
    assert lines[2].startswith(
        "| attention | 2.500 | 2.750 | 4 | 0.2500 +- 0.2121 | 0.7500 +- 0.6364 | 0.5000 +- 0.4243 |"
    )
    assert lines[3].startswith("| random linears |")
    assert lines[2].endswith("| 2.72 +- 0.00 | 1.00 +- 0.00 | 50.0 +- 0.0 |")


def test_findings_are_ratios_paired_by_seed() -> None:
    text = findings(ENTRIES)
    assert "| attention before experts | 0.38 +- 0.18 |" in text
    assert "| shared before routed experts |  |" in text
