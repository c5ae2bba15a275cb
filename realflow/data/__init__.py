"""Data: where prompts come from, packed batches, dividing them by estimated time."""
