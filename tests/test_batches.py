"""Containers of a batch: leaves, rows, some of the samples."""

from __future__ import annotations

import collections
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from autobatch._trials.batches import cut, leaves, row_counts
from sameness import same


@dataclass
class Pair:
    x: torch.Tensor
    names: list[str]


def test_cut_reaches_all_parts_and_copies_tensors():
    x = torch.arange(4.0)
    batch = {"pair": Pair(x, ["a", "b", "c", "d"]), "more": [(x + 1, 7), None]}

    rest = cut(batch, 4, slice(1, 4))

    assert same(rest["pair"].x, torch.tensor([1.0, 2.0, 3.0]))
    assert rest["pair"].names == ["b", "c", "d"]
    assert same(rest["more"][0][0], torch.tensor([2.0, 3.0, 4.0]))
    assert rest["more"][0][1] == 7
    assert rest["more"][1] is None
    assert row_counts(batch) == {4}
    rest["pair"].x.zero_()
    assert x.sum() == 6


class Named(NamedTuple):
    x: Any
    y: Any


class Mapping(collections.UserDict):
    pass


class Sequence(list):
    pass


@dataclass(frozen=True)
class Frozen:
    x: Any


@dataclass(frozen=True, slots=True)
class Slots:
    x: Any


@dataclass
class Scaled:
    x: Any
    scale: InitVar[float]

    def __post_init__(self, scale):
        self.x = self.x * scale


@dataclass
class Collated:
    x: Any
    missing: Any = field(init=False)

    def __init__(self, samples):
        self.x = torch.stack(samples)


class Incremented(Named):
    def __new__(cls, x):
        return super().__new__(cls, x + 1, None)


class OwnMapping(collections.abc.MutableMapping):
    """Keeps its items in a dict, which a shallow copy shares."""

    def __init__(self, **items):
        self.items_by_name = items

    def __getitem__(self, key):
        return self.items_by_name[key]

    def __setitem__(self, key, value):
        self.items_by_name[key] = value

    def __delitem__(self, key):
        del self.items_by_name[key]

    def __iter__(self):
        return iter(self.items_by_name)

    def __len__(self):
        return len(self.items_by_name)


@pytest.mark.parametrize(
    "container",
    [
        lambda x: x,
        lambda x: [x, 7, [1, 2, 3]],
        lambda x: (x, "name"),
        lambda x: Named(x, None),
        lambda x: {"x": x},
        lambda x: collections.OrderedDict(x=x),
        lambda x: collections.defaultdict(list, x=x),
        lambda x: Mapping(x=x),
        lambda x: Sequence([x]),
        Frozen,
        lambda x: [{"x": (Named(Frozen(x), 1),)}],
    ],
)
def test_containers_keep_their_kind(container):
    x = torch.arange(4.0)

    half = cut(container(x), 4, slice(0, 2))

    expected = container(x[:2])
    assert type(half) is type(expected)
    assert str(half) == str(expected)
    assert row_counts(half) == {2}


@pytest.mark.parametrize(
    "container",
    [
        Slots,
        lambda x: Scaled(x, 0.5),
        lambda x: Collated([*x]),
        Incremented,
        lambda x: OwnMapping(x=x),
        lambda x: torch.stack([x, x], 1).max(1),
    ],
)
def test_parts_are_made_by_no_constructor(container):
    """It would take other arguments, or change the tensors a second time."""
    batch = container(torch.arange(4.0))
    (before, *_) = [leaf.clone() for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]

    halves = [cut(batch, 4, rows) for rows in (slice(0, 2), slice(2, 4))]

    assert all(type(half) is type(batch) for half in halves)
    assert same(torch.cat([next(iter(leaves(half))) for half in halves]), before)
    assert same(next(iter(leaves(batch))), before)


def test_list_of_plain_values_is_one_leaf():
    assert list(leaves({"names": ["a", "b"], "ids": (1, 2), "mixed": [1, object]})) == [
        ["a", "b"],
        (1, 2),
        1,
        object,
    ]
