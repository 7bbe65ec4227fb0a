"""The order of images, and their distribution over processes and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fasttrain.data.loading.sampler import (
    ORDER_STREAM,
    MicroBatchKey,
    SampleWeights,
    SamplingPlan,
    cut_micro_batches,
    epoch_order,
    keyed_rng,
    micro_batch_size_for,
    process_share,
)


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 37, 128])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_shares_of_a_step_begin_at_even_positions(num_images: int, num_processes: int) -> None:
    shares = [process_share(num_images, num_processes, i) for i in range(num_processes)]
    assert [position for share in shares for position in share] == list(range(num_images))
    assert all(share.start % 2 == 0 for share in shares)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 2


def test_micro_batches_of_a_share_begin_at_even_positions() -> None:
    micro_batches = cut_micro_batches(range(10, 47), 8)
    assert [len(micro_batch) for micro_batch in micro_batches] == [8, 8, 8, 8, 5]
    assert [i for micro_batch in micro_batches for i in micro_batch] == list(range(10, 47))


def test_with_batch_norm_a_single_last_image_joins_the_previous_micro_batch() -> None:
    assert [len(micro_batch) for micro_batch in cut_micro_batches(range(17), 8, join_single=True)] == [8, 9]
    assert [len(micro_batch) for micro_batch in cut_micro_batches(range(17), 8)] == [8, 8, 1]
    assert [len(micro_batch) for micro_batch in cut_micro_batches(range(1), 8, join_single=True)] == [1]


@pytest.mark.parametrize(
    ("batch", "processes", "num_micro_batches", "size"), [(37, 1, 4, 10), (37, 1, 1, 38), (8, 2, 2, 2)]
)
def test_micro_batch_size(batch: int, processes: int, num_micro_batches: int, size: int) -> None:
    assert micro_batch_size_for(batch, processes, num_micro_batches) == size
    largest = len(process_share(batch, processes, processes - 1))
    assert -(-largest // size) <= num_micro_batches


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_contains_every_image_once_for_any_number_of_processes(drop_last: bool) -> None:
    plan = SamplingPlan(100, 32, 32, seed=3, drop_last=drop_last)
    assert plan.steps_per_epoch == (3 if drop_last else 4)
    split = [SamplingPlan(100, 32, 6, seed=3, drop_last=drop_last, num_processes=3, process_index=i) for i in range(3)]
    for epoch in range(2):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            expected = np.concatenate([key.indices for key in plan.plan(step).micro_batches])
            actual = np.concatenate([key.indices for order in split for key in order.plan(step).micro_batches])
            assert np.array_equal(expected, actual)
            assert plan.plan(step).epoch == epoch
            assert plan.plan(step).num_images == len(actual)
            seen += actual.tolist()
        assert len(set(seen)) == len(seen) == (96 if drop_last else 100)


def test_order_depends_on_seed_and_epoch() -> None:
    def first(seed: int, step: int) -> list[int]:
        return SamplingPlan(50, 50, 50, seed=seed).plan(step).micro_batches[0].indices.tolist()

    assert first(0, 0) != first(0, 1)
    assert first(0, 0) != first(1, 0)
    assert first(0, 5) == first(0, 5)


@pytest.mark.parametrize("num_images", [1, 2, 1000, 100_003])
def test_the_order_is_numpys_permutation_in_four_bytes_an_image(num_images: int) -> None:
    order = epoch_order(3, 4, num_images)
    assert np.array_equal(order, keyed_rng(3, ORDER_STREAM, 4).permutation(num_images))
    assert order.nbytes == 4 * num_images


def test_random_numbers_depend_on_every_part_of_their_key() -> None:
    keys = [(0, 1, 0, 0, 0), (1, 1, 0, 0, 0), (0, 2, 0, 0, 0), (0, 1, 1, 0, 0), (0, 1, 0, 1, 0), (0, 1, 0, 0, 1)]
    values = [keyed_rng(*key).random() for key in keys]
    assert len(set(values)) == len(keys)
    assert keyed_rng(0, 1, 2).random() == keyed_rng(0, 1, 2).random()


@pytest.mark.parametrize(("batch", "repeats"), [(12, 3), (10, 3), (8, 2), (5, 5), (4, 1)])
def test_repeats_of_an_image_are_in_one_step_and_far_apart(batch: int, repeats: int) -> None:
    order = SamplingPlan(50, batch, 4, repeats=repeats)
    plain = SamplingPlan(50, batch, 4)
    assert order.steps_per_epoch == plain.steps_per_epoch
    seen: list[int] = []
    for step in range(order.steps_per_epoch):
        keys = order.plan(step).micro_batches
        indices = np.concatenate([key.indices for key in keys])
        numbers = np.concatenate([np.broadcast_to(key.repeats, key.indices.shape) for key in keys])
        assert len(indices) == plain.plan(step).num_images == order.plan(step).num_images
        assert len(set(zip(indices.tolist(), numbers.tolist(), strict=True))) == len(indices)
        assert numbers.max() < repeats
        different = set(indices.tolist())
        assert len(different) == -(-len(indices) // repeats)
        if len(different) > 1:
            pairs = indices[: len(indices) // 2 * 2].reshape(-1, 2)
            assert (pairs[:, 0] != pairs[:, 1]).all()
        seen += different
    assert len(seen) == len(set(seen))  # an epoch uses a part of the images, each of them in one step


def rows_of(key: MicroBatchKey) -> list[tuple[int, int, int]]:
    return [(key.epoch, int(i), int(r)) for i, r in zip(key.indices, key.repeats, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 10), st.integers(1, 5), st.booleans(), st.integers(1, 4))
def test_a_step_does_not_depend_on_how_it_is_split(
    images: int, batch: int, half: int, processes: int, join: bool, repeats: int
) -> None:
    whole = SamplingPlan(images, batch, 2 * batch, repeats=repeats)
    for step in range(2 * whole.steps_per_epoch):
        expected = whole.plan(step).micro_batches[0]
        parts = []
        for index in range(processes):
            split_plan = SamplingPlan(
                images, batch, 2 * half, join_single=join, num_processes=processes, process_index=index, repeats=repeats
            )
            plan = split_plan.plan(step)
            assert plan.num_images == len(expected.indices)
            parts += [
                (key.epoch, i, r) for key in plan.micro_batches for i, r in zip(key.indices, key.repeats, strict=True)
            ]
        together = [(expected.epoch, i, r) for i, r in zip(expected.indices, expected.repeats, strict=True)]
        assert parts == together


def keys_of(plan: SamplingPlan, steps: range) -> list[tuple[int, int, int]]:
    """Return (epoch, image, repeat) of all images of some steps."""
    return [row for step in steps for key in plan.plan(step).micro_batches for row in rows_of(key)]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("processes", [1, 3])
def test_weighted_sampling_depends_only_on_seed_and_epoch(repeats: int, processes: int) -> None:
    weights = SampleWeights(np.array([0.0, 1.0, 1.0, 6.0, 0.0] * 10))
    whole = SamplingPlan(50, 12, 12, seed=4, repeats=repeats, weights=weights)
    steps = range(2 * whole.steps_per_epoch)
    expected = keys_of(whole, steps)
    split_plan = [
        SamplingPlan(50, 12, 4, seed=4, repeats=repeats, weights=weights, num_processes=processes, process_index=index)
        for index in range(processes)
    ]
    assert [row for step in steps for plan in split_plan for row in keys_of(plan, range(step, step + 1))] == expected
    assert len(expected) == 100
    assert len(set(expected)) == len(expected)  # an image that is sampled twice is augmented differently
    assert not {image for _, image, _ in expected if image % 5 in (0, 4)}
    assert keys_of(whole, range(whole.steps_per_epoch)) != expected[50:]


def test_images_are_drawn_in_proportion_to_their_weights() -> None:
    weights = SampleWeights(np.array([1.0, 2.0, 0.0, 5.0]))
    plan = SamplingPlan(4, 4, 4, weights=weights)
    images = [image for _, image, _ in keys_of(plan, range(2000))]
    assert np.bincount(images, minlength=4) / 8000 == pytest.approx([0.125, 0.25, 0.0, 0.625], abs=0.02)


def test_views_of_an_image_are_consecutive_and_never_share_a_key() -> None:
    key = MicroBatchKey(1, np.array([5, 3, 5]), np.array([0, 0, 1]))
    views = key.in_views(2)
    assert views.indices.tolist() == [5, 5, 3, 3, 5, 5]
    assert len(set(rows_of(views))) == 6
    assert key.in_views(1) is key
    assert MicroBatchKey(0, np.array([7])).in_views(3).repeats.tolist() == [0, 1, 2]
