"""The splits of a data set by name, each opened when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hf_fasttrain.data.source.columns import Columns
from hf_fasttrain.data.source.inventory import Inventory


class Splits(Mapping[str, Any]):
    """Split name -> an HF dataset or a FileSplit; a split that is not used is not opened.

    `inventory` and `notes` grow as splits are opened.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Any]],
        inventory: Inventory | None = None,
        notes: Sequence[str] = (),
        use: Callable[[Iterable[str]], object] = list,
        columns: Columns | None = None,
    ) -> None:
        self._openers, self._opened = dict(openers), dict[str, Any]()
        self.inventory, self.notes = inventory, notes
        self.columns = columns  # if the form of the data decides them
        self.use = use  # to be called with the names of all splits that will be opened, before the first one is

    def __getitem__(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = self._openers[name]()
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._openers

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)

    def notes_on(self, used: Iterable[str], max_bad_fraction: float) -> list[str]:
        """Return what the user should know once the splits that are used are open.

        Raises DataError if more than `max_bad_fraction` of one's images are left out.
        """
        if self.inventory is None:
            return list(self.notes)
        self.inventory.require_few(used, max_bad_fraction)
        return [*self.inventory.note(), *self.notes]


def opened(splits: Mapping[str, Any]) -> Splits:
    """Return splits that are open already."""
    return Splits({name: partial(splits.__getitem__, name) for name in splits})
