"""What every test shares: no network, one thread, fixed seeds, the same dtype of arithmetic on every processor."""

import os

# Read by huggingface_hub, datasets and transformers when they are imported, so they are set before anything else.
# The last one says what moeq.kernels.compute_dtype chooses, here and in processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    MOEQ_COMPUTE_DTYPE="float32",
)

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: results do not depend on the machine, and tiny tensors run faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def imports_stay() -> None:
    """Leave what was imported so far out of the search for cycles, which a streamed model asks for at every block."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same global random state at the start of every test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator seeded with 0; the preferred source of random numbers in a test."""
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and let several workers begin with what takes long.

    That is what is marked slow, then the files beside this one, which run whole commands: no worker is left alone with
    one at the end.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if hasattr(config, "workerinput"):
        here = config.rootpath / "tests"
        items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.parent != here))
