"""What transformers logs of a checkpoint that it has read, without what is no news."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_REPORT = "LOAD REPORT"
# States of a key in the report that are a fault; one that is only unexpected is in the files and not in the model.
_FAULTS = ("MISSING", "MISMATCH", "CONVERSION")


@contextmanager
def without_unexpected_keys() -> Iterator[None]:
    """Within, a report about nothing but keys that the model does not have is not logged; any other is, whole.

    For files whose keys are compared one by one afterwards, or were when they were written: exports carry layers for
    speculative decoding, which transformers does not make.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return _REPORT not in text or any(state in text for state in _FAULTS)
