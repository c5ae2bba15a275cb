"""Measuring what the planner has to know of a machine, with the engines' own code, as ranks of a run."""
