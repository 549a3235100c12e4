"""The comparison that other tests rest on can fail, and says where."""

import pytest
import torch
from comparing import assert_close, relative_error, sqnr


def test_what_is_close_passes_and_what_is_not_is_told() -> None:
    reference = torch.tensor([[3.0, 4.0], [float("nan"), 0.0]])
    assert_close("same", reference.clone(), reference, 1e-9)
    out = reference.clone()
    out[0, 1] = 4.5
    assert_close("near", out, reference, 0.11)
    with pytest.raises(
        AssertionError, match=r"far: relative error 0\.1, not below 0\.05; worst at \(0, 1\): 4\.5 instead of 4"
    ):
        assert_close("far", out, reference, 0.05)
    assert relative_error(out[0], reference[0]) == pytest.approx(0.1)
    assert sqnr(reference[0], out[0]) == pytest.approx(20)


def test_values_that_are_not_finite_have_to_be_so_in_both() -> None:
    reference = torch.tensor([1.0, float("nan"), 2.0])
    for out in (torch.tensor([1.0, 1.0, 2.0]), torch.tensor([float("inf"), float("nan"), 2.0])):
        with pytest.raises(AssertionError, match="1 of 3 values"):
            assert_close("mixed", out, reference, 0.5)
    with pytest.raises(AssertionError, match=r"\(2,\) instead of \(3,\)"):
        assert_close("shape", reference[:2], reference, 0.5)


def test_memory_that_nobody_wrote_is_not_a_number() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(5)).isnan().all()
