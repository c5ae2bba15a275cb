"""Rewards: built-in ones, and adapters for a user's function in TRL's or verl's signature."""
