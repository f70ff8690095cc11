"""Fingerprint of an evaluation: all that decides a result besides its document, as text that can say what differs.

Batches and their layouts, and with them where a model is (in memory or streamed), change results by rounding only and
are not in it: what was finished in memory counts when a run goes on streamed.
"""

import json
from collections.abc import Mapping
from typing import Any

RECORD_VERSION = 1
LIBRARIES = ("moeq", "torch", "transformers")


def result_digest(
    *, model: str, dtype: str, reference: str | None, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """JSON with sorted keys, equal exactly where all of these are.

    Args:
        model: Identity of the model (``moeq.disk.identity``).
        dtype: Dtype in which it runs.
        reference: Identity of the original that it is compared with, or None.
        settings: Settings that a result depends on and that a document's key does not hold; JSON values.
        versions: Versions by name, of which only those of ``LIBRARIES`` count.
    """
    counted = {name: versions.get(name) for name in LIBRARIES}
    parts = {"model": model, "dtype": dtype, "reference": reference, "settings": settings, "versions": counted}
    return json.dumps({"format": RECORD_VERSION, **parts}, sort_keys=True, allow_nan=False)


def differences(before: str, now: str) -> list[str]:
    """What differs between two fingerprints, one "part: before -> now" each; nested settings by their own names."""
    old, new = (_flat(json.loads(text)) for text in (before, now))
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
