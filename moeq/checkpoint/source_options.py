"""What a run says about the sources of its models, besides their names."""

from collections.abc import Mapping
from typing import Any, TypedDict


class SourceOptions(TypedDict):
    """Arguments of everything that reads a source.

    Attributes:
        revision: Branch, tag or commit at the hub; folders have none.
        trust_remote_code: Run code that comes with the model.
    """

    revision: str | None
    trust_remote_code: bool


def source_options(settings: Mapping[str, Any]) -> SourceOptions:
    """Those of the options of a run; they hold for the model and its reference alike."""
    return {"revision": settings.get("revision"), "trust_remote_code": bool(settings.get("trust_remote_code"))}
