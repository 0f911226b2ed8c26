"""The nearest items of queries, by every kind of recall."""

import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from ganclean.exceptions import MissingExtraError
from ganclean.valuation import recall
from ganclean.valuation.recall import NeighbourIndex
from tests.reference.gmvaluator import contributors, distance


def points_on_a_grid(n_max=30):
    """Points of which many coincide, and many of their distances tie."""
    return st.integers(3, n_max).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.integers(-4, 4)))


@pytest.fixture(scope="module")
def digits():
    X = np.random.default_rng(0).permutation(load_digits().data / 16)
    return X[:1200], X[1200:1500]


def found(rows, expected):
    """The part of the expected neighbours that were found."""
    return np.mean([len(set(some) & set(all_)) / len(all_) for some, all_ in zip(rows, expected)])


@given(items=points_on_a_grid(), queries=points_on_a_grid(8), n=st.integers(1, 3))
def test_the_exact_search_finds_the_nearest_of_loops_ties_by_row(items, queries, n):
    distances, rows = NeighbourIndex(items).search(queries, n)
    expected = [contributors(items, query, n) for query in queries]
    assert rows.tolist() == expected
    for query, near, row in zip(queries, distances, expected):
        np.testing.assert_allclose(near, [distance(items[i], query) for i in row], rtol=1e-14)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e6, 1.0), (0.0, 1e-12), (0.0, 1e12)])
def test_the_exact_search_agrees_with_scikit_learn(offset, scale, digits):
    items, queries = (scale * x + offset for x in digits)
    distances, _ = NeighbourIndex(items).search(queries, 10)
    expected, _ = NearestNeighbors(n_neighbors=10, algorithm="kd_tree").fit(items).kneighbors(queries)
    np.testing.assert_allclose(distances, expected, rtol=1e-13)


def test_equal_vectors_are_at_distance_zero_however_far_from_the_origin(digits):
    items = digits[0] + 1e7 / 3
    distances, rows = NeighbourIndex(items).search(items, 1)
    assert not distances.any() and len(np.unique(rows)) == len(np.unique(items, axis=0))


def test_a_tight_cluster_far_from_the_others_keeps_its_neighbours_apart():
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.normal(size=(200, 5)), 1e3 + 1e-6 * rng.normal(size=(100, 5))])
    assert (NeighbourIndex(items).search(items, 1)[1].ravel() == np.arange(300)).all()


def test_more_duplicates_than_spare_candidates_come_by_row():
    items = np.repeat(np.array([[3.0, 4.0], [0.0, 0.0]]), 100, axis=0)
    distances, rows = NeighbourIndex(items).search(np.zeros((1, 2)), 102)
    assert rows[0].tolist() == [*range(100, 200), 0, 1] and distances[0].tolist() == [0.0] * 100 + [5.0] * 2


@pytest.mark.parametrize("kind", recall.RECALLS)
@pytest.mark.parametrize("entries", [1, 5000, 10**9])
def test_the_result_does_not_depend_on_how_much_is_in_memory(kind, entries, digits, monkeypatch):
    expected = NeighbourIndex(digits[0], kind).search(digits[1][:40], 12)
    monkeypatch.setattr(recall, "rows_at_once", lambda n: max(1, entries // n))
    distances, rows = NeighbourIndex(digits[0], kind).search(digits[1][:40], 12)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-14)


def test_no_more_products_than_allowed_are_computed_at_once(digits, monkeypatch):
    sizes = []

    def counting(halves, points, items, **settings):
        sizes.append(len(points) * items.shape[1])
        return addmm(halves, points, items, **settings)

    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", counting)
    monkeypatch.setattr("ganclean.distances.ENTRIES_AT_ONCE", 12_000)
    NeighbourIndex(digits[0]).search(digits[1], 3)
    assert max(sizes) == 12_000 // 1216 * 1200 and sum(sizes) == 300 * 1200


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kind", "without"), [("pq", 0.8), ("hnsw", 0.99)])
def test_fifty_candidates_hold_the_ten_nearest(kind, without, seed, digits):
    items, queries = digits
    expected = NeighbourIndex(items).search(queries, 10)
    index = NeighbourIndex(items, kind, seed)
    distances, rows = (x[:, :10] for x in index.search(queries, 50))
    assert found(rows, expected[1]) == 1.0
    np.testing.assert_allclose(distances, expected[0], rtol=1e-14)
    assert without < found(index.search(queries, 10)[1], expected[1]) <= 1


@pytest.mark.parametrize("kind", ["pq", "hnsw"])
@pytest.mark.parametrize(("n_items", "width"), [(2, 1), (20, 3), (100, 9)])
def test_an_approximate_recall_takes_few_items_of_any_width(kind, n_items, width):
    items = np.random.default_rng(0).normal(size=(n_items, width))
    distances, rows = NeighbourIndex(items, kind).search(items, 1)
    assert rows.shape == (n_items, 1) and (distances >= 0).all()
    everything = NeighbourIndex(items, kind).search(items, n_items)
    np.testing.assert_array_equal(everything[1], NeighbourIndex(items).search(items, n_items)[1])


def test_the_quantiser_is_the_same_for_the_same_seed_and_survives_pickling(digits):
    items, queries = digits
    first = NeighbourIndex(items, "pq", 3)
    again = pickle.loads(pickle.dumps(first))
    for other in (again, NeighbourIndex(items, "pq", 3)):
        np.testing.assert_array_equal(first.search(queries, 5)[1], other.search(queries, 5)[1])
    assert (first.search(queries, 5)[1] != NeighbourIndex(items, "pq", 4).search(queries, 5)[1]).any()


def test_a_walk_through_the_graph_that_is_lost_is_made_up_for(digits):
    class Lost:
        """An index that finds nothing for every other query."""

        def search(self, vectors, n):
            rows = np.tile(np.arange(n), (len(vectors), 1))
            rows[::2, -1] = -1
            return None, rows

    items, queries = digits
    index = NeighbourIndex(items, "hnsw")
    index.approximate = Lost()
    rows = index.search(queries, 4)[1]
    np.testing.assert_array_equal(rows[::2], NeighbourIndex(items).search(queries[::2], 4)[1])
    assert (np.sort(rows[1::2], axis=1) == np.arange(4)).all()


@pytest.mark.parametrize("kind", ["pq", "hnsw"])
def test_what_is_missing_is_named_without_faiss(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"faiss-cpu.*ganclean\[similarity\]"):
        NeighbourIndex(np.zeros((3, 2)), kind)


def test_an_unknown_recall_is_refused():
    with pytest.raises(ValueError, match=r"one of \['exact', 'pq', 'hnsw'\]; got 'annoy'"):
        NeighbourIndex(np.zeros((3, 2)), "annoy")
