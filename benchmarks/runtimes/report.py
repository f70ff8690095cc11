"""The matrix of a run as tables: how many cells came out how, every cell of the bundled model, a line per family."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.lab.tables import Row, grouped, markdown
from benchmarks.runtimes.cells import REFERENCE
from benchmarks.runtimes.judge import FACTOR, FLOOR, VERDICTS

TITLE = "Exports in the runtimes that they are for"
_LEGEND = f"""\
Right: the mean divergence (KL, nats per token) of a runtime from transformers in float32 on exactly the dequantized
weights is at most {FACTOR:g} times the noise of its arithmetic, plus {FLOOR:g}. The noise is the larger of two: the divergence of
the runtime's own run of the unquantized model (all but one linear, which has 8 bits), and the divergence from float32 of
transformers itself in the arithmetic of the runtime: llama.cpp takes activations as 8-bit integers where a weight is
quantized and in bfloat16 elsewhere, transformers, vLLM and GPTQModel compute in bfloat16, mlx-lm is run in float32.
"Rest" is the divergence of the runtime from transformers in the runtime's arithmetic: what the file itself could be
guilty of. Refused by moeq: no file is written, or its configuration stops a runtime that would read it wrongly."""


def report(rows: Sequence[Row]) -> str:
    """Markdown of all rows."""
    reasons = _reasons(rows)
    reference = [row for row in rows if row["model"] == REFERENCE]
    families = [row for row in rows if row["model"] != REFERENCE]
    parts = [_LEGEND, f"## How many\n\n{counts(rows)}"]
    if reference:
        parts.append(f"## The bundled model\n\n{cells(reference, reasons)}")
    if families:
        parts.append(f"## Tiny random models of each family\n\n{lines(families, reasons)}")
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return "\n\n".join([*(part.strip() for part in parts), f"## Reasons\n\n{listed}"]) + "\n"


def counts(rows: Sequence[Row]) -> str:
    """How many cells of each runtime came out how."""
    by_runtime = grouped(rows, lambda row: row["runtime"])
    table = [(name, *_counted(found)) for name, found in by_runtime.items()]
    return markdown(("runtime", *VERDICTS), [*table, ("all", *_counted(rows))])


def cells(rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """Every cell of one model, a line each."""
    lines = []
    for row in rows:
        numbers = ["-"] * 5
        if "kl" in row:
            numbers = [f"{row['kl']:.1e}", f"{row['bound']:.1e}", f"{row['rest']:.1e}", f"{100 * row['top1']:.2f}",
                       f"{row['worst']:.1e}"]  # fmt: skip
        exact = row["carrier"] if "zero points" in row["grids"] else "-"
        lines.append((row["runtime"], row["grids"], exact, _said(row, reasons), *numbers))
    head = ("runtime", "bits", "carrier", "verdict", "KL", "bound", "rest", "same top token, %", "worst token, nats")
    return markdown(head, lines)


def lines(rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """A line for each family: what came out of all grids, by runtime."""
    names = list(grouped(rows, lambda row: row["runtime"]))
    table = []
    for model, found in grouped(rows, lambda row: row["model"]).items():
        by_runtime = grouped(found, lambda row: row["runtime"])
        table.append((model, *(_summary(by_runtime.get(name, []), reasons) for name in names)))
    return markdown(("family", *names), table)


def _counted(rows: Sequence[Row]) -> list[int]:
    found = Counter(row["verdict"] for row in rows)
    return [found[verdict] for verdict in VERDICTS]


def _summary(rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """Such as ``right: 2, 4, 8 (rest 1e-8); refused by moeq [3]: 2 and 4 by block``."""
    parts = []
    for said, found in grouped(rows, lambda row: _said(row, reasons)).items():
        keys = "all" if len(found) == len(rows) else ", ".join(row["grids"] for row in found)
        rest = f" (rest {max(row['rest'] for row in found):.0e})" if all("rest" in row for row in found) else ""
        parts.append(f"{said}: {keys}{rest}")
    return "; ".join(parts) or "not run"


def _said(row: Row, reasons: dict[str, int]) -> str:
    verdict = f"refused by {row['runtime']}" if row["verdict"] == "refused by the runtime" else row["verdict"]
    return f"{verdict} [{reasons[row['reason']]}]" if row["reason"] else verdict


def _reasons(rows: Sequence[Row]) -> dict[str, int]:
    """Numbers of all reasons, in the order in which they come."""
    found = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    return {reason: number for number, reason in enumerate(found, start=1)}
