"""Long sequences in parts: seeds stay ranges, however many they are."""

import bisect
from collections.abc import Sequence


class Seeds(Sequence):
    """Several sequences (ranges, mostly) one after the other, without a list of what is in them.

    Its slices are of the same kind; it equals any sequence of the same things.
    """

    def __init__(self, *parts):
        self.parts = tuple(part for part in parts if len(part))
        self.ends = []  # where each part ends
        for part in self.parts:
            self.ends.append(len(part) + (self.ends[-1] if self.ends else 0))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[place] for place in range(start, stop, step)]
            return Seeds(*self._between(start, stop))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, place)
        return self.parts[number][place - self.ends[number]]

    def _between(self, start, stop):
        for part, end in zip(self.parts, self.ends):
            first = end - len(part)
            if first < stop and start < end:
                yield part[max(start - first, 0) : stop - first]

    def __iter__(self):
        for part in self.parts:
            yield from part

    def __eq__(self, other):
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None

    def __repr__(self):
        return f"Seeds({', '.join(map(repr, self.parts))})"


class Cycled(Sequence):
    """A sequence `items` over and over, up to `count` of them, without a list of all."""

    def __init__(self, items, count):
        self.items, self.count = list(items), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.count))]
        place = index + self.count if index < 0 else index
        if not 0 <= place < self.count:
            raise IndexError(index)
        return self.items[place % len(self.items)]
