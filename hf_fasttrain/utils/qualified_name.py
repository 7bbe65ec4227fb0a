"""Names of functions, classes and objects that stay the same from one start of a program to the next."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any


def qualified_name(thing: Any) -> str:
    """Return `module.qualname` of a function or class, or of an object's class.

    A lambda is known by its source text, a partial by its function and arguments. What a function does, what it closes
    over and what an object holds is not part of the name.
    """
    if isinstance(thing, functools.partial):
        arguments = [*map(_plain, thing.args), *(f"{name}={_plain(value)}" for name, value in thing.keywords.items())]
        return f"partial({', '.join([qualified_name(thing.func), *arguments])})"
    if isinstance(thing, types.FunctionType) and thing.__name__ == "<lambda>":
        return f"{module_name(thing)}: {_lambda_text(thing)}"
    if isinstance(thing, types.MethodType) and not isinstance(thing.__self__, type):
        return f"{qualified_name(type(thing.__self__))}.{thing.__name__}"
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{module_name(named)}.{named.__qualname__}"


def module_name(thing: Any) -> str:
    """Return the name of the module that something is defined in; of the program itself, the name to import it by."""
    name = str(getattr(thing, "__module__", None) or "builtins")
    main = sys.modules.get("__main__")
    if name != "__main__" or main is None:
        return name
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)  # a spec with python -m
    return str(spec.name) if spec is not None else Path(file).stem if file else name


def _plain(value: Any) -> str:
    if isinstance(value, bool | int | float | str | bytes | type(None)):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    return qualified_name(value)


def _lambda_text(function: types.FunctionType) -> str:
    """Return the source of a lambda; without its file, a digest of its code."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(code)[0]))
    except (OSError, SyntaxError, TypeError):
        parts = (code.co_code, code.co_names, [value for value in code.co_consts if not inspect.iscode(value)])
        return f"lambda {hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno]
    places = [place for place in code.co_positions() if place[0] is not None and place[2]]
    inside = [node for node in found if all(_is_within(node.body, place) for place in places)]
    return ast.unparse(min(inside or found, key=lambda node: node.end_col_offset or 0)) if found else "lambda"


def _is_within(node: ast.expr, place: tuple[int | None, int | None, int | None, int | None]) -> bool:
    """Return whether a place in the source (first and last line, first and last column) is part of an expression."""
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= (place[0] or 0, place[2] or 0) and (place[1] or 0, place[3] or 0) <= end
