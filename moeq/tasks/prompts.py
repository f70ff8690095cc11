r"""Few-shot prompts: the text of description and examples in front of each document's own prompt.

As lm-evaluation-harness builds it: ``description + (example + "\n\n") * num_shots``.  Sampler "first" takes the first
rows of the pool; "random" draws for one document after another from one generator with seed 1234, so that what a
document gets depends on its position among all documents.  ``shots_like`` makes a pool, and a generator, per value (the
subjects of MMLU are tasks of their own in the harness).  Where the examples come from the split that is evaluated, a
document is never its own example.
"""

from collections.abc import Hashable, Sequence
from random import Random

from moeq.tasks.rows import Rows, split_part
from moeq.tasks.task import DataRow, ShotSampler, Task

SHOT_DELIMITER = "\n\n"
SHOT_SEED = 1234


class _Pool:
    """Rows that examples are drawn from, one document after another."""

    def __init__(self, rows: list[DataRow], sampler: ShotSampler) -> None:
        self.rows = rows
        self._sampler = sampler
        self._random = Random(SHOT_SEED)

    def draw(self, count: int, document: DataRow | None) -> list[DataRow]:
        """``count`` rows, none of which equals ``document``; the draws are the harness's."""
        if self._sampler == "first":
            return [row for row in self.rows if document is None or row != document][:count]
        if document is None:
            return self._random.sample(self.rows, count)
        drawn = [row for row in self._random.sample(self.rows, count + 1) if row != document][:count]
        if len(drawn) < count:  # the split has the document several times
            drawn = self._random.sample([row for row in self.rows if row != document], count)
        return drawn


def shot_texts(
    task: Task, rows: Rows, documents: Sequence[DataRow], positions: Sequence[int] | None = None
) -> list[str]:
    """Text in front of each document's prompt: "" without description and examples.

    Args:
        task: The task.
        rows: Its data; the examples are drawn from ``task.prepare(rows.shots)``.
        documents: All documents of the task, in their order.
        positions: Those whose text is wanted; None is all.  The draws are those of the full order either way.

    Raises:
        ValueError: There are fewer examples than the task asks for.
    """
    wanted = range(len(documents)) if positions is None else positions
    if not task.num_shots:
        return [task.description(documents[i]) for i in wanted]
    pools: dict[Hashable, _Pool] = {}
    for row in task.prepare(rows.shots):
        pools.setdefault(task.shots_like(row), _Pool([], task.shot_sampler)).rows.append(row)
    shared_split = task.source.shots is not None and split_part(task.source.shots)[0] == rows.split
    needed, texts = set(wanted), {}
    same: dict[str, str] = {}  # one string for all documents of a subject
    for i, document in enumerate(documents[: max(needed, default=-1) + 1]):
        pool = _pool_of(task, pools, document, shared_split)
        # Examples that are the same for all are drawn where they are needed only.
        if i in needed or task.shot_sampler == "random":
            drawn = pool.draw(task.num_shots, document if shared_split else None)
            if i in needed:
                text = task.description(document) + "".join(task.shot(row) + SHOT_DELIMITER for row in drawn)
                texts[i] = same.setdefault(text, text)
    return [texts[i] for i in wanted]


def _pool_of(task: Task, pools: dict[Hashable, _Pool], document: DataRow, shared_split: bool) -> _Pool:
    like = task.shots_like(document)
    available = len(pools[like].rows) - shared_split if like in pools else 0
    if available < task.num_shots:
        of_its_kind = "" if like is None else f" like {like!r}"
        raise ValueError(
            f"task {task.name} shows {task.num_shots} examples, but split {task.source.shots} has {available} rows"
            f"{of_its_kind}; complete the file, or lower num_shots"
        )
    return pools[like]
