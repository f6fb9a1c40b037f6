"""Delta expressions: `lora`, `lora(r=4, at="attn.q")`, `adapter(m=24) | bitfit`, as typed on a command line."""

from __future__ import annotations

import ast
import re

from deltatune.delta.catalogue import find
from deltatune.delta.method import Composition, Method, Spec
from deltatune.errors import DeltaExpressionError, UnknownName, UserError

LINE = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")  # where Python's lines end; str.splitlines knows more ends


def parse(text: str) -> Spec:
    """Parse a delta expression.

    Names of methods, calls with keyword fields, joined by `|`. DeltaExpressionError says what is wrong and where; an
    unknown method or field names its nearest.
    """
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
        made = [_method(node, text) for node in _members(tree)]
    except SyntaxError as error:
        # Python gives no offset for what is missing at the end.
        place = min(len(text), _line(text, error.lineno or 1) + error.offset - 1) if error.offset else len(text)
        raise DeltaExpressionError(f"a delta expression does not parse: {error.msg}", text, place) from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; thousands of brackets
        raise DeltaExpressionError(f"a delta expression does not parse: {error or 'too deep'}", text, 0) from None
    return made[0] if len(made) == 1 else Composition(made)


def _members(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_members(node.left), *_members(node.right)]
    return [node]


def _method(node: ast.expr, text: str) -> Method:
    call = node if isinstance(node, ast.Call) else None
    target = call.func if call else node
    if not isinstance(target, ast.Name):
        raise DeltaExpressionError("expected a method's name, such as lora or adapter(m=24)", text, _place(node, text))
    if call and call.args:
        raise DeltaExpressionError("give fields by name, such as lora(r=8)", text, _place(call.args[0], text))
    try:
        cls = find(target.id)
    except UserError as error:
        raise DeltaExpressionError(str(error), text, _place(target, text)) from None
    keywords = {keyword.arg: keyword for keyword in call.keywords} if call else {}
    fields = {}
    for keyword in call.keywords if call else []:
        if keyword.arg is None:
            raise DeltaExpressionError("give fields by name, such as lora(r=8)", text, _place(keyword.value, text))
        if keyword is not keywords[keyword.arg]:
            raise DeltaExpressionError(f"{keyword.arg} is given twice", text, _place(keywords[keyword.arg], text))
        try:
            fields[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise DeltaExpressionError(
                f"the value of {keyword.arg} is not a number or a string", text, _place(keyword.value, text)
            ) from None
    try:
        return cls(**fields)
    except UserError as error:
        wrong = error.got if isinstance(error, UnknownName) else str(error).partition(": ")[2].partition("=")[0]
        place = _place(keywords.get(wrong, node), text)
        raise DeltaExpressionError(str(error), text, place) from None


def _place(node: ast.expr | ast.keyword, text: str) -> int:
    """The character at which a node starts; Python counts lines, and bytes in a line."""
    line = LINE.split(text)[node.lineno - 1]
    return _line(text, node.lineno) + len(line.encode()[: node.col_offset].decode())


def _line(text: str, number: int) -> int:
    """The character at which a line starts."""
    return sum(map(len, LINE.split(text)[: number - 1]))
