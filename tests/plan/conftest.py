"""A small model's card, without building the model."""

from __future__ import annotations

import pytest
from small_cards import make_card

from realflow.models.card import Card


@pytest.fixture
def small_card() -> Card:
    return make_card()
