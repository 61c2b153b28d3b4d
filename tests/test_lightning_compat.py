from __future__ import annotations

import ast
import copy
import importlib
import pickle
from pathlib import Path
from typing import get_type_hints

import pytest
from torch.utils.data import DataLoader

import autobatch
from autobatch._undo import patched
from lightning_here import Model, data, quiet_trainer, tuner

FOLDER = Path(importlib.import_module("autobatch.lightning").__file__).parent
# Private names of torch and typing, and a public one of named tuples
OF_OTHERS = {
    "_post_accumulate_grad_hooks",
    "_foreach_copy_",
    "_milestones",
    "_schedulers",
    "_version",
    "_iterator",
    "_replace",
    "_pre_forward",
    "_is_protocol",
}
package = importlib.import_module("autobatch.lightning._package")


class Owner:
    """An object with a method, an attribute of its own, and a property."""

    def __init__(self):
        self.own = 1
        self._held = 2

    def method(self):
        return "method"

    @property
    def held(self):
        return self._held

    @held.setter
    def held(self, value):
        self._held = value


def test_patched_attributes_are_restored_exactly():
    owner = Owner()
    before = dict(vars(owner))

    with patched(owner, own=10, held=20, method=lambda: "patched", new=30):
        assert (owner.own, owner.held, owner.method(), owner.new) == (10, 20, "patched", 30)

    assert vars(owner) == before


def test_patched_attributes_are_restored_after_an_error():
    owner = Owner()
    before = dict(vars(owner))

    with pytest.raises(RuntimeError), patched(owner, own=10, method=None):
        raise RuntimeError

    assert vars(owner) == before


def test_patches_of_one_attribute_nest():
    owner = Owner()

    with patched(owner, own=2):
        with patched(owner, own=3):
            assert owner.own == 3
        assert owner.own == 2

    assert owner.own == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_patch_in_force_can_be_copied_and_pickled(copied):
    owner = Owner()

    with patched(owner, own=2, method=Owner) as patch:
        other_owner, other_patch = copied((owner, patch))
        other_patch.restore()

        assert owner.own == 2
        assert vars(other_owner) == vars(Owner())


MISSING = [
    "_logger_connector",
    "fit_loop.epoch_loop.val_loop._data_source.dataloader",
    "CombinedLoader._mode",
]


def without(name):
    """The declarations of a Trainer with one that no Lightning has."""
    last = name.rpartition(".")[2]
    return lambda protocol: {
        "_gone" if each == last else each: kind for each, kind in get_type_hints(protocol).items()
    }


@pytest.mark.parametrize("name", MISSING)
def test_a_lightning_that_lacks_a_name_is_refused(monkeypatch, name):
    monkeypatch.setattr(package, "get_type_hints", without(name))
    path = name.rpartition(".")[0]
    expected = f"{path}._gone" if path else "_gone"

    with pytest.raises(autobatch.AutobatchError, match=rf"has no {expected} where AutoBatch looks"):
        quiet_trainer(tuner()).fit(Model(), DataLoader(data(), batch_size=4))


def test_the_installed_lightning_lacks_nothing():
    class Asks(autobatch.lightning.AutoBatch.__base__):
        def setup(self, trainer, pl_module, stage):
            found.append(package.missing_name(trainer))

    found = []
    quiet_trainer(Asks()).fit(Model(), DataLoader(data(), batch_size=4))

    assert found == [None]


def private_names(tree):
    """Yield private attributes of other objects, and names in `getattr` and `patched`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr"), args=[_, ast.Constant(value=name), *_]
            ):
                yield str(name)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(FOLDER.glob("*.py")) if path.name != "_compat.py"],
    ids=lambda path: path.name,
)
def test_only_compat_knows_private_names_of_lightning(path):
    names = set(private_names(ast.parse(path.read_text(encoding="utf-8"))))

    assert {name for name in names if name.startswith("_") and not name.endswith("__")} <= OF_OTHERS
