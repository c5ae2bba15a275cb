r"""Answers to mathematical problems: where a completion has one, and whether it is the right one.

    extract(r"... so we get $\boxed{\frac{1}{2}}$.")  # '\\frac{1}{2}'
    same(r"\frac{1}{2}", "0.5")                       # True

Nothing here runs text of a model, and what is not worth its time (a number of a million digits) is not
computed.
`same` falls back to sympy, which may never end: `realflow.rewards.math` calls it in workers with a limit.
"""

from realflow.rewards.answers.compare import judged, quick, same
from realflow.rewards.answers.find import extract

__all__ = ["extract", "judged", "quick", "same"]
