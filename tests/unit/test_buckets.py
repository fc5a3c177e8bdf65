"""Static lengths: few of them, none much longer than what it holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pruning_runtime.static_prefill.padding import bucket

counts = st.integers(0, 1 << 20)


@given(counts)
def test_a_bucket_holds_its_count_with_little_waste(count: int) -> None:
    assert count <= bucket(count) <= count + max(7, count // 16)


@given(counts, counts)
def test_more_never_needs_a_shorter_bucket(one: int, other: int) -> None:
    assert (bucket(one) - bucket(other)) * (one - other) >= 0


@given(counts)
def test_a_bucket_is_its_own(count: int) -> None:
    assert bucket(bucket(count)) == bucket(count)


def test_sixteen_lengths_to_each_doubling() -> None:
    for power in range(7, 16):
        assert len({bucket(count) for count in range(2**power + 1, 2 ** (power + 1) + 1)}) == 16
