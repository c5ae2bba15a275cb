"""Numbers of fields that have a value for each token: over the tokens that count, under known names."""

import torch

from realflow.runtime.stats import field_stats

MASKS = [torch.tensor([False, True, True]), torch.tensor([False, False]), torch.tensor([True, False])]
VALUES = {
    "advantages": [torch.tensor([9.0, 1, 2]), torch.tensor([9.0, 9]), torch.tensor([-3.0, 9])],
    "returns": [torch.zeros(3), torch.zeros(2), torch.zeros(2)],
    "bonus": [1.0, None, 3.0],
    "top": [torch.ones(3, 2), torch.ones(2, 2), torch.ones(2, 2)],
}


def test_masked_tokens_do_not_count() -> None:
    found = field_stats("credit", VALUES, MASKS)
    assert found == {
        "critic/advantages": [0.0, 3.0, -3.0, 2.0],
        "critic/returns": [0.0, 3.0, 0.0, 0.0],
        "credit/bonus": [4.0, 2.0, 1.0, 3.0],
    }


def test_without_a_mask_tokens_have_no_numbers() -> None:
    assert field_stats("credit", VALUES) == {"credit/bonus": [4.0, 2.0, 1.0, 3.0]}
    assert field_stats("credit", {"advantages": []}, []) == {}
