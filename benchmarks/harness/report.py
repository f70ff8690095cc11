"""Markdown of ``equality.py``: what is equal."""

from collections.abc import Mapping

from benchmarks.harness.compare import TOLERANCE, Comparison

EQUALITY = f"""\
Documents that were longer than the model's window were cut by both sides (column cut).  Log-likelihoods are equal to
{TOLERANCE:g} max(1, |x|), accuracies and their standard errors to the last bits but for ties; of MMLU those of each
subject (the table has the whole, whose standard error the harness pools from the subjects').  Standard errors of
perplexities are not compared: the harness has bootstrap samples for LAMBADA and none for texts.  More in
`benchmarks/harness/compare.py`."""
TIES = """
## Ties

Documents whose two best choices, or (metric "router") the last chosen expert and the next one of one of whose tokens,
are equal to rounding; such a token goes to either expert, and what follows from that is excepted from the equality.

| model | task | document | metric | gap | log-likelihoods differ by (nats) | answer |
|---|---|---:|---|---:|---:|---|"""


def report(results: Mapping[str, Mapping[str, Comparison]], source: str) -> str:
    """All that was found, by model and task.

    Args:
        results: Comparisons.
        source: What they came from.
    """
    return f"# Equality with lm-evaluation-harness\n\n{source}; float32.\n\n{EQUALITY}\n{_comparisons(results)}"


def _comparisons(results: Mapping[str, Mapping[str, Comparison]]) -> str:
    """A table per model, then ties and problems."""
    lines = []
    for model, tasks in results.items():
        lines += [
            f"\n## {model}\n",
            "| task | documents | cut | continuations | largest difference (nats) | relative | moeq | harness "
            "| ties | equal |",
            "|---|---:|---:|---:|---:|---:|---|---|---:|---|",
        ]
        for task, found in tasks.items():
            lines.append(
                f"| {task} | {found.documents} | {found.num_cut} | {found.continuations} | {found.difference:.1e} "
                f"| {found.relative:.1e} | {_metrics(found, 'moeq')} | {_metrics(found, 'harness')} "
                f"| {len({(tie.name, tie.index) for tie in found.ties})} | {'no' if found.problems else 'yes'} |"
            )
    ties = [
        f"| {model} | {tie.name} | {tie.index} | {tie.metric} | {tie.gap:.1e} | {tie.difference:.1e} "
        f"| {'same' if tie.agreed else 'another'} |"
        for model, tasks in results.items()
        for found in tasks.values()
        for tie in found.ties
    ]
    problems = [
        f"- {model}: {problem}"
        for model, tasks in results.items()
        for found in tasks.values()
        for problem in found.problems
    ]
    return "\n".join(
        [*lines, TIES, *(ties or ["| none | | | | | | |"]), "\n## What differs\n", *(problems or ["Nothing."])]
    )


def _metrics(found: Comparison, side: str) -> str:
    # Of MMLU the metrics of the whole come last.
    metrics = found.measured["mmlu" if "mmlu" in found.measured else next(iter(found.measured))]
    cells = []
    for metric, of_side in metrics.items():
        value, stderr = of_side[side]
        cells.append(f"{metric} {value:.6g}" + ("" if stderr is None else f" +- {stderr:.3g}"))
    return ", ".join(cells)
