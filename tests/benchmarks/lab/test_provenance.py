"""A result names a command that runs from the root of any clone."""

import origin


def test_paths_inside_the_repository_are_given_from_its_root() -> None:
    inside, outside = str(origin.ROOT / "benchmarks/results/solve.json"), "/elsewhere/solve.json"
    line = origin.origin(str(origin.ROOT / "benchmarks/solve.py"), ["--json", inside, "--output", outside])
    assert "python benchmarks/solve.py --json benchmarks/results/solve.json --output /elsewhere/solve.json`" in line
    assert str(origin.ROOT) not in line
