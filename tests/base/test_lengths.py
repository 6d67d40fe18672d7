"""The lengths of rows: few, long enough, and not much longer."""

import pytest

from smallcoder_jax.base.lengths import bucket, power_of_two, quarter


@pytest.mark.parametrize(
    ("longest", "most", "length"),
    [(1, 192, 48), (48, 192, 48), (49, 192, 96), (192, 192, 192), (7, 10, 9), (10, 10, 10), (1, 128, 128),
     (129, 384, 256), (300, 1024, 512)],
)  # fmt: skip
def test_rows_are_as_long_as_they_have_to_be_in_few_lengths(longest: int, most: int, length: int) -> None:
    assert quarter(longest, most) == length


@pytest.mark.parametrize(
    ("number", "length"), [(1, 16), (16, 16), (17, 24), (25, 32), (33, 48), (49, 64), (65, 96), (97, 128)]
)
def test_a_bucket_holds_its_number_and_is_at_most_half_empty(number: int, length: int) -> None:
    assert bucket(number) == length
    assert number == 1 or length <= 2 * number


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_the_next_power_of_two(number: int, power: int) -> None:
    assert power_of_two(number) == power
