"""What a class's forward reads of the modules below it without calling them, found in its code once for each class.

Looked at is every function that its `forward` can reach, and the functions those hand modules on to. Where the source
is not at hand, the bytecode is, which shows what is read directly.
"""

import ast
import dis
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

Path = tuple[str, ...]
"""Attributes from the reading module on; ANY stands for an index or a key."""
Guards = tuple[tuple[ast.expr, str, bool], ...]
"""Conditions around a piece of code: the test, what its function calls the module itself, and which way it must go."""
ParameterRead = tuple[Path, str, Guards]
"""A module below the reading one, the parameter of it that is read, and under which conditions."""

ANY = "*"
_PARAMETERS = frozenset({"weight", "bias"})
_ABOUT = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "is_meta", "requires_grad", "layout"}
    | {"element_size", "itemsize", "is_floating_point", "is_quantized", "__class__"}
)
"""What may be asked of a weight without using its numbers."""
_QUESTIONS = frozenset({"isinstance", "hasattr", "type", "id", "callable"})
_DEEPEST, _FURTHEST = 6, 4
_known: WeakKeyDictionary[type[nn.Module], frozenset[ParameterRead]] = WeakKeyDictionary()


def reads(kind: type[nn.Module]) -> frozenset[ParameterRead]:
    """What the forward of a class reads of the modules below it."""
    if kind not in _known:
        found: set[ParameterRead] = set()
        for function in _reached(kind):
            if _names(function.__code__) & _PARAMETERS or _hands_on(function, kind):
                first = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
                _Reader(kind, function, {name: {()} for name in first}, found).look()
        _known[kind] = frozenset(found)
    return _known[kind]


def _reached(kind: type) -> list[FunctionType]:
    """The functions of a class that its forward can reach, through any attribute it mentions."""
    pending, seen, found = ["forward"], {"forward"}, []
    while pending:
        for function in _defined(kind, pending.pop()):
            found.append(function)
            for name in _names(function.__code__) - seen:
                seen.add(name)
                pending.append(name)
    return found


def _defined(kind: type, name: str) -> Iterator[FunctionType]:
    """What a class means by a name; its parents' too where it asks `super()` for them."""
    for one in kind.__mro__:
        if one is nn.Module:
            return
        if name in vars(one):
            functions = [*_functions(vars(one)[name])]
            yield from functions
            if not any("super" in _names(function.__code__) for function in functions):
                return


def _functions(member: Any, deep: int = 0) -> Iterator[FunctionType]:
    """The Python functions in a method, a property or a decorated one."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    member = getattr(member, "__func__", member)
    if isinstance(member, FunctionType) and deep < _FURTHEST:
        yield member
        for cell in member.__closure__ or ():
            try:
                yield from _functions(cell.cell_contents, deep + 1)
            except ValueError:  # not filled yet
                continue


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Every attribute and global that code mentions, inner functions included, and its texts (for `getattr`)."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    texts = [constant for constant in code.co_consts if isinstance(constant, str) and constant in _PARAMETERS]
    return frozenset(code.co_names).union(texts, *inner)


def _hands_on(function: FunctionType, kind: type) -> bool:
    """Whether a function mentions another one that reads parameters: a module may be given to it."""
    return any(_names(other.__code__) & _PARAMETERS for other in _mentioned(function, kind))


def _mentioned(function: FunctionType, kind: type) -> Iterator[FunctionType]:
    for name in _names(function.__code__):
        other = function.__globals__.get(name)
        if isinstance(other, FunctionType):
            yield other
        yield from _defined(kind, name)


def _parsed(function: FunctionType) -> ast.AST | None:
    """A function's source as a tree; None where there is none. inspect.getsource would look at every module first."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        return ast.parse(textwrap.dedent("".join(inspect.getblock(lines[code.co_firstlineno - 1 :])))).body[0]
    except (SyntaxError, IndexError):
        return None


def _in_bytecode(code: CodeType) -> Iterator[ParameterRead]:
    """Reads of the form `self.a.b.weight`."""
    way: list[str] = []
    steps = [*dis.get_instructions(code)]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step.opname != "LOAD_ATTR":
            way = []
            continue
        way.append(step.argval)
        asked = after is not None and after.argval in _ABOUT
        if len(way) > 1 and way[-1] in _PARAMETERS and not asked:
            yield tuple(way[:-1]), way[-1], ()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _in_bytecode(constant)


@dataclass(eq=False)
class _Reader(ast.NodeVisitor):
    """Follows modules through a function: names they are given, loops over them, functions they are handed to."""

    kind: type
    function: Any  # a FunctionType, which a type checker would take for a method of this class
    bound: dict[str, set[Path]]
    found: set[ParameterRead]
    guards: Guards = ()
    far: int = 0

    def look(self) -> None:
        """Add what the function reads of the modules that its arguments are."""
        self.name = next((name for name, ways in self.bound.items() if ways == {()}), "")
        tree = _parsed(self.function)
        if tree is None:
            self.found.update(_in_bytecode(self.function.__code__))
        else:
            self.visit(tree)

    def ways(self, node: ast.AST | None) -> set[Path]:
        """The paths that an expression may be."""
        match node:
            case ast.Name(id=name):
                return self.bound.get(name, set())
            case ast.Attribute(value=value, attr=name):
                return {(*way, name) for way in self.ways(value) if len(way) < _DEEPEST}
            case ast.Subscript(value=value):
                return {(*way, ANY) for way in self.ways(value) if len(way) < _DEEPEST}
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return {(*way, name) for way in self.ways(value) if len(way) < _DEEPEST}
            case ast.NamedExpr(value=value):
                return self.ways(value)
            case ast.IfExp(body=one, orelse=other):
                return self.ways(one) | self.ways(other)
            case ast.BoolOp(values=values):
                return set().union(*map(self.ways, values))
        return set()

    def items(self, node: ast.AST) -> set[Path]:
        """The paths that one of an expression's items may be: of a list of modules, `zip` and `enumerate` of them."""
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr="values" | "items" | "children")):
                return self.items(value)
            case ast.Call(args=args):
                return set().union(*map(self.items, args))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return set().union(*map(self.ways, parts))
        return {(*way, ANY) for way in self.ways(node)}

    def bind(self, target: ast.AST, value: set[Path]) -> None:
        """Give a name, or each name of several, these paths besides those it had."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and value:
                self.bound[node.id] = self.bound.get(node.id, set()) | value

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            match target, node.value:
                case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                    for name, value in zip(names, values, strict=True):
                        self.bind(name, self.ways(value))
                case ast.Tuple(), value:
                    self.bind(target, self.items(value))
                case ast.Name(), value:
                    self.bind(target, self.ways(value))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, self.ways(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.items(node.iter))
        self.generic_visit(node)

    def _comprehension(self, node: Any) -> None:
        for part in node.generators:
            self.bind(part.target, self.items(part.iter))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def _under(self, node: Any) -> None:
        """Both branches of a condition, each with what it takes to be there."""
        self.visit(node.test)
        outside = self.guards
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            self.guards = (*outside, (node.test, self.name, wanted))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
        self.guards = outside

    visit_If = visit_IfExp = _under

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _ABOUT and isinstance(node.value, ast.Attribute):
            self.visit(node.value.value)  # `x.weight.dtype` says nothing of the numbers
        else:
            if node.attr in _PARAMETERS and isinstance(node.ctx, ast.Load):
                self.found.update((way, node.attr, self.guards) for way in self.ways(node.value) if way)
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _QUESTIONS:
            return
        if name == "getattr":
            for way in self.ways(node):
                if len(way) > 1 and way[-1] in _PARAMETERS:
                    self.found.add((way[:-1], way[-1], self.guards))
        elif self.far < _FURTHEST:
            self._follow(node, name)
        self.generic_visit(node)

    def _follow(self, node: ast.Call, name: str) -> None:
        """Look into a function that is given modules."""
        given = [self.ways(value) for value in node.args]
        named = {word.arg: self.ways(word.value) for word in node.keywords if word.arg}
        if not any(given) and not any(named.values()):
            return
        own = isinstance(node.func, ast.Attribute) and self.ways(node.func.value) == {()}
        candidates = [self.function.__globals__.get(name)]
        if own:
            candidates, given = [*_defined(self.kind, node.func.attr)], [{()}, *given]  # pyright: ignore[reportAttributeAccessIssue]
        for other in candidates:
            if isinstance(other, FunctionType) and _names(other.__code__) & _PARAMETERS:
                code = other.__code__
                names = code.co_varnames[: code.co_argcount]
                bound = {known: {*ways} for known, ways in zip(names, given, strict=False) if ways}
                bound |= {known: {*ways} for known, ways in named.items() if ways}
                _Reader(self.kind, other, bound, self.found, self.guards, self.far + 1).look()
