"""The commands of `realflow`, one module for each group. Each raises InputError or RunError."""
