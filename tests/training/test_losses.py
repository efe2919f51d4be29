"""The losses against written-out loops; what must not leak; and that splitting a step changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from training.losses import IGNORED, KVLoss, KVSchedule, cross_entropy, kv_errors, kv_weight_at, take_rows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_is_the_mean_log_loss_of_the_next_token_where_there_is_one() -> None:
    logits = normal(2, 4, 5)
    labels = torch.tensor([[3, 1, 4, 2], [0, 2, IGNORED, IGNORED]])
    expected = 0.0
    for row, column, label in [(0, 0, 1), (0, 1, 4), (0, 2, 2), (1, 0, 2)]:
        scores = logits[row, column].tolist()
        expected -= scores[label] - math.log(sum(math.exp(score) for score in scores))
    assert cross_entropy(logits, labels, 4).item() == pytest.approx(expected / 4, rel=1e-6)


def test_axes_that_do_not_agree_are_refused_under_test() -> None:
    with pytest.raises(TypeCheckError, match="cross_entropy"):
        cross_entropy(normal(2, 4, 5), torch.ones(2, 3, dtype=torch.long), 4)


def test_weighted_cross_entropy_is_the_written_out_sum() -> None:
    logits = normal(3, 4, 5)
    labels = torch.tensor([[3, 1, 4, 2], [0, 2, IGNORED, IGNORED], [1, 1, 0, IGNORED]])
    weights = [3, 1, 2]
    expected = 0.0
    for row, column, label in [(0, 0, 1), (0, 1, 4), (0, 2, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)]:
        scores = logits[row, column].tolist()
        expected -= weights[row] * (scores[label] - math.log(sum(math.exp(score) for score in scores)))
    num_predicted = 3 * 3 + 1 * 1 + 2 * 2
    loss = cross_entropy(logits, labels, num_predicted, torch.tensor(weights).float())
    assert loss.item() == pytest.approx(expected / num_predicted, rel=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits = (10 * normal(1, 9, 50)).bfloat16()
    labels = torch.arange(9)[None]
    assert cross_entropy(logits, labels, 8).dtype == torch.float32
    assert cross_entropy(logits, labels, 8).item() == pytest.approx(cross_entropy(logits.double(), labels, 8).item(), rel=1e-5)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    for weights in (None, torch.tensor([3.0])):
        assert cross_entropy(normal(1, 1, 5), torch.tensor([[2]]), 0, weights).item() == 0.0


def test_rows_are_picked_by_sample_and_token() -> None:
    values = normal(3, 2, 5, 4)
    picked = take_rows(values, torch.tensor([0 * 5 + 3, 2 * 5 + 0, 2 * 5 + 4]))
    for row, (sample, token) in enumerate([(0, 3), (2, 0), (2, 4)]):
        assert torch.equal(picked[row], values[sample, :, token])


def written_out(
    student: list[tuple[Tensor, Tensor]],
    teacher: list[tuple[Tensor, Tensor]],
    variances: Tensor,
    num_targets: int,
    weights: list[int],
) -> float:
    """1/|M| sum_l 1/2 [mse(K) / var(K) + mse(V) / var(V)], number by number, each times the weight of its row."""
    total = 0.0
    for layer, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        for kind in (0, 1):
            squares = [
                weight * (a - b) ** 2
                for weight, our_row, their_row in zip(weights, ours[kind], theirs[kind], strict=True)
                for a, b in zip(our_row.flatten().tolist(), their_row.flatten().tolist(), strict=True)
            ]
            per_token = ours[kind].shape[1] * ours[kind].shape[2]
            total += 0.5 * sum(squares) / (num_targets * per_token) / float(variances[layer, kind])
    return total / len(student)


def layers(rows: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two layers of different geometry, keys and values of different dims."""
    return [
        (normal(rows, 2, 4, seed=seed), normal(rows, 2, 3, seed=seed + 1)),
        (normal(rows, 1, 6, seed=seed + 2), normal(rows, 1, 2, seed=seed + 3)),
    ]


VARIANCES = torch.tensor([[0.5, 2.0], [3.0, 0.25]])


def test_the_kv_loss_is_the_written_out_formula() -> None:
    student, teacher = layers(7, seed=10), layers(7, seed=20)
    loss = kv_errors(student, teacher, VARIANCES, 7).mean().item()
    assert loss == pytest.approx(written_out(student, teacher, VARIANCES, 7, [1] * 7), rel=1e-5)


def test_the_weighted_kv_loss_is_the_written_out_formula() -> None:
    student, teacher, weights = layers(5, seed=10), layers(5, seed=20), [3, 3, 1, 2, 2]
    loss = kv_errors(student, teacher, VARIANCES, 11, torch.tensor(weights).float()).mean().item()
    assert loss == pytest.approx(written_out(student, teacher, VARIANCES, 11, weights), rel=1e-5)


def test_weight_three_has_the_loss_and_the_gradients_of_three_copies() -> None:
    copies, weights = torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0])
    labels = torch.tensor([[1, 2, 3, 4], [0, 1, IGNORED, IGNORED]])
    logits, key = normal(2, 4, 5).requires_grad_(), normal(2, 1, 2).requires_grad_()
    target = normal(2, 1, 2, seed=1)
    stored = (
        cross_entropy(logits, labels, 10, weights)
        + kv_errors([(key, key)], [(target, target)], VARIANCES[:1], 4, weights).sum()
    )
    ours = torch.autograd.grad(stored, [logits, key])
    copied, theirs = key[copies], target[copies]
    repeated = cross_entropy(logits[copies], labels[copies], 10)
    repeated = repeated + kv_errors([(copied, copied)], [(theirs, theirs)], VARIANCES[:1], 4).sum()
    torch.testing.assert_close(stored, repeated)
    torch.testing.assert_close(ours, torch.autograd.grad(repeated, [logits, key]))


def test_each_error_belongs_to_its_layer_and_kind() -> None:
    student, teacher = layers(5, seed=10), layers(5, seed=10)
    student[1] = (student[1][0], student[1][1] + 2.0)
    errors = kv_errors(student, teacher, VARIANCES, 5)
    assert torch.allclose(errors, torch.tensor([[0.0, 0.0], [0.0, 4.0 / 0.25]]))


def test_scaling_both_sides_and_the_variance_leaves_the_loss() -> None:
    student, teacher = layers(5, seed=10), layers(5, seed=20)
    scaled = [[(3 * key, 3 * value) for key, value in side] for side in (student, teacher)]
    torch.testing.assert_close(kv_errors(*scaled, 9 * VARIANCES, 5), kv_errors(student, teacher, VARIANCES, 5))


def test_without_weights_the_losses_are_the_plain_sums_bit_for_bit() -> None:
    logits, labels = normal(7, 65, 50), torch.randint(0, 50, (7, 65), generator=torch.Generator().manual_seed(1))
    summed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.equal(cross_entropy(logits, labels, 448), summed / 448)
    ours, theirs = normal(500, 2, 8), normal(500, 2, 8, seed=1)
    errors = kv_errors([(ours, ours)], [(theirs, theirs)], VARIANCES[:1], 500)
    assert torch.equal(errors[0], (ours - theirs).square().sum() / (500 * 2 * 8 * VARIANCES[0]))


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_of_unequal_size_add_up_to_the_whole_step(weighted: bool) -> None:
    student, teacher = layers(9, seed=10), layers(9, seed=20)
    of_rows = torch.tensor([2.0, 2, 1, 1, 1, 5, 5, 5, 5]) if weighted else None
    parts = [
        kv_errors(
            [(key[part], value[part]) for key, value in student],
            [(key[part], value[part]) for key, value in teacher],
            VARIANCES,
            9,
            None if of_rows is None else of_rows[part],
        )
        for part in (slice(0, 1), slice(1, 9), slice(9, 9))
    ]
    torch.testing.assert_close(sum(parts), kv_errors(student, teacher, VARIANCES, 9, of_rows))
    logits, labels = normal(3, 4, 5), torch.tensor([[1, 2, 3, 4], [0, 1, IGNORED, IGNORED], [2, 2, 2, IGNORED]])
    whole = cross_entropy(logits, labels, 6, torch.tensor([1.0, 3.0, 2.0]) if weighted else None)
    rest = cross_entropy(logits[1:], labels[1:], 6, torch.tensor([3.0, 2.0]) if weighted else None)
    torch.testing.assert_close(cross_entropy(logits[:1], labels[:1], 6) + rest, whole)


def test_what_is_not_compared_neither_leaks_in_nor_gets_a_gradient() -> None:
    rows = torch.tensor([1, 2, 5])
    clean = normal(2, 1, 4, 3)
    teacher = [(normal(3, 1, 3, seed=5), normal(3, 1, 3, seed=6))]
    gradients = []
    for poison in (0.0, float("nan")):
        values = torch.full_like(clean, poison)
        for sample, token in [(0, 1), (0, 2), (1, 1)]:
            values[sample, :, token] = clean[sample, :, token]
        values.requires_grad_()
        picked = take_rows(values, rows)
        loss = kv_errors([(picked, picked)], teacher, VARIANCES[:1], 3).mean()
        assert torch.isfinite(loss)
        loss.backward()
        assert values.grad is not None
        gradients.append(values.grad)
    assert torch.equal(*gradients), "a pad's content changes nothing, not even NaN"
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[[0, 0, 1], [1, 2, 1]] = False
    assert (gradients[0].transpose(1, 2)[untouched] == 0).all()
    assert (gradients[0].transpose(1, 2)[~untouched] != 0).any()


def test_the_teacher_gets_no_gradient() -> None:
    student = [(normal(3, 1, 2).requires_grad_(), normal(3, 1, 2, seed=1).requires_grad_())]
    teacher = [(normal(3, 1, 2, seed=2).requires_grad_(), normal(3, 1, 2, seed=3).requires_grad_())]
    kv_errors(student, teacher, VARIANCES[:1], 3).mean().backward()
    assert all(tensor.grad is None for tensor in teacher[0])
    assert all(tensor.grad is not None for tensor in student[0])


def test_half_precision_students_are_compared_in_float32() -> None:
    student = [(torch.full((1, 1, 1), 300.0, dtype=torch.float16), torch.zeros(1, 1, 1, dtype=torch.float16))]
    teacher = [(torch.full((1, 1, 1), -300.0), torch.zeros(1, 1, 1))]
    errors = kv_errors(student, teacher, torch.ones(1, 2), 1)
    assert errors[0, 0].item() == 360_000.0, "600 squared is infinite in float16"


def test_smooth_l1_is_half_the_square_within_a_deviation_and_the_distance_beyond() -> None:
    student = [(torch.tensor([[[0.5, 3.0]]]), torch.tensor([[[0.0, -8.0]]]))]
    teacher = [(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))]
    errors = kv_errors(student, teacher, torch.tensor([[1.0, 4.0]]), 1, loss="smooth_l1")
    assert errors[0].tolist() == pytest.approx([(0.125 + 2.5) / 2, (0.0 + 3.5) / 2])


def test_cosine_is_blind_to_length_and_counts_heads() -> None:
    teacher = [(normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2))]
    longer = [tuple(3.0 * side for side in pair) for pair in teacher]
    opposite = [tuple(-side for side in pair) for pair in teacher]
    ones = torch.ones(1, 2)
    assert kv_errors(longer, teacher, ones, 3, loss="cosine").abs().max() < 1e-6
    torch.testing.assert_close(kv_errors(opposite, teacher, ones, 3, loss="cosine"), torch.full((1, 2), 2.0))


def relation_written_out(ours: Tensor, theirs: Tensor, heads: int) -> list[float]:
    """KL of each row's softmax over the rows up to it, mean over relation heads, one sample."""
    rows = []
    for last in range(len(ours)):
        total = 0.0
        for head in range(heads):
            logs = []
            for side in (ours, theirs):
                flat = side.flatten(1)
                width = flat.shape[1] // heads
                part = flat[: last + 1, head * width : (head + 1) * width].double()
                logs.append((part @ part[last] / width**0.5).log_softmax(dim=0))
            total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
        rows.append(total / heads)
    return rows


def test_the_relation_loss_is_the_written_out_formula_whatever_the_geometries() -> None:
    samples = torch.tensor([0, 0, 0, 2, 2, 5])
    student, teacher = (
        [(normal(6, 2, 4, seed=1), normal(6, 2, 3, seed=2))],
        [(normal(6, 4, 8, seed=3), normal(6, 4, 5, seed=4))],
    )
    found = kv_errors(student, teacher, torch.full((1, 2), 7.0), 6, loss="relation", samples=samples)
    for kind in (0, 1):
        expected = [
            value
            for first, last in ((0, 3), (3, 5), (5, 6))
            for value in relation_written_out(student[0][kind][first:last], teacher[0][kind][first:last], 2)
        ]
        assert found[0, kind].item() == pytest.approx(sum(expected) / 6, rel=1e-4)
        assert expected[0] == expected[3] == expected[5] == 0.0, "the first of a sample sees itself alone"


def test_the_relation_loss_does_not_see_a_turn_within_a_relation_head_but_everything_else() -> None:
    samples = torch.zeros(9, dtype=torch.int64)
    teacher = [(normal(9, 2, 6, seed=3), normal(9, 2, 6, seed=4))]
    turn = torch.linalg.qr(normal(6, 6, seed=5))[0]
    turned = [tuple(side @ turn for side in pair) for pair in teacher]
    ones = torch.ones(1, 2)
    assert kv_errors(turned, teacher, ones, 9, loss="relation", samples=samples).abs().max() < 1e-5
    swapped = [tuple(side.flip(0) for side in pair) for pair in teacher]
    assert kv_errors(swapped, teacher, ones, 9, loss="relation", samples=samples).min() > 0.1


def test_the_relation_loss_needs_to_know_the_samples() -> None:
    pair = [(normal(3, 1, 2), normal(3, 1, 2))]
    with pytest.raises(ValueError, match="got no samples, expected the sample of each row"):
        kv_errors(pair, pair, torch.ones(1, 2), 3, loss="relation")


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine", "relation"])
@pytest.mark.parametrize("weighted", [False, True])
def test_of_every_loss_micro_batches_add_up_and_gradients_are_the_students_alone(loss: KVLoss, weighted: bool) -> None:
    samples = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    weights = torch.tensor([2.0, 2, 2, 3, 3, 3, 3]) if weighted else None
    student, teacher = layers(7, seed=10), layers(7, seed=20)
    for pair in (*student, *teacher):
        for side in pair:
            side.requires_grad_()

    def errors(rows: slice) -> Tensor:
        pick = [[tuple(side[rows] for side in pair) for pair in both] for both in (student, teacher)]
        return kv_errors(
            pick[0],
            pick[1],
            VARIANCES,
            18 if weighted else 7,
            None if weights is None else weights[rows],
            loss,
            samples[rows],
        )

    whole = errors(slice(0, 7))
    torch.testing.assert_close(errors(slice(0, 3)) + errors(slice(3, 7)), whole)
    whole.mean().backward()
    assert all(side.grad is not None and side.grad.isfinite().all() for pair in student for side in pair)
    assert all(side.grad is None for pair in teacher for side in pair)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0] * 5),
        ("linear", [2.0, 1.5, 1.0, 0.5, 0.0]),
        ("cosine", [2.0, 1.0 + math.sqrt(0.5), 1.0, 1.0 - math.sqrt(0.5), 0.0]),
    ],
)
def test_the_weight_stays_or_falls_to_nothing_over_its_steps(schedule: KVSchedule, expected: list[float]) -> None:
    assert [kv_weight_at(step, 4, 2.0, schedule) for step in range(5)] == pytest.approx(expected)
