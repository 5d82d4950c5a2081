"""References and expressions of a MONAI configuration, worked out without running code of it.

A value may refer to another (``@pixdim``, ``@shown#overlap``) or be an expression (``$@bundle_root + '/models'``).
Expressions are parsed and never evaluated by Python: literals, references, arithmetic, comparisons, ``a if b else c``,
indexing, ``os.path.join``, a few harmless functions and the names of number types. Anything else is refused.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medseg.errors import BundleError

TRUST = "medseg runs no code from a bundle; if you trust its authors, add --trust"

_REFERENCE = re.compile(r"@(\w+(?:(?:#|::)\w+)*)")
_MAX_EXPRESSION = 500
_MAX_DEPTH = 32
_MAX_LENGTH = 10_000
_MAX_NUMBER = 1e15
_MAX_STEPS = 10_000

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "bool": bool,
    "float": float,
    "int": int,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "tuple": list,
    "os.path.join": lambda *parts: "/".join(str(part).rstrip("/") for part in parts),
}
# Names of number types, as the value of arguments such as `dtype`.
_NUMBER_TYPES = {
    f"{module}.{name}": name
    for module in ("torch", "np", "numpy")
    for name in ("float16", "float32", "float64", "uint8", "int16", "int32", "int64")
}


class Unknown(Exception):  # noqa: N818  not an error of the user's: the caller says what it means
    """An expression, or a part of one, that this module does not know; the text says which."""


class Configuration:
    """A configuration tree whose values can be asked for.

    Args:
        tree: the file's content.
        where: the file, for messages.
    """

    def __init__(self, tree: Mapping[str, Any], where: Path) -> None:
        self.tree, self.where = tree, where
        self._open: list[str] = []
        self._steps = 0

    def value(self, node: Any, path: str) -> Any:
        """A value with all references and expressions in it worked out.

        Args:
            node: a part of the tree.
            path: where it stands, e.g. ``preprocessing::2::pixdim``, for messages.

        Raises:
            BundleError: it holds something that only code can tell.
        """
        found = self.shallow(node, path)
        if isinstance(found, dict):
            return {key: self.value(child, f"{path}::{key}") for key, child in found.items()}
        if isinstance(found, list):
            return [self.value(child, f"{path}::{number}") for number, child in enumerate(found)]
        return found

    def shallow(self, node: Any, path: str) -> Any:
        """A value of which only the outermost reference or expression is worked out; what it holds stays as written.

        Raises:
            BundleError: as `value`.
        """
        if not isinstance(node, str):
            return node
        try:
            return self._text(node)
        except Unknown as err:
            detail = "" if str(err) == node else f" ({err})"
            kind = "reference" if node.startswith("@") else "expression"
            raise BundleError(self.where, f"{path} holds the {kind} {node!r}{detail}", TRUST) from None

    def _text(self, text: str) -> Any:
        if text.startswith("%"):
            raise Unknown("a macro")
        if text.startswith("$"):
            return self._expression(text[1:])
        if found := _REFERENCE.fullmatch(text):
            return self._reference(found[1])
        return text

    def _reference(self, name: str) -> Any:
        key = name.replace("#", "::")
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise Unknown("references without end")
        if key in self._open or len(self._open) > _MAX_DEPTH:
            raise Unknown(f"@{name} refers to itself")
        self._open.append(key)
        try:
            node: Any = self.tree
            for part in key.split("::"):
                node = self._text(node) if isinstance(node, str) else node
                if isinstance(node, dict) and part in node:
                    node = node[part]
                elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                    node = node[int(part)]
                else:
                    raise Unknown(f"there is no @{name}")
            return self._text(node) if isinstance(node, str) else node
        finally:
            self._open.pop()

    def _expression(self, text: str) -> Any:
        if len(text) > _MAX_EXPRESSION:
            raise Unknown("a long expression")
        references: dict[str, str] = {}

        def named(found: re.Match[str]) -> str:
            placeholder = f"reference_{len(references)}_"
            references[placeholder] = found[1]
            return placeholder

        try:
            tree = ast.parse(_REFERENCE.sub(named, text).strip(), mode="eval").body
            return self._node(tree, references)
        except (SyntaxError, RecursionError, MemoryError):
            raise Unknown("not an expression") from None
        except (TypeError, ValueError, ArithmeticError, LookupError) as err:
            raise Unknown(str(err) or type(err).__name__) from None

    def _node(self, node: ast.expr, references: Mapping[str, str]) -> Any:
        """The value of a part of an expression."""

        def inner(child: ast.expr) -> Any:
            return self._node(child, references)

        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in references:
                return self._plain(self._reference(references[name]))
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [inner(element) for element in elements]
            case ast.Dict(keys=keys, values=values):
                return {_key(key): inner(value) for key, value in zip(keys, values, strict=True)}
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _arithmetic(op, inner(left), inner(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -inner(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not inner(operand)
            case ast.BoolOp(op=op, values=values):
                found = [inner(value) for value in values]
                return all(found) if isinstance(op, ast.And) else any(found)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return _COMPARISONS[type(op)](inner(left), inner(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return inner(body) if inner(test) else inner(orelse)
            case ast.Subscript(value=value, slice=index):
                return inner(value)[inner(index)]
            case ast.Call(func=function, args=arguments, keywords=[]) if ast.unparse(function) in _FUNCTIONS:
                return _FUNCTIONS[ast.unparse(function)](*(inner(argument) for argument in arguments))
            case ast.Attribute() if ast.unparse(node) in _NUMBER_TYPES:
                return _NUMBER_TYPES[ast.unparse(node)]
        raise Unknown(_shown(node, references))

    def _plain(self, found: Any) -> Any:
        """What a reference inside an expression stands for; the parts of a list or an object are worked out, too."""
        if isinstance(found, dict) and "_target_" in found:
            raise Unknown(f"an object of {found['_target_']!r} inside an expression")
        if isinstance(found, dict):
            return {key: self._plain(self._text(one) if isinstance(one, str) else one) for key, one in found.items()}
        if isinstance(found, list):
            # Transforms in a list that is put together stay as they are written.
            return [
                one
                if isinstance(one, dict) and "_target_" in one
                else self._plain(self._text(one) if isinstance(one, str) else one)
                for one in found
            ]
        return found


def painted(text: str) -> list[tuple[int, int]] | None:
    """How a lambda paints the channels of a thresholded prediction into one label map.

    The zoo writes it as ``lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, ... 0))``.

    Returns:
        (channel, label) in the order of painting, or None where it is something else.
    """
    try:
        tree = ast.parse(text.removeprefix("$").strip(), mode="eval").body if len(text) <= _MAX_EXPRESSION else None
    except (SyntaxError, RecursionError, MemoryError):
        return None
    match tree:
        case ast.Lambda(args=ast.arguments(args=[ast.arg(arg=name)]), body=body):
            pass
        case _:
            return None
    found: list[tuple[int, int]] = []
    while not (isinstance(body, ast.Constant) and type(body.value) in (int, float) and body.value == 0):
        match body:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy"), attr="where"),
                args=[
                    ast.Compare(
                        left=ast.Subscript(value=ast.Name(id=argument), slice=index),
                        ops=[ast.Gt() | ast.GtE() | ast.Eq() as comparison],
                        comparators=[ast.Constant(value=int() | float() as bound)],
                    ),
                    ast.Constant(value=int() as label),
                    rest,
                ],
                keywords=[],
            ) if argument == name and _marks(comparison, bound) and (channel := _channel(index)) is not None:
                found.append((channel, label))
                body = rest
            case _:
                return None
    return found[::-1]


def _marks(comparison: ast.cmpop, bound: float) -> bool:
    """Whether a comparison is true of 1 and false of 0, the values of a thresholded prediction."""
    compare = _COMPARISONS[type(comparison)]
    return bool(compare(1, bound)) and not compare(0, bound)


def _channel(index: ast.expr) -> int | None:
    match index:
        case ast.Constant(value=int() as channel) | ast.List(elts=[ast.Constant(value=int() as channel)]):
            return channel if channel >= 0 else None
        case ast.Slice(lower=ast.Constant(value=int() as low), upper=ast.Constant(value=int() as high), step=None):
            return low if high == low + 1 else None
    return None


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    joined = isinstance(op, ast.Add) and type(left) is type(right) and isinstance(left, str | list)
    if not (numbers or joined):
        raise Unknown(f"{type(left).__name__} {type(op).__name__} {type(right).__name__}")
    found = _ARITHMETIC[type(op)](left, right)
    if len(found) > _MAX_LENGTH if joined else abs(found) > _MAX_NUMBER:
        raise Unknown("a value that grows without end")
    return found


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Unknown("a key that is no text")


def _shown(node: ast.expr, references: Mapping[str, str]) -> str:
    text = ast.unparse(node)
    for placeholder, name in references.items():
        text = text.replace(placeholder, f"@{name}")
    return text if len(text) <= 80 else text[:77] + "..."
