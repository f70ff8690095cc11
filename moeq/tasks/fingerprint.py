"""Everything that decides a result besides its document, as one comparable text that can say what differs."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT_VERSION = 1


def fingerprint(
    *, model: str, dtype: str, reference: str | None, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """JSON with sorted keys, equal exactly where all of these are.

    Args:
        model: Identity of the model (``moeq.models.identity``).
        dtype: Dtype in which it runs.
        reference: Identity of the original that it is compared with, or None.
        settings: Settings that a result depends on and that a document's key does not hold; JSON values.
        versions: Of moeq and the libraries below it.
    """
    parts = {"model": model, "dtype": dtype, "reference": reference, "settings": settings, "versions": versions}
    return json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True, allow_nan=False)


def library_versions() -> dict[str, str]:
    """Versions of moeq, torch and transformers; moeq is "unknown" in a source tree that is not installed."""
    found = {}
    for name in ("moeq", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


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
