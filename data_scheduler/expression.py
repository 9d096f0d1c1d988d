"""Record filters: `lang == 'de' and quality > 0.7` to a pyarrow expression.

The text is parsed as a Python expression and only these parts are let through: field names (nested ones with dots),
constants, comparisons, `in` a list, `is None`, `and`, `or`, `not`, and + - * /. Nothing is ever evaluated as Python. A
comparison with a missing value is neither true nor false, so such a record is left out, as in SQL.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parse(text: str) -> tuple[Any, list[str]]:
    """(pyarrow expression, the fields it names, sorted). Raises ValueError that says which part is not understood."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not an expression (at character {error.offset})") from None
    fields: set[str] = set()
    expression = _build(tree, fields, text)
    if not fields:
        raise ValueError(f"{text!r} names no field")
    return expression, sorted(fields)


def _build(node: ast.expr, fields: set[str], text: str) -> Any:
    if isinstance(node, ast.Name | ast.Attribute):
        name = _field(node, text)
        fields.add(name)
        return pc.field(name)
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return pc.scalar(node.value)
    if isinstance(node, ast.BoolOp):
        join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        result = _build(node.values[0], fields, text)
        for value in node.values[1:]:
            result = join(result, _build(value, fields, text))
        return result
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_build(node.operand, fields, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return pc.negate(_build(node.operand, fields, text))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](_build(node.left, fields, text), _build(node.right, fields, text))
    if isinstance(node, ast.Compare):
        return _comparison(node, fields, text)
    raise ValueError(f"{ast.get_source_segment(text.strip(), node)!r} is not allowed in a filter")


def _comparison(node: ast.Compare, fields: set[str], text: str) -> Any:
    """One or a chain of comparisons, `0 < quality <= 1`."""
    result = None
    left = node.left
    for op, right in zip(node.ops, node.comparators, strict=True):
        part = _one_comparison(left, op, right, fields, text)
        result = part if result is None else result & part
        left = right
    return result


def _one_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr, fields: set[str], text: str) -> Any:
    if isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
        missing = _build(left, fields, text).is_null()
        return missing if isinstance(op, ast.Is) else ~missing
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple | ast.Set):
        values = [value.value for value in right.elts if isinstance(value, ast.Constant)]
        if len(values) == len(right.elts):
            among = _build(left, fields, text).isin(values)
            return among if isinstance(op, ast.In) else ~among
    if type(op) in COMPARE:
        return COMPARE[type(op)](_build(left, fields, text), _build(right, fields, text))
    raise ValueError(f"{ast.get_source_segment(text.strip(), right)!r} cannot be compared that way in a filter")


def _field(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_field(node.value, text)}.{node.attr}"
    raise ValueError(f"{ast.get_source_segment(text.strip(), node)!r} is not a field name")
