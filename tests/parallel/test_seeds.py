"""Seeds are ranges, however many: parts, slices and shares of them are never lists."""

import time

import pytest

from hsivi_fast.cli import parse_seeds
from hsivi_fast.parallel.seeds import Seeds
from hsivi_fast.parallel.world import World


def test_parts_are_one_sequence():
    seeds, plain = Seeds(range(5), [], [9, 7], range(20, 23)), [0, 1, 2, 3, 4, 9, 7, 20, 21, 22]
    assert seeds == plain and plain == seeds and list(seeds) == plain and len(seeds) == 10
    assert [seeds[place] for place in range(-10, 10)] == [plain[place] for place in range(-10, 10)]
    for start in range(-11, 12):
        for stop in range(-11, 12):
            assert seeds[start:stop] == plain[start:stop]
    assert seeds[::3] == plain[::3] and seeds != plain[1:] and len(Seeds()) == 0
    with pytest.raises(IndexError):
        seeds[10]


def test_a_billion_seeds_take_no_memory_and_no_time():
    began = time.perf_counter()
    seeds = parse_seeds("0-999999999,5,7-9")
    assert len(seeds) == 1_000_000_004 and seeds[-1] == 9 and seeds[10**9 - 1 : 10**9 + 2] == [999999999, 5, 7]
    shares = [World(rank, 3).share(seeds) for rank in range(3)]
    assert {len(share) for share in shares} == {333_333_335} and shares[2][-1] == 9
    assert time.perf_counter() - began < 0.1


@pytest.mark.parametrize("count", [1, 5, 8, 9])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_are_those_of_a_list(count, size):
    whole = list(range(count))
    each = -(-count // size)
    padded = []
    for rank in range(size):
        expected = whole[rank * each : (rank + 1) * each]
        expected += [whole[-1]] * (each - len(expected))
        assert list(World(rank, size).share(range(count))) == list(World(rank, size).share(whole)) == expected
        padded += expected
    assert padded[:count] == whole
