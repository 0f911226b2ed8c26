"""The paired test is that of SciPy, and 'significant' means what the interval shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from ganclean.validation import paired_comparison


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20).filter(lambda v: np.std(v) > 1e-3))
def test_p_value_and_interval_are_those_of_scipy(improvements):
    ours, theirs = paired_comparison(improvements), ttest_1samp(improvements, 0, alternative="greater")
    interval = ttest_1samp(improvements, 0).confidence_interval(0.95)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)


def test_an_effect_is_significant_where_its_interval_excludes_zero():
    assert paired_comparison([1.0, 1.1, 0.9, 1.0]).significant
    barely = paired_comparison([1.0, 2.0, 3.0])
    assert barely.p_value < 0.05 and barely.low < 0 and not barely.significant
    assert not paired_comparison([-1.0, -1.1, -0.9]).significant


def test_equal_improvements_have_no_spread_to_test():
    assert paired_comparison([2.0, 2.0]).significant and not paired_comparison([0.0, 0.0]).significant


def test_one_pair_is_not_enough():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        paired_comparison([1.0])
