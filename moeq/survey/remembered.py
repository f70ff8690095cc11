"""A judge that writes down what it measured: a search that was ended goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeq.allocation.evidence import CostTable, Evidence
from moeq.allocation.outer import Judge
from moeq.allocation.plan import Choice
from moeq.disk.atomic import write_json
from moeq.distributed import rank_and_world
from moeq.survey.candidates import Plan


class RememberingJudge:
    """Asks another judge for what the file does not hold yet; the first rank writes it, all of them read it.

    Args:
        judge: Measures.
        path: The file; one with another mark is written anew.
        mark: What the measurements depend on, as ``survey_mark`` has it.
    """

    def __init__(self, judge: Judge, path: Path, mark: str) -> None:
        self._judge, self._path = judge, path
        self._known: dict[str, Any] = {"mark": mark, "measured": {}, "slopes": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf8"))
            self._known = found if found.get("mark") == mark else self._known

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        """KL of every plan, in nats per token."""
        known, keys = self._known["measured"], [_digest(plan) for plan in plans]
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in known}
        if new:
            known |= dict(zip(new, self._judge.measure(list(new.values())), strict=True))
            self._write()
        return [known[key] for key in keys]

    def slopes(self, plan: Plan) -> CostTable:
        """First-order change of the KL of a plan by weight and choice."""
        known, key = self._known["slopes"], _digest(plan)
        if key not in known:
            table = self._judge.slopes(plan)
            known[key] = {name: {choice.label: slope for choice, slope in row.items()} for name, row in table.items()}
            self._write()
        return {
            name: {Choice.from_label(label): slope for label, slope in row.items()} for name, row in known[key].items()
        }

    def _write(self) -> None:
        if rank_and_world()[0] == 0:
            write_json(self._path, self._known)


def survey_mark(evidence: Evidence) -> str:
    """Digest of what a survey found to the last digit: of another model, other data or other choices it is another."""
    return hashlib.sha256(json.dumps(evidence.to_json()["costs"]).encode()).hexdigest()


def _digest(plan: Plan) -> str:
    text = json.dumps({name: Choice.of(grid).label for name, grid in sorted(plan.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:16]
