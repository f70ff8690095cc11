"""Stop rules of generation: an end-of-text token, or the first stop string in the text.

The text is what lm-evaluation-harness 0.4.13 makes of the same tokens: decoded without special tokens, then cut before
the first occurrence of each stop string, one string after the other, the end-of-text token's own text last.  A stop
string may begin and end inside of tokens and span any number of them, so it is searched in text, never in ids; while a
continuation grows only its last tokens are decoded, as many as the longest stop string can span.
"""

from collections.abc import Collection, Sequence
from typing import Any

# Tokens of the tail beyond one per byte of the longest stop string: skipped special tokens, and a cut first character.
_SLACK = 4


class Stopping:
    """Tells when a continuation has ended, and what its text is.

    Args:
        tokenizer: Of transformers; its ``decode`` is called.
        stop: Stop strings; empty ones stop nothing.
        end_ids: Tokens that end a text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        searched = [string for string in stop if string]
        end_text = tokenizer.eos_token
        self._cut_at = searched + ([end_text] if end_text and end_text not in searched else [])
        self._tail = max((len(string.encode()) for string in self._cut_at), default=0) + _SLACK

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the newest of the new tokens ends the continuation."""
        if ids[-1] in self._end_ids:
            return True
        # The tail may decode to something else at its beginning (half a character, no leading blank): ask all of it.
        return self._stops(ids[-self._tail :]) and (len(ids) <= self._tail or self._stops(ids))

    def text(self, ids: Sequence[int]) -> str:
        """The continuation's text, cut before the first stop string."""
        text = self._decode(ids)
        for string in self._cut_at:
            text = text.split(string, 1)[0]
        return text

    def _stops(self, ids: Sequence[int]) -> bool:
        text = self._decode(ids)
        return any(string in text for string in self._cut_at)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def end_of_text_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens after which neither the model's generation settings nor the tokenizer see any more text."""
    settings = getattr(model, "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    found = {ids} if isinstance(ids, int) else set(ids or ())
    return found | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
