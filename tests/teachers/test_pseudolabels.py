"""Pseudo-labels: both methods recover planted clusters, and new spots are labeled by majority vote."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

from peka_lite.teachers import PseudoLabeler

KNN = {"method": "knn-leiden", "resolution": 0.5}
KMEANS = {"method": "kmeans", "n_clusters": 4}
both_methods = pytest.mark.parametrize("options", [KNN, KMEANS], ids=["knn-leiden", "kmeans"])


def blobs(sizes=(70, 60, 50, 40), seed=0):
    """Return well-separated clusters in eight dimensions, in shuffled rows, and their labels."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (20 * np.eye(8)[truth] + rng.normal(size=(len(truth), 8))).astype(np.float32), truth


def cloud(n=120, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


def vote(labeler, E_train, E_new, k):
    """Count votes of the k nearest, one row at a time. Nearness breaks ties."""
    out = []
    for row in E_new.astype(float):
        distance = np.sqrt(((E_train.astype(float) - row) ** 2).sum(1))
        nearest = np.argsort(distance, kind="stable")[:k]
        tally = {}
        for i in nearest:
            n, near = tally.get(labeler.labels_[i], (0, 0.0))
            tally[labeler.labels_[i]] = (n + 1, near + 1 / (1 + distance[i]))
        out.append(max(tally, key=tally.get))
    return out


@both_methods
def test_planted_clusters_are_recovered(options):
    E, truth = blobs()
    assert adjusted_rand_score(truth, PseudoLabeler(**options).fit(E).labels_) == 1


@both_methods
def test_new_spots_get_the_label_of_their_planted_cluster(options):
    E, truth = blobs()
    labeler = PseudoLabeler(**options).fit(E)
    label_of = {t: labeler.labels_[truth == t][0] for t in range(4)}
    new, new_truth = blobs(seed=1)
    assert labeler.predict(new).tolist() == [label_of[t] for t in new_truth]


@pytest.mark.parametrize("method", ["knn-leiden", "kmeans"])
@given(seed=st.integers(0, 50), n=st.integers(40, 150))
@settings(max_examples=8, deadline=None)
def test_labels_are_int64_numbered_by_decreasing_size(method, seed, n):
    labeler = PseudoLabeler(method, **({"n_clusters": 12} if method == "kmeans" else {})).fit(cloud(n, seed))
    labels = labeler.labels_
    assert (labels.dtype, labels.shape) == (np.int64, (n,))
    assert sorted(set(labels)) == list(range(labeler.n_labels_))
    assert (np.diff(np.bincount(labels)) <= 0).all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_empty_cluster_leaves_no_gap():
    E = np.repeat(cloud(5), 8, axis=0)
    labeler = PseudoLabeler("kmeans", n_clusters=9).fit(E)
    assert sorted(set(labeler.labels_)) == list(range(5))
    assert labeler.n_labels_ == 5


@both_methods
def test_same_seed_gives_the_same_labels(options):
    one, other = (PseudoLabeler(**options, seed=3).fit(cloud()).labels_ for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_seed_matters_for_unclear_clusters():
    labels = [PseudoLabeler("kmeans", n_clusters=12, seed=s).fit(cloud()).labels_.tolist() for s in range(3)]
    assert labels[0] != labels[1] or labels[0] != labels[2]


def test_global_random_state_has_no_effect():
    one = PseudoLabeler().fit(cloud()).labels_
    np.random.seed(99)  # noqa: NPY002
    np.testing.assert_array_equal(PseudoLabeler().fit(cloud()).labels_, one)


def test_higher_resolution_gives_more_clusters():
    few, many = (PseudoLabeler(resolution=r).fit(cloud()).n_labels_ for r in (0.2, 3.0))
    assert few < many


@pytest.mark.parametrize("options", [{"n_neighbors": 7}, {"method": "kmeans", "n_clusters": 9, "n_neighbors": 4}])
@given(seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_new_spots_get_the_majority_label_of_their_neighbors(options, seed):
    E, new = cloud(seed=seed), cloud(30, seed + 1000)
    labeler = PseudoLabeler(**options).fit(E)
    predicted = labeler.predict(new)
    assert predicted.dtype == np.int64
    assert predicted.tolist() == vote(labeler, E, new, options["n_neighbors"])


def test_two_far_neighbors_outvote_a_near_one():
    labeler = PseudoLabeler("kmeans", n_clusters=2, n_neighbors=3).fit([[0.0], [10], [10.5], [11]])
    assert labeler.labels_[0] != labeler.labels_[1] == labeler.labels_[2]
    assert labeler.predict([[1.0]]).tolist() == [labeler.labels_[1]]


def test_ties_are_broken_by_nearer_neighbors():
    labeler = PseudoLabeler("kmeans", n_clusters=2, n_neighbors=2).fit([[0.0], [4], [6], [10]])
    left, right = labeler.labels_[[0, 3]]
    assert left != right
    assert labeler.predict([[4.9], [5.1]]).tolist() == [left, right]


def test_one_neighbor_reproduces_the_fitted_labels():
    E = cloud()
    labeler = PseudoLabeler("kmeans", n_clusters=9, n_neighbors=1).fit(E)
    np.testing.assert_array_equal(labeler.predict(E), labeler.labels_)


def test_new_spots_do_not_influence_each_other():
    labeler, new = PseudoLabeler().fit(cloud()), cloud(20, 5)
    alone = np.concatenate([labeler.predict(new[i : i + 1]) for i in range(20)])
    np.testing.assert_array_equal(labeler.predict(new), alone)


def test_default_is_knn_leiden_with_15_neighbors():
    assert repr(PseudoLabeler()) == "PseudoLabeler('knn-leiden', n_neighbors=15, resolution=1.0, seed=0)"


def test_kmeans_has_100_clusters_by_default():
    assert PseudoLabeler("kmeans").fit(cloud(150)).n_labels_ == 100


@pytest.mark.parametrize(
    ("method", "option", "has"),
    [
        ("knn-leiden", {"n_clusters": 5}, "n_neighbors, resolution"),
        ("kmeans", {"resolution": 1.0}, "n_clusters, n_neighbors"),
        ("kmeans", {"color": 1}, "n_clusters, n_neighbors"),
    ],
)
def test_option_of_the_other_method_is_rejected(method, option, has):
    with pytest.raises(ValueError, match=f"'{method}' has no option {next(iter(option))}; it has {has}"):
        PseudoLabeler(method, **option)


def test_unknown_method_is_rejected():
    with pytest.raises(ValueError, match="unknown method 'dbscan'; known: knn-leiden, kmeans"):
        PseudoLabeler("dbscan")


@pytest.mark.parametrize("option", [{"n_neighbors": 0}, {"resolution": -1.0}, {"resolution": None}])
def test_option_that_is_not_positive_is_rejected(option):
    with pytest.raises(ValueError, match=f"must be above 0: {next(iter(option))}"):
        PseudoLabeler(**option)


def test_too_few_spots_for_the_neighbors_raise():
    with pytest.raises(ValueError, match=r"15 spots cannot have 15 neighbors.*lower n_neighbors"):
        PseudoLabeler().fit(cloud(15))


def test_fewer_spots_than_clusters_raise():
    with pytest.raises(ValueError, match=r"50 spots cannot make 100 clusters.*lower n_clusters"):
        PseudoLabeler("kmeans").fit(cloud(50))


@pytest.mark.parametrize("E", [np.zeros(40), np.full((40, 3), np.nan), np.full((40, 3), np.inf), np.zeros((4, 4, 4))])
def test_embeddings_must_be_finite_and_two_dimensional(E):
    with pytest.raises(ValueError, match="finite and two-dimensional"):
        PseudoLabeler().fit(E)


def test_unfitted_labeler_raises():
    with pytest.raises(RuntimeError, match=r"not fitted; call fit"):
        PseudoLabeler().predict(cloud())


def test_new_spots_of_another_width_are_rejected():
    with pytest.raises(ValueError, match="features"):
        PseudoLabeler().fit(cloud()).predict(np.zeros((3, 4)))


@both_methods
def test_fitting_does_not_change_the_embedding(options):
    E, _ = blobs()
    before = E.copy()
    PseudoLabeler(**options).fit(E).predict(E)
    np.testing.assert_array_equal(E, before)


def test_more_spots_than_scanpys_exact_search_handles_by_default_are_clustered():
    side = np.arange(8_400) % 2  # scanpy approximates from 8,192 rows on
    E = np.random.default_rng(0).normal(scale=0.1, size=(len(side), 3)) + 10 * side[:, None]
    labels = PseudoLabeler("knn-leiden", n_neighbors=5, resolution=0.1).fit(E).labels_
    assert labels.min() == 0
    assert not set(labels[side == 0]) & set(labels[side == 1])
