from concurrent.futures import ThreadPoolExecutor

import torch

from moeq.kernels.workspace import reused


def test_memory_is_shared_by_purpose_and_grows_to_the_largest() -> None:
    large = reused("test", (4, 8), torch.uint8)
    assert reused("test", (3, 5), torch.uint8).data_ptr() == large.data_ptr()
    assert reused("other", (4, 8), torch.uint8).data_ptr() != large.data_ptr()
    assert reused("test", (4, 8), torch.int8).data_ptr() != large.data_ptr()
    assert reused("test", (100, 8), torch.uint8).shape == (100, 8)


def test_threads_do_not_share_it() -> None:
    ours = reused("test", (4,), torch.float32)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(reused, "test", (4,), torch.float32).result()
    assert theirs.data_ptr() != ours.data_ptr()
