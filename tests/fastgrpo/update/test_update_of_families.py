"""The packed update of every tiny family against transformers' own forward pass of each sequence alone."""

import pytest
from family_parity import update_errors
from tiny_families import FAMILIES, family


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_and_gradients(name: str) -> None:
    logprobs, gradients = update_errors(*family(name))
    assert logprobs < 1e-4
    assert gradients < 1e-5
