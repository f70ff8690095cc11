"""Versions of the packages and the Python that computed a result."""

import importlib.metadata
import platform

PACKAGES = ("moeq", "torch", "transformers", "lightning", "torchmetrics", "datasets", "safetensors")


def installed_versions() -> dict[str, str]:
    """Version by package, of Python, and the platform; a package that runs without being installed says so."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions | {"python": platform.python_version(), "platform": platform.platform()}
