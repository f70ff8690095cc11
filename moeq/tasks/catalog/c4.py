"""C4, the first file of its English validation split (Raffel et al., 2020; ODC-BY), two protocols.

``c4`` is lm-evaluation-harness's: whole pages, detokenized as WikiText is, per word and per byte.  ``c4_windows`` is
the papers' (GPTQ's): 256 windows of 2048 tokens at random places of random rows, seed 0.  The names with ``_sample``
are the same on any other text in a folder ``c4-sample``: not comparable with published figures.
"""

from dataclasses import replace

from moeq.tasks.pages import detokenized
from moeq.tasks.task import Rolling, Source, Windows

SOURCE = Source("c4", hub="allenai/c4", config="en", hub_file="en/c4-validation.00000-of-00008.json.gz")
SAMPLE = Source("c4-sample", hub=None, splits=("validation", "train"))

C4 = Rolling(name="c4", source=SOURCE, text=lambda row: detokenized(row["text"]), original=lambda row: row["text"])
WINDOWS = Windows(name="c4_windows", source=SOURCE, special_tokens=True, random_windows=256, seed=0, length=2048)

TASKS = (
    C4,
    WINDOWS,
    replace(C4, name="c4_sample", source=SAMPLE),
    replace(WINDOWS, name="c4_windows_sample", source=SAMPLE),
)
