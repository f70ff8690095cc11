"""What a run reports of the files of its source: everything that exports do not take over as it is."""

from moeq.export.companions import companions
from moeq.export.config_file import unfounded_draft
from moeq.export.origin import Origin
from moeq.quant.spec import Fallback


def source_fallbacks(origin: Origin) -> list[Fallback]:
    """A source without files, draft layers that are not there or are dropped, files that are too large to copy."""
    large = [] if origin.folder is None else companions(origin.folder)[1]
    return [*origin.fallbacks(), *unfounded_draft(origin), *large]
