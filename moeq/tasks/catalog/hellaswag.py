"""HellaSwag (Zellers et al., 2019; MIT): the ending that continues a description of everyday events.

As in lm-evaluation-harness, with its clean-up of WikiHow's markup.  QuantMoE-Bench reports ``acc_norm``; MoEQuant's
figures are of the size of ``acc``.
"""

import re

from moeq.tasks.task import DataRow, MultipleChoice, Source


def _clean(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _context(row: DataRow) -> str:
    return _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


TASK = MultipleChoice(
    name="hellaswag",
    source=Source("hellaswag", hub="Rowan/hellaswag"),
    context=_context,
    choices=lambda row: [_clean(ending) for ending in row["endings"]],
    answer=lambda row: int(row["label"]),
)
