"""WikiText-2 raw (Merity et al., 2016; CC BY-SA 3.0), two protocols that give different perplexities.

``wikitext`` is lm-evaluation-harness's: whole pages, detokenized, per word and per byte of the page as stored.
``wikitext2`` is the papers' (GPTQ's): rows joined by empty lines, windows of 2048 tokens, per token.
"""

from moeq.tasks.pages import detokenized, pages
from moeq.tasks.task import Rolling, Source, Windows

SOURCE = Source("wikitext-2-raw", hub="Salesforce/wikitext", config="wikitext-2-raw-v1", splits=("test",))

TASKS = (
    Rolling(
        name="wikitext",
        source=SOURCE,
        prepare=pages,
        text=lambda row: detokenized(row["page"]),
        original=lambda row: row["page"],
    ),
    Windows(name="wikitext2", source=SOURCE, join="\n\n", special_tokens=True, length=2048),
)
