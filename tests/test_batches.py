"""Containers of a batch: leaves, rows, some of the samples."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
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
class Derived:
    x: Any
    count: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "count", len(self.x))


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
        Derived,
        lambda x: [{"x": (Named(Derived(x), 1),)}],
    ],
)
def test_containers_keep_their_kind(container):
    x = torch.arange(4.0)

    half = cut(container(x), 4, slice(0, 2))

    expected = container(x[:2])
    assert type(half) is type(expected)
    assert str(half) == str(expected)
    assert row_counts(half) == {2}


def test_list_of_plain_values_is_one_leaf():
    assert list(leaves({"names": ["a", "b"], "ids": (1, 2), "mixed": [1, object]})) == [
        ["a", "b"],
        (1, 2),
        1,
        object,
    ]
