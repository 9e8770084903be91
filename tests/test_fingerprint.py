"""The fingerprint of callables: what computes the same counts as one, in every process."""

import collections
import dataclasses
import enum
import functools
import importlib
import itertools
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from rabbet.fingerprint import Untold, fingerprint


def powered(power):
    return lambda outputs, _: (outputs**power).sum()


def defaulted(power):
    def loss(outputs, power=power):
        return outputs**power

    return loss


def keyword(power):
    def loss(outputs, *, power=power):
        return outputs**power

    return loss


def sourced(text, **names):
    """A function from its text, in a module of its own."""
    module = types.ModuleType("of_the_user")
    vars(module).update(names)
    exec(text, vars(module))
    return module.f


class Scaled:
    def __init__(self, k):
        self.k, self.words = k, {"alpha", "beta", "gamma", "delta"}

    def __call__(self, outputs, _):
        return self.k * outputs.sum()

    def method(self):
        return self.k


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    k: int


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def subclass(body):
    return type("Own", (nn.Module,), {"forward": sourced(body)})()


def teacher(seed):
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    return lambda outputs: F.mse_loss(outputs, net(outputs))


def held(value):
    """A closure over a value."""
    return lambda: value


def recursive(step):
    def f(n):
        return 0 if n < step else f(n - step)

    return f


class Halved(torch.Tensor):
    def sum(self):
        return super().sum() / 2


def tagged(tensor, tag):
    tensor.tag = tag
    return tensor


ADD, TAKE = "def f(x): return x + 1", "def f(x): return x - 1"
PAIRS = {
    "a constant in a closure": (powered(2), powered(4)),
    "a constant": (lambda x: x + 1, lambda x: x + 2),
    "an operation": (lambda x: x + 1, lambda x: x - 1),
    "a name": (lambda x: x.sum(), lambda x: x.mean()),
    "a default": (defaulted(2), defaulted(3)),
    "a keyword's default": (keyword(2), keyword(3)),
    "a global": (sourced("def f(x): return x * K", K=2), sourced("def f(x): return x * K", K=3)),
    "a global's code": (
        sourced("def f(x): return g(x)", g=sourced(ADD)),
        sourced("def f(x): return g(x)", g=sourced(TAKE)),
    ),
    "a global of a function within": (
        sourced("def f(x): return [K for _ in x]", K=2),
        sourced("def f(x): return [K for _ in x]", K=3),
    ),
    "an attribute of a function": (
        sourced("def f(): return f.k\nf.k = 1"),
        sourced("def f(): return f.k\nf.k = 2"),
    ),
    "an object's state": (Scaled(1), Scaled(2)),
    "a bound method": (Scaled(1).method, Scaled(2).method),
    "slots": (Slotted(1), Slotted(2)),
    "a partial": (functools.partial(torch.add, alpha=1), functools.partial(torch.add, alpha=2)),
    "a cached function": (functools.lru_cache(powered(2)), functools.lru_cache(powered(3))),
    "a module's settings": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "a module in a closure": (teacher(0), teacher(1)),
    "a class's code": (subclass(ADD), subclass(TAKE)),
    "a tensor of another type": (held(torch.ones(2)), held(torch.ones(2).double())),
    "a tensor of another shape": (held(torch.ones(4)), held(torch.ones(2, 2))),
    "an array": (held(torch.ones(3000).numpy()), held(torch.arange(3000.0).numpy())),
    "a tensor of another class": (held(torch.ones(2)), held(torch.ones(2).as_subclass(Halved))),
    "what hangs on a tensor": (held(tagged(torch.ones(2), 1)), held(tagged(torch.ones(2), 2))),
    "a mask": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0])),
    "functions of torch": (F.mse_loss, F.l1_loss),
    "builtins": (torch.relu, torch.sigmoid),
    "members": (Colour.RED, Colour.BLUE),
    "patterns": (re.compile("a"), re.compile("b")),
    "an order": (collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)),
    "a type": (1, True),
    "a circle": (recursive(1), recursive(2)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_what_computes_something_else_has_another_fingerprint(pair):
    one, other = map(fingerprint, pair)
    assert one != other


@pytest.mark.parametrize(
    "make",
    [
        lambda: powered(2),
        lambda: Scaled(3),
        lambda: teacher(0),
        lambda: sourced(ADD),
        lambda: functools.partial(powered(2), None),
        lambda: subclass(ADD),
        lambda: recursive(1),
    ],
)
def test_what_is_made_twice_has_one_fingerprint(make):
    assert fingerprint(make()) == fingerprint(make())


def test_where_a_function_stands_does_not_count():
    assert fingerprint(sourced(ADD)) == fingerprint(sourced("\n\n# moved\n" + ADD))


def test_a_function_that_has_run_is_the_same():
    f = sourced("def f(x):\n    return sum(K * k for k in range(x))", K=2)
    before = fingerprint(f)
    for _ in range(2000):
        f(3)
    assert fingerprint(f) == before


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        (k for k in "ab"),
        sys.__stdout__,
        Scaled(threading.Lock()),
        held(threading.Lock()),
        {threading.Lock()},
    ],
    ids=["lock", "generator", "file", "within an object", "within a closure", "within a set"],
)
def test_what_cannot_be_told_is_refused(value):
    with pytest.raises(Untold, match="an object of"):
        fingerprint(value)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Load modules of a user, given by their texts, anew; returns the first."""
    versions = itertools.count()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(given=None, **more):
        texts, folder = {**(given or {}), **more}, tmp_path / str(next(versions))
        for name, text in texts.items():
            path = folder / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        names = [name.removesuffix("/__init__").replace("/", ".") for name in texts]
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # to be put back in the end
            del sys.modules[name]
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            return [importlib.import_module(name) for name in reversed(names)][-1]

    return load


@pytest.mark.parametrize("name", ["queue", "profile", "code", "types"])
def test_a_class_counts_by_its_content_though_its_module_is_named_like_a_standard_one(
    name, modules
):
    text = "class Loss:\n    def __call__(self, x): return x"
    one, again, other = (
        fingerprint(modules(**{name: text + end}).Loss()) for end in ("", "  # same", " ** 2")
    )
    assert one == again != other


class Bare(torch.Tensor):
    """A tensor without storage."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def _fake():
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2)] * 2, layout=torch.jagged),
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        _fake,
        Bare,
    ],
    ids=["nested", "jagged", "sparse", "meta", "quantised", "fake", "without storage"],
)
def test_a_tensor_that_cannot_be_read_is_refused(make):
    with pytest.raises(Untold, match="whose numbers cannot be read"):
        fingerprint(held(make()))


H = ("def h(b): return b + 1", "def h(b): return b + 2")
TWO = ("K = 2", "K = 3")
EDITS = {
    "what a function imports from": ("from helper import h; return h(b)", "helper", H),
    "what it imports as a whole": ("import helper; return helper.h(b)", "helper", H),
    "what one within it imports": (
        "g = lambda: [h(b) for h in inner()]\n    def inner(): from helper import h; yield h\n"
        "    return g()",
        "helper",
        H,
    ),
    "a number that it imports": ("from helper import K as k; return b * k", "helper", TWO),
    "a module of a package": ("import pack.part as p; return p.h(b)", "pack/part", H),
    "a package with its modules": ("import pack.part; return pack.part.h(b)", "pack/part", H),
    "a module from a package": ("from pack import part; return part.h(b)", "pack/part", H),
    "what a module that it reads imports": ("return through.h(b)", "helper", H),
    "what a module that it passes on imports": ("return getattr(through, 'h')(b)", "helper", H),
    "what a module within one holds": ("return through.helper.K * b", "helper", TWO),
    "a module's names as a dictionary": ("return through.helper.__dict__['K']", "helper", TWO),
    "what a module makes late": (
        "return through.helper.anything",
        "helper",
        tuple(f"__all__ = []\ndef __getattr__(name): return {k}" for k in (1, 2)),
    ),
}
THROUGH = "import helper\nfrom helper import *"
PACK = {"pack/__init__": ""}
BARE = {"helper": "h = K = None", **PACK, "pack/part": ""}


@pytest.mark.parametrize(("body", "edited", "texts"), EDITS.values(), ids=EDITS)
def test_an_edit_of_what_a_function_reaches_gives_another_fingerprint(body, edited, texts, modules):
    top = "import through\n" if "through" in body else ""
    found = []
    for text in (texts[0], texts[0] + "  # same", texts[1]):
        given = {"user": f"{top}def f(b):\n    {body}", "through": THROUGH, **BARE, edited: text}
        found.append(fingerprint(modules(given).f))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "late", ["from .helper import h", "from . import helper", "from .. import pack"]
)
def test_an_import_counts_from_the_package_of_the_function(late, modules):
    text = f"def f(b):\n    {late}\n    return b"
    package = {"over/__init__": "", "over/pack/__init__": ""}
    one, again, other = (
        fingerprint(modules({"over/pack/user": text, "over/pack/helper": helper, **package}).f)
        for helper in (H[0], H[0], H[1])
    )
    assert one == again
    assert one != other


def test_only_what_is_read_of_a_module_counts(modules):
    user = "import helper\ndef f(b): return helper.h(b)"
    more = "\nimport threading\nlock = threading.Lock()\ndef other(b): return b"
    one, other = (modules(user=user, helper=H[0] + end) for end in ("", more))
    assert fingerprint(one.f) == fingerprint(other.f)


@pytest.mark.parametrize("read", ["settings.NOISE", "vars(settings)['NOISE']"])
def test_what_is_set_in_a_module_at_run_time_counts(read, modules):
    user = modules(user=f"import settings\ndef f(b): return {read} * b", settings="NOISE = 1.0")
    before = fingerprint(user.f)
    user.settings.NOISE = 5.0
    assert fingerprint(user.f) != before
    user.settings.NOISE = 1.0
    assert fingerprint(user.f) == before


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import never_there", "never_there, which is imported when the code runs"),
        ("from pack import never_there", "pack.never_there, which is imported"),
        ("from .pack import part", "an import of .pack outside of any package"),
        ("import helper; return helper", "an object of _thread.lock"),
        ("return vars(helper)", "an object of _thread.lock"),
    ],
)
def test_what_cannot_be_told_of_modules_is_refused(body, said, modules):
    helper = "import threading\nlock = threading.Lock()"
    text = f"import helper\ndef f(b):\n    {body}"
    with pytest.raises(Untold, match=re.escape(said)):
        fingerprint(modules({"user": text, "helper": helper, **PACK}).f)


@pytest.mark.parametrize(
    "body",
    [
        "return globals()['K'] * b",
        "return eval('K') * b",
        "return __import__('helper').K * b",
        "import importlib; return importlib.import_module('helper').K * b",
        "import os; return float(os.environ['K']) * b",
        "from os import getenv; return float(getenv('K')) * b",
    ],
)
def test_what_code_reads_unseen_is_refused(body, modules):
    text = f"K = 2.0\ndef f(b):\n    {body}"
    with pytest.raises(Untold, match="code that uses "):
        fingerprint(modules({"user": text, "helper": "K = 1.0"}).f)


def test_a_method_that_is_called_like_a_builtin_is_none(modules):
    fingerprint(modules({"user": "def f(model):\n    return model.eval()"}).f)


@pytest.mark.parametrize("name", ["colorsys", "rich"])
def test_what_is_installed_counts_by_its_name_whether_it_is_loaded_or_not(name, monkeypatch):
    late = sourced(f"def f(x):\n    import {name}\n    return {name}.y(x)")
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    before = fingerprint(late)
    importlib.import_module(name)
    assert fingerprint(late) == before


@pytest.mark.slow
def test_modules_of_the_user_are_the_same_in_another_process(modules, tmp_path):
    text = "import through\ndef f(b):\n    import helper\n    return through.h(b), through"
    helper = H[0] + "\nfrom typing import TypeVar\nT = TypeVar('T')\nNAMES = {'alpha', 'beta'}"
    here = fingerprint(modules(user=text, through=THROUGH, helper=helper).f)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / '0')!r}); import user\n"
        "from rabbet.fingerprint import fingerprint; print(fingerprint(user.f))"
    )
    assert {_said(code, seed).strip() for seed in ("1", "2")} == {here}


def _said(code, seed):
    """What a process of its own prints; seed: of its hashes, by which sets are ordered."""
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_another_process_with_other_hashes_finds_the_same():
    names = (
        "Scaled(1)",
        "powered(3)",
        "teacher(0)",
        "Colour.RED",
        "Scaled(2).method",
        "Slotted(1)",
    )
    said = "lambda x: x in {'alpha', 'beta', 'gamma', 'delta'}"
    values = ", ".join([*names, said])
    code = f"from test_fingerprint import *\nfor v in ({values}): print(fingerprint(v))"
    assert len({_said(code, seed) for seed in ("1", "2")}) == 1


@pytest.mark.slow
def test_every_known_network_can_be_told_and_is_the_same_in_another_process():
    code = (
        "from networks import NETWORKS, network\nfrom rabbet.fingerprint import fingerprint\n"
        "for name in NETWORKS: print(name, fingerprint(network(name).model))"
    )
    assert len({_said(code, seed) for seed in ("1", "2")}) == 1
