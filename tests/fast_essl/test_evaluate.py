"""kNN and linear probe against scikit-learn and the official numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from support import SHARED

from fast_essl.evaluate import (
    evaluate_backbone,
    extract_features,
    knn_accuracy,
    knn_scores,
    linear_probe,
    top_accuracy,
)
from fast_essl.resnet import build_backbone
from loaders.batch import Views
from loaders.errors import DataError


def clusters(count, seed, num_classes=4, size=12, spread=2.5):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, size))
    labels = random.integers(0, num_classes, count)
    features = centres[labels] + random.normal(scale=spread / 2, size=(count, size))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_weighted_knn_predicts_as_the_official_release():
    path = SHARED / "parity" / "knn.npz"
    if not path.exists():
        pytest.skip("needs ../shared/parity")
    official = np.load(path)
    scores = knn_scores(
        torch.tensor(official["bank"]),
        torch.tensor(official["bank_labels"]),
        torch.tensor(official["queries"]),
        k=int(official["k"]),
        num_classes=int(official["classes"]),
        temperature=float(official["temperature"]),
    )
    assert np.array_equal(scores.argmax(dim=1).numpy(), official["predicted"])


def test_plain_knn_equals_scikit_learn():
    """On the queries without a tie, which the two break differently."""
    bank, bank_labels = clusters(600, 0)
    queries, labels = clusters(700, 1)
    scores = knn_scores(bank, bank_labels, queries, k=10, num_classes=4)
    votes = scores.floor()
    top = votes.topk(2, dim=1).values
    clear = top[:, 0] > top[:, 1]
    reference = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(bank, bank_labels)
    assert clear.sum() > 400
    assert np.array_equal(scores.argmax(dim=1)[clear].numpy(), reference.predict(queries[clear]))
    assert 0.4 < knn_accuracy(bank, bank_labels, queries, labels) < 0.99


def test_a_tie_goes_to_the_nearer_class():
    bank = torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, -0.2], [1.0, -0.4]])
    scores = knn_scores(bank, torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 0.0]]), k=4, num_classes=3)
    distances = 1 - torch.nn.functional.cosine_similarity(bank, torch.tensor([[1.0, 0.0]]))
    nearer = 0 if distances[:2].sum() < distances[2:].sum() else 1
    assert int(scores.argmax()) == nearer and float(scores[0, 2]) == 0


def test_more_neighbours_than_samples_are_refused():
    with pytest.raises(ValueError, match="k = 5"):
        knn_scores(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), torch.ones(1, 2), k=5, num_classes=1)


def test_top_accuracy_counts_ranks():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.05, 0.06]])
    labels = torch.tensor([2, 1])
    assert [top_accuracy(scores, labels, n) for n in (1, 2, 3, 5)] == [0.0, 0.5, 1.0, 1.0]


def test_the_probe_is_scikit_learn_s_logistic_regression():
    features, labels = clusters(500, 0)
    queries, _ = clusters(300, 1)
    mean, std = features.mean(0), features.std(0)
    # scikit-learn minimises the sum of the losses times C, plus half the squared norm.
    reference = LogisticRegression(C=1 / (1e-2 * len(labels)), tol=1e-8, max_iter=2000).fit(
        (features - mean) / std, labels
    )
    logits = linear_probe(features, labels, queries, num_classes=4, weight_decay=1e-2)
    expected = reference.predict_proba((queries - mean) / std)
    assert np.abs(logits.softmax(dim=1).numpy() - expected).max() < 2e-3


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, 16):
        rows = min(16, count - start)
        labels = torch.arange(start, start + rows) % 3
        images = torch.randn(rows, 3, 12, 12, generator=generator) + labels.view(-1, 1, 1, 1)
        yield Views(
            views=(images,),
            transformed=None,
            transformed_labels=None,
            labels=labels,
            indices=torch.arange(rows),
        )


def test_evaluation_leaves_the_backbone_as_it_was():
    torch.manual_seed(0)
    backbone = build_backbone("resnet10", width=4).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    result = evaluate_backbone(backbone, batches(60, 0), batches(40, 1), num_classes=3)
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert set(result) == {f"{name}_top{n}" for name in ("knn", "weighted_knn", "probe") for n in (1, 5)} | {
        "num_train",
        "num_test",
    }
    assert (result["num_train"], result["num_test"]) == (60, 40)
    assert result["knn_top5"] == 1.0 and result["probe_top1"] > 0.5


def test_features_come_in_the_order_of_the_batches():
    torch.manual_seed(0)
    backbone = build_backbone("resnet10", width=4).eval()
    features, labels = extract_features(backbone, batches(40, 0))
    with torch.no_grad():
        expected = torch.cat([backbone(views.views[0]) for views in batches(40, 0)])
    assert torch.allclose(features, expected, atol=1e-6) and features.dtype == torch.float32
    assert labels.tolist() == [number % 3 for number in range(40)]


def test_an_accuracy_is_the_nearest_number_to_its_share():
    """In float32, 480 of 1,000 would be less than 0.48."""
    scores = torch.eye(2).repeat(500, 1)
    labels = torch.zeros(1000, dtype=torch.int64)
    labels[1::2][:480] = 1
    labels[0::2] = 1
    assert top_accuracy(scores, labels, 1) == 0.48


def test_features_that_overflow_are_no_result():
    backbone = build_backbone("resnet10", width=4)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(1e15)
    with pytest.raises(DataError, match="the features are not finite"):
        evaluate_backbone(backbone, batches(40, 0), batches(40, 1), num_classes=3)
