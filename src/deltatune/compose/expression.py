"""Delta expressions: `lora`, `lora(r=4, at="attn.q")`, `adapter(m=24) | bitfit`, as typed on a command line."""

from __future__ import annotations

import ast

from deltatune.delta.catalogue import find
from deltatune.delta.method import Composition, Method, Spec
from deltatune.errors import DeltaExpressionError, UserError


def parse(text: str) -> Spec:
    """Parse a delta expression.

    Names of methods, calls with keyword fields, joined by `|`. DeltaExpressionError says what is wrong and where; an
    unknown method or field names its nearest.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        place = (error.offset or 1) - 1
        raise DeltaExpressionError(f"a delta expression does not parse: {error.msg}", text.strip(), place) from None
    made = [_method(node, text.strip()) for node in _members(tree)]
    return made[0] if len(made) == 1 else Composition(made)


def _members(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_members(node.left), *_members(node.right)]
    return [node]


def _method(node: ast.expr, text: str) -> Method:
    call = node if isinstance(node, ast.Call) else None
    target = call.func if call else node
    if not isinstance(target, ast.Name):
        raise DeltaExpressionError("expected a method's name, such as lora or adapter(m=24)", text, node.col_offset)
    if call and call.args:
        raise DeltaExpressionError("give fields by name, such as lora(r=8)", text, call.args[0].col_offset)
    try:
        cls = find(target.id)
    except UserError as error:
        raise DeltaExpressionError(str(error), text, target.col_offset) from None
    fields = {}
    for keyword in call.keywords if call else []:
        if keyword.arg is None:
            raise DeltaExpressionError("give fields by name, such as lora(r=8)", text, keyword.value.col_offset)
        try:
            fields[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise DeltaExpressionError(
                f"the value of {keyword.arg} is not a number or a string", text, keyword.value.col_offset
            ) from None
    try:
        return cls(**fields)
    except UserError as error:
        place = next(
            (k.col_offset for k in (call.keywords if call else []) if str(k.arg) in str(error)), node.col_offset
        )
        raise DeltaExpressionError(str(error), text, place) from None
