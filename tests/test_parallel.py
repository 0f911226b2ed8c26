"""Jobs run wherever joblib sends them."""

import os
from contextlib import contextmanager

import joblib
import numpy as np
import pytest

from ganclean.backends import AID
from ganclean.parallel import side_by_side
from ganclean.validation import cleansing_curve, counterfactual_retrain
from tests.toy_gans import toy_cleanser, toy_data

REMOVALS = [[], [3], [5, 9], [0, 1]]


def test_results_are_in_the_order_of_the_jobs_and_progress_is_told():
    told = []
    results = side_by_side(pow, [(2, 3), (3, 2)], None, lambda *what: told.append(what), "powers")
    assert results == [8, 9] and told == [("powers", 1, 2), ("powers", 2, 2)]
    assert side_by_side(pow, []) == []


def test_a_back_end_that_returns_all_results_together_will_do():
    class Together(joblib._parallel_backends.ThreadingBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("together", Together)
    told = []
    with joblib.parallel_config(backend="together", n_jobs=2):
        assert side_by_side(pow, [(2, 3), (3, 2)], None, lambda *what: told.append(what), "powers") == [8, 9]
    assert told == [("powers", 1, 2), ("powers", 2, 2)]


@contextmanager
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        yield


@contextmanager
def ray_cluster():
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module", params=[dask_cluster, ray_cluster], ids=["dask", "ray"])
def cluster(request):
    """How joblib is told to send jobs to a running cluster of two workers."""
    with request.param():
        yield {"backend": request.param.__name__.removesuffix("_cluster"), "n_jobs": -1}


@pytest.mark.slow
def test_jobs_run_in_workers_with_one_thread_each(cluster):
    with joblib.parallel_config(**cluster):
        workers = side_by_side(_process, [(i,) for i in range(8)])
    assert os.getpid() not in {process for process, _ in workers}
    assert {threads for _, threads in workers} == {1}


def _process(number):
    import torch

    return os.getpid(), torch.get_num_threads()


@pytest.mark.slow
def test_a_cluster_that_is_registered_with_joblib_runs_the_counterfactuals(cluster, cleanser, X):
    expected = counterfactual_retrain(cleanser, REMOVALS)
    fresh = counterfactual_retrain(cleanser, REMOVALS, seeds=[1])
    with joblib.parallel_config(**cluster):
        np.testing.assert_allclose(counterfactual_retrain(cleanser, REMOVALS), expected, rtol=1e-9)
        np.testing.assert_allclose(counterfactual_retrain(cleanser, REMOVALS, seeds=[1]), fresh, rtol=1e-9)


@pytest.mark.slow
def test_a_cluster_runs_seeds_and_further_runs(cluster, X):
    cleanser = toy_cleanser().set_params(n_runs=3).fit(X)
    curve = cleansing_curve(cleanser, toy_data(40)[16:], [0.2], n_seeds=2, last_epochs=1)
    with joblib.parallel_config(**cluster):
        there = toy_cleanser().set_params(n_runs=3).fit(X)
        there_curve = cleansing_curve(cleanser, toy_data(40)[16:], [0.2], n_seeds=2, last_epochs=1)
    np.testing.assert_allclose(there.influence_, cleanser.influence_, rtol=1e-9)
    np.testing.assert_allclose(there_curve.values["FID"]["influence"], curve.values["FID"]["influence"], rtol=1e-9)


@pytest.mark.slow
def test_a_cluster_scores_instances_with_aid(cluster, X, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "ganclean.backends.aid.side_by_side", lambda f, jobs, *rest: sent.append(len(jobs)) or side_by_side(f, jobs)
    )
    backend = AID(damping=1.0, tol=1e-6, batch_size=2)
    here = toy_cleanser(backend=backend).fit(X)
    with joblib.parallel_config(**cluster):
        there = toy_cleanser(backend=backend).fit(X)
        outsiders = there.score_samples(toy_data(40)[16:])
    assert sent == [1, 2, 2]
    np.testing.assert_array_equal(there.influence_, here.influence_)
    np.testing.assert_array_equal(outsiders, here.score_samples(toy_data(40)[16:]))
