import pytest
import torch
from torch.nn import functional as F

from stpm_plugin.model.matching import (
    anomaly_map,
    distance,
    distances,
    image_score,
    matching_loss,
    normalize,
)


def column(*values: float) -> torch.Tensor:
    """One position with these channels: (1, C, 1, 1)."""
    return torch.tensor(values).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ((3.0, 4.0), (3.0, 4.0), 0.0),  # the same
        ((3.0, 4.0), (6.0, 8.0), 0.0),  # the same direction, another length
        ((1.0, 0.0), (-5.0, 0.0), 2.0),  # opposite
        ((1.0, 0.0), (0.0, 2.0), 1.0),  # orthogonal
        ((1.0, 0.0), (0.6, 0.8), 0.4),  # half of (0.4**2 + 0.8**2)
    ],
)
def test_distance_by_hand(teacher, student, expected):
    assert distance(normalize(column(*teacher)), column(*student)).item() == pytest.approx(expected, abs=1e-6)


def test_distance_is_one_minus_cosine():
    t, s = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(distance(normalize(t), s), 1 - F.cosine_similarity(t, s))


def test_loss_is_twice_the_sum_of_mean_distances():
    teacher = [normalize(column(1.0, 0.0)), normalize(column(1.0, 0.0).repeat(1, 1, 2, 1))]
    student = [
        column(0.6, 0.8),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 2, 2, 1).transpose(1, 2).reshape(1, 2, 2, 1),
    ]
    # level 1: 0.4; level 2: the mean of 1 (orthogonal) and 0 or of 0 and 1
    assert matching_loss(teacher, student).item() == pytest.approx(2 * (0.4 + 0.5), abs=1e-6)


def test_loss_of_the_hardest_share_by_hand():
    teacher = [normalize(column(1.0, 0.0).repeat(1, 1, 2, 2))]
    student = torch.tensor([[1.0, 0.6], [0.0, -1.0]]).view(1, 1, 2, 2)  # distances 0, 0.4, 1, 2
    student = torch.cat([student, torch.tensor([[0.0, 0.8], [1.0, 0.0]]).view(1, 1, 2, 2)], dim=1).requires_grad_()
    loss = matching_loss(teacher, [student], hard_share=0.5)
    assert loss.item() == pytest.approx(2 * (1 + 2) / 2, abs=1e-6)
    loss.backward()
    assert student.grad.abs().sum(dim=1).flatten()[:2].eq(0).all()  # what matches well enough teaches nothing
    assert matching_loss(teacher, [student], hard_share=0.01).item() == pytest.approx(4, abs=1e-6)  # one position


def test_image_score_by_hand():
    anomalies = torch.zeros(2, 1, 4, 4)
    anomalies[0, 0, 0, 0] = 0.8  # one pixel of a block
    anomalies[1, 0, 2:, 2:] = 0.4  # a whole block
    assert image_score(anomalies, 0, 2).tolist() == pytest.approx([0.8, 0.4])
    # The highest of four blocks over the root of the map's mean, 0.05 and 0.1; the mean of two blocks; of all four.
    assert image_score(anomalies, 1, 2).tolist() == pytest.approx([0.2 / 0.05**0.5, 0.4 / 0.1**0.5])
    assert image_score(anomalies, 2, 2).tolist() == pytest.approx([0.1 / 0.05**0.5, 0.2 / 0.1**0.5])
    assert image_score(anomalies, 9, 2).tolist() == pytest.approx([0.05**0.5, 0.1**0.5])
    assert image_score(torch.zeros(1, 1, 4, 4), 2, 2).tolist() == [0]


def test_a_defect_stands_out_of_a_calm_map_and_a_lesser_match_everywhere_does_not():
    """Geometric mean of a part's distance, and that over the map's mean: for the same part, the calmer map's is higher."""
    calm, restless = torch.full((1, 1, 10, 10), 0.1), torch.full((1, 1, 10, 10), 0.2)
    calm[..., 0, 0] = restless[..., 0, 0] = 0.4
    assert image_score(calm, 1, 1) > image_score(restless, 1, 1)
    assert image_score(3 * calm, 1, 1) == pytest.approx(float(3**0.5 * image_score(calm, 1, 1)))  # nothing matches


def test_gradient_reaches_the_student_alone():
    student = column(0.6, 0.8).requires_grad_()
    matching_loss([normalize(column(1.0, 0.0))], [student]).backward()
    assert student.grad.abs().sum() > 0


def test_one_level_is_its_distance_and_two_are_their_geometric_mean():
    teacher, student = normalize(column(1.0, 0.0)), column(0.6, 0.8)
    one = anomaly_map(distances([teacher], [student]), (1, 1))
    two = anomaly_map(distances([teacher, normalize(column(1.0, 0.0))], [student, column(-1.0, 0.0)]), (1, 1))
    assert one.item() == pytest.approx(0.4, abs=1e-6)
    assert two.item() == pytest.approx((0.4 * 2.0) ** 0.5, abs=1e-6)


def test_equal_features_have_an_empty_map():
    teacher = [normalize(torch.ones(1, 4, 2, 2))] * 2
    assert torch.equal(anomaly_map(distances(teacher, teacher), (4, 4)), torch.zeros(1, 1, 4, 4))


def test_a_two_by_two_map_upsampled():
    teacher = normalize(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 2))
    student = teacher.clone()
    student[0, :, 0, 0] = torch.tensor([-1.0, 0.0])  # distance 2 in the upper left corner, 0 elsewhere
    got = anomaly_map(distances([teacher], [student]), (4, 4))[0, 0]
    edge = torch.tensor([1.0, 0.75, 0.25, 0.0])  # weights of bilinear upsampling by 2, align_corners=False
    torch.testing.assert_close(got, 2 * edge[:, None] * edge[None, :])


def test_geometric_mean_keeps_the_products_order():
    teacher = [normalize(torch.randn(1, 4, 8, 8)) for _ in range(3)]
    student = [torch.randn(1, 4, 8, 8) for _ in range(3)]
    product = torch.stack([distance(t, s) for t, s in zip(teacher, student, strict=True)]).prod(dim=0).flatten()
    assert torch.equal(product.argsort(), anomaly_map(distances(teacher, student), (8, 8)).flatten().argsort())
