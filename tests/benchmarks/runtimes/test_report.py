"""Tables of the matrix: counts, a line for each cell of the bundled model, a line for each family."""

from benchmarks.lab.tables import Row
from benchmarks.runtimes.report import counts, report


def row(model: str, grids: str, runtime: str, verdict: str, reason: str = "", kl: float | None = None) -> Row:
    found = {
        "model": model, "grids": grids, "format": "gguf", "carrier": "exact", "runtime": runtime, "verdict": verdict,
        "reason": reason,
    }  # fmt: skip
    return found if kl is None else {**found, "kl": kl, "bound": 2 * kl, "rest": kl / 10, "top1": 0.5, "worst": 9 * kl}


ROWS = [
    row("reference", "2", "llama.cpp", "right", kl=1e-3),
    row("reference", "by expert", "llama.cpp", "refused by moeq", "one tensor, one type"),
    row("mixtral", "2", "llama.cpp", "right", kl=1e-4),
    row("mixtral", "4", "llama.cpp", "right", kl=1e-5),
    row("mixtral", "2", "mlx-lm", "wrong", kl=1.0),
    row("mixtral", "4", "mlx-lm", "refused by the runtime", "no such layer"),
    row("olmoe", "2", "mlx-lm", "refused by the runtime", "no such layer"),
]


def test_verdicts_are_counted_by_runtime_and_in_all() -> None:
    lines = counts(ROWS).splitlines()
    assert lines[0] == "| runtime | right | wrong | refused by moeq | refused by the runtime | absent |"
    assert lines[2:] == [
        "| llama.cpp | 3 | 0 | 1 | 0 | 0 |",
        "| mlx-lm | 0 | 1 | 0 | 2 | 0 |",
        "| all | 3 | 1 | 1 | 2 | 0 |",
    ]


def test_every_cell_of_the_bundled_model_and_every_family_has_its_line() -> None:
    lines = report(ROWS).splitlines()
    assert "| llama.cpp | 2 | - | right | 1.0e-03 | 2.0e-03 | 1.0e-04 | 50.00 | 9.0e-03 |" in lines
    assert "| llama.cpp | by expert | - | refused by moeq [1] | - | - | - | - | - |" in lines
    assert "| mixtral | right: all (rest 1e-05) | wrong: 2 (rest 1e-01); refused by mlx-lm [2]: 4 |" in lines
    assert "| olmoe | not run | refused by mlx-lm [2]: all |" in lines
    assert lines[-2:] == ["1. one tensor, one type", "2. no such layer"]
