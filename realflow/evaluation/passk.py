"""pass@k: how likely it is that one of k samples solves a problem."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples of a problem, of which c solve it.

    `1 - prod(1 - k/i, i = n-c+1..n)` is `1 - C(n-c, k) / C(n, k)`: the share of all choices of k samples
    among the n that hold one of the c (Chen et al. 2021, "Evaluating large language models trained on code",
    section 2.1). pass@1 is c/n. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} samples cannot be right")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be told from {n} samples")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
