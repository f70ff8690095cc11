"""pass@k: how likely one of k samples passes, without bias from n >= k samples of which c passed.

pass@k = 1 - C(n - c, k) / C(n, k), with C(n, k) the number of ways to choose k of n (Chen et al. 2021, "Evaluating
Large Language Models Trained on Code", equation 1): one minus the share of k-subsets in which no sample passed.
Computed as the product 1 - prod_{i = n-c+1 .. n} (1 - k / i), whose factors never overflow.
"""

from math import prod


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate of pass@k for one problem.

    Args:
        n: Samples that were run.
        c: Samples that passed.
        k: Samples that one may try.

    Raises:
        ValueError: Not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"samples that passed ({c}) must be from 0 to the samples run ({n}); correct the counts")
    if not 1 <= k <= n:
        raise ValueError(f"k ({k}) of pass@k must be from 1 to the samples of a problem ({n}); draw more samples")
    if k > n - c:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))
