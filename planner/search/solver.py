"""OR-Tools' CP-SAT as the search uses it: the same answer for the same seed and work on any machine."""

from __future__ import annotations

from ortools.sat.python import cp_model


def make_solver(seed: int, seconds: float) -> cp_model.CpSolver:
    """One worker, and `seconds` of deterministic time instead of the clock's."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = seconds
    # This step of presolve sums coefficients of literals in 32 bits and then proves what is not true
    # (issue 5293 of OR-Tools 9.15).
    solver.parameters.presolve_inclusion_work_limit = 0
    return solver
