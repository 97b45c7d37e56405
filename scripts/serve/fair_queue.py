"""The requests that wait: bounded, and fair between clients."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each client; clients take turns.

    Args:
        max_items: items that may wait.
        max_per_client: of one client; by default as many as there may be in all.
    """

    def __init__(self, max_items: int, max_per_client: int | None = None) -> None:
        self.max_items, self.max_per_client = max_items, max_per_client or max_items
        self._waiting: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self._count = 0  # read by other threads while the queue changes

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """In the order in which they will be taken if no other comes."""
        columns = [list(items) for items in self._waiting.values()]
        for turn in range(max(map(len, columns), default=0)):
            yield from (items[turn] for items in columns if turn < len(items))

    def is_full(self, client: Hashable) -> bool:
        """Whether another item of this client has no place."""
        return len(self) >= self.max_items or len(self._waiting.get(client, ())) >= self.max_per_client

    def put(self, client: Hashable, item: T) -> None:
        self._waiting.setdefault(client, deque()).append(item)
        self._count += 1

    def take(self) -> T:
        """The next item; its client's turn comes again after those of the others. IndexError where none waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        self._count -= 1
        if items:
            self._waiting[client] = items
        return item

    def remove(self, item: T) -> bool:
        """Take out one item, and tell whether it was there."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                self._count -= 1
                if not items:
                    del self._waiting[client]
                return True
        return False
