"""Jobs run wherever joblib sends them."""

import os

import joblib
import numpy as np
import pytest

from ganclean.parallel import side_by_side
from ganclean.validation import cleansing_curve, counterfactual_retrain
from tests.toy_gans import toy_cleaner, toy_data

REMOVALS = [[], [3], [5, 9], [0, 1]]


def test_results_are_in_the_order_of_the_jobs_and_progress_is_told():
    told = []
    results = side_by_side(pow, [(2, 3), (3, 2)], None, lambda *what: told.append(what), "powers")
    assert results == [8, 9] and told == [("powers", 1, 2), ("powers", 2, 2)]
    assert side_by_side(pow, []) == []


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_cluster_that_is_registered_with_joblib_runs_the_counterfactuals(dask_cluster, cleaner, X):
    expected = counterfactual_retrain(cleaner, REMOVALS)
    fresh = counterfactual_retrain(cleaner, REMOVALS, seeds=[1])
    with joblib.parallel_config(backend="dask"):
        np.testing.assert_allclose(counterfactual_retrain(cleaner, REMOVALS), expected, rtol=1e-9)
        np.testing.assert_allclose(counterfactual_retrain(cleaner, REMOVALS, seeds=[1]), fresh, rtol=1e-9)
        assert set(side_by_side(_process, [(i,) for i in range(4)])) <= set(dask_cluster.run(os.getpid).values())


def _process(number):
    return os.getpid()


@pytest.mark.slow
def test_a_cluster_runs_seeds_and_further_runs(dask_cluster, X):
    cleaner = toy_cleaner().set_params(n_runs=3).fit(X)
    curve = cleansing_curve(cleaner, toy_data(40)[16:], [0.2], n_seeds=2, last_epochs=1)
    with joblib.parallel_config(backend="dask"):
        there = toy_cleaner().set_params(n_runs=3).fit(X)
        there_curve = cleansing_curve(cleaner, toy_data(40)[16:], [0.2], n_seeds=2, last_epochs=1)
    np.testing.assert_allclose(there.influence_, cleaner.influence_, rtol=1e-9)
    np.testing.assert_allclose(there_curve.values["FID"]["influence"], curve.values["FID"]["influence"], rtol=1e-9)
