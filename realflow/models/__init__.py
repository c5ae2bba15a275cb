"""Models: cards without torch, fetching, loading into one flat buffer, packed forward, checkpoints."""
