"""Random draws belong to a sample: batch, order and restart do not change them."""

import hashlib
import subprocess
import sys
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2i.diffusion import draws

KEYS = st.lists(st.text(max_size=12), min_size=1, max_size=6)
SEEDS = st.integers(min_value=-(2**31), max_value=2**63)
MANY = [f"train-{index}" for index in range(4000)]


@given(KEYS, SEEDS, st.integers(0, 10**9), st.randoms())
def test_draw_depends_only_on_its_sample_key(
    keys: list[str], seed: int, step: int, random: Random
) -> None:
    together = draws.normal(seed, "noise", keys, step, (2, 3))
    alone = [draws.normal(seed, "noise", [key], step, (2, 3))[0] for key in keys]
    np.testing.assert_array_equal(together, np.stack(alone))
    order = random.sample(range(len(keys)), len(keys))
    shuffled = draws.normal(seed, "noise", [keys[i] for i in order], step, (2, 3))
    np.testing.assert_array_equal(shuffled, together[order])


def test_draw_changes_with_every_part_of_its_key() -> None:
    variants = [
        (1, "noise", ["a"], 1),
        (2, "noise", ["a"], 1),
        (1, "moments", ["a"], 1),
        (1, "noise", ["b"], 1),
        (1, "noise", ["a"], 2),
        (1, "noise", [""], 1),
        (11, "noise", ["a"], 1),
        (1, "noise", ["a"], 11),
        (1, "noise,1", ["a"], 1),
        (1, "noise", ["1a"], 1),
    ]
    found = {draws.normal(*variant, (4,)).tobytes() for variant in variants}
    assert len(found) == len(variants)


def test_draws_match_numpy_philox() -> None:
    digest = hashlib.blake2b(b'[7, "noise", 3]\0key', digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8")
    fresh = np.random.Generator(np.random.Philox(key=key))
    expected = fresh.standard_normal((3, 5), dtype=np.float32)
    found = draws.normal(7, "noise", ["other", "key"], 3, (3, 5))[1]
    np.testing.assert_array_equal(found, expected)


def test_draws_are_equal_in_another_process() -> None:
    program = (
        "from d2i.diffusion import draws; import sys;"
        "sys.stdout.write(draws.normal(5, 'noise', ['a', 'b'], 9, (7,)).tobytes().hex())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert found == draws.normal(5, "noise", ["a", "b"], 9, (7,)).tobytes().hex()


def test_draws_have_shapes_and_dtypes() -> None:
    assert draws.normal(1, "x", MANY[:3], 0).shape == (3,)
    assert draws.uniform(1, "x", MANY[:3], 0, (2,)).shape == (3, 2)
    assert draws.integers(1, 1000, 1, "x", [], 0, (2,)).shape == (0, 2)
    assert draws.normal(1, "x", MANY[:3], 0).dtype == np.float32
    assert draws.uniform(1, "x", MANY[:3], 0).dtype == np.float32
    assert draws.integers(1, 1000, 1, "x", MANY[:3], 0).dtype == np.int64


def test_draws_follow_their_distributions() -> None:
    values = draws.normal(1, "noise", MANY, 0, (4,))
    assert abs(values.mean()) < 0.04
    assert abs(values.std() - 1) < 0.03
    assert abs(np.asarray(np.corrcoef(values.T))[0, 1:]).max() < 0.06
    values = draws.uniform(1, "drop", MANY, 0)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs((values < 0.1).mean() - 0.1) < 0.02
    counts = np.bincount(draws.integers(1, 4, 1, "n", MANY, 0), minlength=5)
    assert counts[0] == 0
    assert abs(counts[1:] - 1000).max() < 130


def test_draws_of_two_steps_are_uncorrelated() -> None:
    first, second = (draws.normal(1, "noise", MANY, step) for step in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
