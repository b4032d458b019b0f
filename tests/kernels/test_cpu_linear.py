"""Weights that are laid out once: the products are the same."""

import pytest
import torch
from fastgrpo_kernels.cpu.linear import lay_out, linear, linear_add
from torch.nn.functional import linear as plain

SHAPES = [(0, 8, 8), (1, 1, 1), (3, 7, 5), (32, 192, 320), (33, 65, 4097), (700, 129, 64)]


@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_products_are_as_exact_as_plain_torch(rows, width, columns):
    torch.manual_seed(0)
    weight, bias, total = torch.randn(columns, width), torch.randn(columns), torch.randn(rows, columns)
    x = torch.randn(rows, 2, width)[:, 1]  # its rows are not adjacent
    laid_out = lay_out(weight)
    exact = plain(x.double(), weight.double())
    for found, theirs, right in (
        (linear(x, laid_out), plain(x, weight), exact),
        (linear(x, laid_out, bias), plain(x, weight, bias), exact + bias.double()),
        (linear_add(total.clone(), x, laid_out), plain(x, weight) + total, exact + total.double()),
    ):
        assert found.shape == theirs.shape
        allowed = 2 * (theirs - right).abs().max().item() if rows else 0.0
        torch.testing.assert_close(found.double(), right, rtol=0, atol=allowed + 1e-6)


def test_a_layout_is_a_copy():
    weight = torch.randn(16, 16)
    x, laid_out = torch.randn(4, 16), lay_out(weight)
    before = linear(x, laid_out)
    weight.zero_()
    assert torch.equal(linear(x, laid_out), before)
    assert not torch.equal(linear(x, lay_out(weight)), before)


def test_a_weight_that_has_no_layout_is_left_as_it_is():
    weight, x, total = torch.randn(8, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    assert lay_out(weight) is weight
    assert torch.equal(linear(x, weight), plain(x, weight))
    expected = torch.addmm(total, x, weight.T)
    assert torch.equal(linear_add(total, x, weight), expected)
