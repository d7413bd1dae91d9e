"""Keys and values of prompts that later requests may begin with.

Knows token ids and their keys and values; nothing of models or rounds.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

_LEAST_TOKENS = 16


class PromptStore:
    """A bounded store; what was not used for longest is dropped first.

    What is found was put under the same partition, a name that the application gives, and has the
    very same token ids: a request neither gets nor notices what is in another partition's. That
    others are busy it may notice, as it does by any load: the memory is one for all of them.

    Args:
        max_bytes: Most memory of all that is stored, at least 0; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], list[Tensor]] = OrderedDict()

    def find(self, partition: str, ids: Sequence[int]) -> tuple[int, list[Tensor]]:
        """Return how many of the first token ids are known, and keys and values of these and more."""
        longest, found = 0, None
        for key in self._entries:
            if key[0] == partition:
                length = num_common(key[1], ids)
                if length > longest:
                    longest, found = length, key
        if found is None or longest < _LEAST_TOKENS:
            return 0, []
        self._entries.move_to_end(found)
        return longest, self._entries[found]

    def wants(self, partition: str, ids: Sequence[int]) -> bool:
        """Whether a prompt would be stored: it is long enough and not known already."""
        return bool(
            self.max_bytes
            and partition
            and len(ids) >= _LEAST_TOKENS
            and self.find(partition, ids)[0] < len(ids)
        )

    def put(self, partition: str, ids: Sequence[int], states: list[Tensor]) -> None:
        """Store keys and values of a prompt, in place of those that it continues."""
        size = _num_bytes(states)
        if size > self.max_bytes:
            return
        for key in [key for key in self._entries if key[0] == partition]:
            if len(key[1]) <= len(ids) and num_common(key[1], ids) == len(key[1]):
                self.num_bytes -= _num_bytes(self._entries.pop(key))
        self._entries[partition, tuple(ids)] = states
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _num_bytes(self._entries.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.num_bytes = 0


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences of the same type or not."""
    one, other = tuple(one), tuple(other)
    known, unknown = 0, min(len(one), len(other))
    while known < unknown:
        middle = (known + unknown + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            unknown = middle - 1
    return known


def _num_bytes(states: Sequence[Tensor]) -> int:
    return sum(state.numel() * state.element_size() for state in states)
