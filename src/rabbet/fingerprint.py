"""A hash of what a value is and a callable computes, the same in every process.

A function counts by its code, constants, defaults, closure, the globals that it reads and what it
imports when it runs; an object by its class and its state, as it would describe them to `pickle`
(nothing is pickled); a set whatever its order. What is installed, such as torch, counts by its
name and version, what is the user's by its content. The content of a module is what code reads of
it (`module.name`), as it is now; all that it holds, where code passes the module itself on. Nothing
here depends on addresses, on `hash` or on line numbers.
"""

import copyreg
import dis
import functools
import hashlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rabbet.origin import OWN, installed, known, known_late, version

ATOMS = {type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range}
NAMED = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
READS = {"LOAD_ATTR", "LOAD_METHOD"}
# Builtins, and attributes, through which code reads what cannot be seen in it.
DYNAMIC = {"eval", "exec", "globals", "__import__"}
OUTSIDE = {"environ", "environb", "expandvars", "getenv", "import_module", "argv", "f_globals"}
UNSEEN = (eval, exec, globals, __import__, os.getenv, importlib.import_module)
LATE = "__getattr__"  # what a module has that makes attributes when they are read
GENERATED = {"_abc_impl", "__dict__", "__weakref__"}


class Untold(Exception):  # noqa: N818 (no error: the caller does without)
    """Two of such a value could not be told apart; the message says what it is."""


def fingerprint(value: Any) -> str:
    """A hash of a value; raises Untold for one that holds what cannot be told apart."""
    try:
        return _Reader().digest(value).hex()
    except RecursionError:
        raise Untold("something nested without end") from None


class _Reader:
    """One walk through a value.

    done: the digests of what was read, with the object, so that no other takes its address. open:
    what is being read, so that a circle is told by how far back it leads.
    """

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, bytes]] = {}
        self.open: list[int] = []

    def digest(self, value: Any) -> bytes:
        """The hash of one value and all that it holds."""
        if type(value) in ATOMS:
            return _hash(type(value).__name__, [repr(value).encode()])
        place = id(value)
        if place in self.done:
            return self.done[place][1]
        if place in self.open:
            return _hash("circle", [str(self.open.index(place)).encode()])
        self.open.append(place)
        try:
            digest = self._read(value)
        finally:
            self.open.pop()
        self.done[place] = value, digest
        return digest

    def _read(self, value: Any) -> bytes:
        if any(value is one for one in UNSEEN):
            raise Untold(f"code that uses {value.__name__}")
        if isinstance(value, Tensor):
            return self.tensor(value)
        plain = type(value) is np.ndarray or isinstance(value, np.generic)
        if plain and not value.dtype.hasobject:  # others, with a mask say, describe themselves
            facts = f"{value.dtype} {value.shape}"
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            return _hash("array", [facts.encode(), flat.data])
        if type(value) in (set, frozenset):  # each by a reader of its own: in no order
            return _hash(type(value).__name__, sorted(_Reader().digest(v) for v in value))
        if type(value) in (list, tuple):
            return self.every(type(value).__name__, value)
        if isinstance(value, dict) and type(value) is dict:
            return self.every("dict", (part for item in value.items() for part in item))
        reader = _READERS.get(type(value))
        if reader is not None:
            return reader(self, value)
        if isinstance(value, types.ModuleType):  # or of a class of its own
            return self.module(value)
        return self.of_class(value) if isinstance(value, type) else self.of_object(value)

    def every(self, kind: str, parts: Iterable[Any]) -> bytes:
        return _hash(kind, [self.digest(part) for part in parts])

    def tensor(self, value: Tensor) -> bytes:
        untold = Untold(f"a {type(value).__qualname__} whose numbers cannot be read")
        if value.layout != torch.strided or value.is_nested or value.is_meta or value.is_quantized:
            raise untold
        facts = f"{value.dtype} {list(value.shape)} {value.requires_grad}"
        try:
            flat = value.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
            content = flat.view(torch.uint8).numpy().data
        except Exception:  # without storage, or a class of its own, which raises anything
            raise untold from None
        told = [self.of_class(type(value)), self.digest(vars(value))]
        return _hash("tensor", [facts.encode(), content, *told])

    def function(self, value: types.FunctionType) -> bytes:
        code = value.__code__
        top = (value.__module__ or "").partition(".")[0]
        theirs = installed(code.co_filename) or top == OWN
        if theirs and _found(value) is value:
            return self.name(value)
        return self.every(
            "function",
            (
                code,
                value.__defaults__,
                value.__kwdefaults__,
                [_content(cell) for cell in value.__closure__ or ()],
                [] if theirs else [_read_by(value), _imported_by(value)],
                {k: v for k, v in sorted(vars(value).items()) if k != "__wrapped__"},
            ),
        )

    def code(self, value: types.CodeType) -> bytes:
        facts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        table = getattr(value, "co_exceptiontable", b"")
        return self.every("code", (value.co_code, table, *facts, *names, *value.co_consts))

    def builtin(self, value: Any) -> bytes:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            where = value.__module__ or getattr(owner, "__name__", "")
            if not known(where):
                raise Untold(f"{where}.{value.__name__}, whose source is not there")
            return self.name(value)
        if isinstance(owner, type) and known(owner.__module__):
            return self.name(value)
        return self.every("method", (value.__name__, owner))

    def name(self, value: Any) -> bytes:
        module = getattr(value, "__module__", None) or ""
        owner = getattr(value, "__objclass__", None)
        where = module if owner is None else f"{owner.__module__}.{owner.__qualname__}"
        top = sys.modules.get(where.partition(".")[0])
        release = "" if where.startswith(f"{OWN}.") else str(getattr(top, "__version__", ""))
        name = getattr(value, "__qualname__", None) or value.__name__
        return _hash("name", [where.encode(), name.encode(), release.encode()])

    def module(self, value: types.ModuleType) -> bytes:
        """A module that is passed on as it is: all that it holds may count."""
        name, file = value.__name__, getattr(value, "__file__", None) or ""
        if known(name, value):
            top = sys.modules.get(name.partition(".")[0])
            return self.every("name", (name, str(getattr(top, "__version__", ""))))
        if type(value) is not types.ModuleType or file.endswith(tuple(EXTENSION_SUFFIXES)):
            raise Untold(f"the module {name}, whose source is not there")
        held = {k: v for k, v in sorted(vars(value).items()) if k == LATE or not _dunder(k)}
        return self.every("module", (held,))

    def of_class(self, value: type) -> bytes:
        if known(value.__module__):
            return self.name(value)
        content = {
            k: v
            for k, v in sorted(vars(value).items())
            if k not in GENERATED and (callable(v) or isinstance(v, _WRAPPED) or k[:2] != "__")
        }
        return self.every("class", (value.__qualname__, content, *value.__bases__))

    def of_object(self, value: Any) -> bytes:
        """Any other object, as it describes itself to be built anew."""
        describe = copyreg.dispatch_table.get(type(value))
        try:
            described = value.__reduce_ex__(4) if describe is None else describe(value)
        except Exception:  # whatever the class raises
            raise Untold(_shown(value)) from None
        if isinstance(described, str):
            if not known(getattr(value, "__module__", None) or type(value).__module__):
                raise Untold(_shown(value))
            return _hash("global", [type(value).__qualname__.encode(), described.encode()])
        make, given, state, *items = (*described, None, None, None)[:5]
        contents = [list(part) if part is not None else None for part in items]
        return self.every("object", (type(value), make, given, _own(value, state), *contents))


def _hash(kind: str, parts: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _own(value: Any, state: Any) -> Any:
    """The state of an object by name, without what it has only worked out and kept."""
    if type(state) is not dict:
        return state
    cached = functools.cached_property
    kept = {k for k in state if isinstance(getattr(type(value), str(k), None), cached)}
    return {k: state[k] for k in state if k not in kept}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is bound later
        return ...


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _paths(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The globals that code reads, each with the attributes that are read of it at once."""
    steps = _steps(code)
    for k, step in enumerate(steps):
        if step.opname.startswith("LOAD") and step.opname.endswith(("GLOBAL", "GLOBALS", "NAME")):
            after = (steps[i] for i in range(k + 1, len(steps)))
            then = itertools.takewhile(lambda s: s.opname in READS, after)
            yield (str(step.argval), *(str(s.argval) for s in then))


def _read_by(function: types.FunctionType) -> dict[str, Any]:
    """What a function reads of globals, by name.

    Of the user's modules among them, and of those in them, only the attributes that it reads.
    """
    space, found = function.__globals__, {}
    for code in _codes(function.__code__):
        called = {first for first, *_ in _paths(code)} - space.keys()
        for name in sorted(called & DYNAMIC | set(code.co_names) & OUTSIDE):
            raise Untold(f"code that uses {name}")
    for first, *rest in sorted({p for code in _codes(function.__code__) for p in _paths(code)}):
        if first not in space:  # a builtin
            continue
        name, at = first, space[first]
        for part in rest:
            if not isinstance(at, types.ModuleType) or known(at.__name__, at):
                break
            name, at = f"{name}.{part}", _member(at, part)
        found[name] = at
    return found


def _member(module: types.ModuleType, name: str) -> Any:
    """What code gets that reads an attribute of a module; `...` if there is none as yet."""
    held = vars(module)
    if type(module) is not types.ModuleType or (_dunder(name) and name not in held):
        return module  # a class of its own may work it out; `__dict__` is all that it holds
    return held.get(name, held.get(LATE, ...))


def _imports(code: types.CodeType) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """What code imports: how many packages up, from where, and which names (none: the module)."""
    steps = _steps(code)
    for k, step in enumerate(steps):
        if step.opname != "IMPORT_NAME":
            continue
        level, names = (s.argval for s in steps[k - 2 : k])
        name = str(step.argval)
        if names is None and steps[k + 1].opname != "IMPORT_FROM":
            name = name.partition(".")[0]  # `import a.b` gives a, and `import a.b as c` only a.b
        yield level, name, names or ()


def _imported_by(function: types.FunctionType) -> dict[str, Any]:
    """What a function imports when it runs, by name; raises Untold for what is not loaded yet."""
    space, found = function.__globals__, {}
    package = space.get("__package__") or str(space.get("__name__", "")).rpartition(".")[0]
    for level, name, members in {i for code in _codes(function.__code__) for i in _imports(code)}:
        try:
            full = importlib.util.resolve_name("." * level + name, package)
        except ImportError:
            raise Untold(f"an import of {'.' * level}{name} outside of any package") from None
        if known_late(full):
            found[full] = version(full.partition(".")[0])  # whether it is loaded yet or not
            continue
        for member in members or ("",):
            part = f"{full}.{member}" if member else full
            module = sys.modules.get(full)
            at: Any = module
            if module is not None and member:
                at = _member(module, member)
                at = sys.modules.get(part) if at is ... else at
            if at is None and (module is None or member not in vars(module)):
                raise Untold(f"{part}, which is imported when the code runs and is not loaded yet")
            found[part] = at
    return dict(sorted(found.items()))


def _found(value: Any) -> Any:
    """What stands under the name that a function goes by."""
    at: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        at = getattr(at, name, None)
    return at


def _shown(value: Any) -> str:
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"


_WRAPPED = (property, staticmethod, classmethod, functools.cached_property)
_READERS: Mapping[type, Callable[[_Reader, Any], bytes]] = {
    types.FunctionType: _Reader.function,
    types.CodeType: _Reader.code,
    types.BuiltinFunctionType: _Reader.builtin,
    types.MethodType: lambda read, m: read.every("method", (m.__func__, m.__self__)),
    types.MethodWrapperType: lambda read, m: read.every("method", (m.__name__, m.__self__)),
    types.MappingProxyType: lambda read, m: read.every("mapping", (dict(m),)),
    functools.partial: lambda read, p: read.every(
        "partial", (p.func, p.args, dict(sorted(p.keywords.items())))
    ),
    TypeVar: lambda read, t: read.every(
        "type", (t.__name__, t.__bound__, t.__constraints__, t.__covariant__, t.__contravariant__)
    ),
    property: lambda read, p: read.every("property", (p.fget, p.fset, p.fdel)),
    staticmethod: lambda read, m: read.every("static", (m.__func__,)),
    classmethod: lambda read, m: read.every("of the class", (m.__func__,)),
    type(functools.lru_cache(len)): lambda read, f: read.every("cached", (f.__wrapped__,)),
    functools.cached_property: lambda read, p: read.every("cached", (p.func,)),
    **dict.fromkeys(NAMED, _Reader.name),
}
"""How what has no state of its own, or hides it, is read, by its exact type."""
