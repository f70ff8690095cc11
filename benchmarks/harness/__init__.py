"""Equality with lm-evaluation-harness, document by document."""

import os

# Read when transformers and datasets are imported: nothing is downloaded, and no thread of a tokenizer disturbs timing.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
