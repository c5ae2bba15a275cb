"""Moving a model's weights between layouts: what moves (pure), and moving it."""
