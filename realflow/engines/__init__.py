"""What calls do with a model or a function: training, inference, generation, users' functions."""
