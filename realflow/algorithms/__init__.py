"""Algorithms: advantages, losses and KL estimates. Pure functions of packed tensors.

Nothing here knows of ranks, micro-batches or padding: fields are packed in one dimension, groups
are found by their ids, and the engine masks, weighs and sums what a loss returns.
"""
