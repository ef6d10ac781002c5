"""Conditions such as "aes >= 5 and not contains(text, 'logo')", and new values such as "height * width", as Arrow
computations: a small, safe part of Python.
"""

import ast
import difflib

import pyarrow as pa
import pyarrow.compute as pc

from opensora_jax.common.errors import UserError

COMPARE = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}


def add(a, b):
    """Numbers are added, words joined."""
    return pc.binary_join_element_wise(a, b, "") if pa.types.is_string(a.type) else pc.add(a, b)


ARITHMETIC = {
    ast.Add: add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: lambda a, b: pc.divide(pc.cast(a, pa.float64()), pc.cast(b, pa.float64())),
    ast.Mod: lambda a, b: pc.subtract(
        a, pc.multiply(pc.cast(pc.floor(pc.divide(pc.cast(a, pa.float64()), b)), a.type), b)
    ),
}
CALLS = {
    "abs": pc.abs,
    "ceil": pc.ceil,
    "round": pc.round,
    "len": pc.utf8_length,
    "lower": pc.utf8_lower,
    "is_null": pc.is_null,
    "if_null": pc.coalesce,
    "replace": lambda a, old, new: pc.replace_substring(a, old.as_py(), new.as_py()),
    "stem": lambda path: pc.replace_substring_regex(path, r"^(?:.*/)?([^/]+?)(?:\.[^./]*)?$", r"\1"),
    "contains": lambda a, b: pc.match_substring(a, b.as_py()),
    "startswith": lambda a, b: pc.starts_with(a, b.as_py()),
    "endswith": lambda a, b: pc.ends_with(a, b.as_py()),
    "matches": lambda a, b: pc.match_substring_regex(a, b.as_py()),
}


class Expression:
    """A parsed condition or value: its text, the columns it reads, and what it gives for the rows of a table."""

    def __init__(self, text: str):
        self.text = text.strip()
        try:
            self.tree = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            raise UserError(f"{text!r} cannot be read: {error.msg}") from error
        calls = {id(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        self.columns = list(
            dict.fromkeys(n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and id(n) not in calls)
        )
        self.verify(self.tree)

    def verify(self, node: ast.AST) -> None:
        """Refuses at once what `value` could not compute."""
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                name = getattr(part.func, "id", "?")
                if name not in CALLS or part.keywords:
                    raise UserError(f"{self.text!r}: {name} is none of {', '.join(CALLS)}")
            elif not isinstance(part, (*SIMPLE, *COMPARE, *ARITHMETIC)):
                raise UserError(f"{self.text!r}: {ast.unparse(part) or type(part).__name__} is not supported")

    def mask(self, table: pa.Table):
        result = self.values(table)
        if not pa.types.is_boolean(result.type):
            raise UserError(f"{self.text!r} is no yes or no: compare it with something")
        return result

    def values(self, table: pa.Table):
        """One value a row."""
        for name in self.columns:
            if name not in table.column_names:
                near = difflib.get_close_matches(name, table.column_names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table.column_names)}"
                raise UserError(f"{self.text!r}: there is no column {name}; {hint}")
        try:
            result = self.value(self.tree, table)
        except (pa.ArrowException, TypeError, AttributeError) as error:
            raise UserError(f"{self.text!r} does not fit the columns: {error}") from error
        if isinstance(result, pa.Scalar):
            result = pa.repeat(result, table.num_rows)
        return result

    def value(self, node: ast.AST, table: pa.Table):
        value = lambda part: self.value(part, table)
        if isinstance(node, ast.Name):
            return table[node.id]
        if isinstance(node, ast.Constant):
            return pa.scalar(node.value)
        if isinstance(node, ast.BoolOp):
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            result = value(node.values[0])
            for part in node.values[1:]:
                result = join(result, value(part))
            return result
        if isinstance(node, ast.UnaryOp):
            return (pc.invert if isinstance(node.op, ast.Not) else pc.negate)(value(node.operand))
        if isinstance(node, ast.BinOp):
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Call):
            return CALLS[node.func.id](*map(value, node.args))
        return self.compare(node, value)

    def compare(self, node: ast.Compare, value):
        result, left = None, value(node.left)
        for operator, part in zip(node.ops, node.comparators):
            if isinstance(operator, (ast.In, ast.NotIn)):
                members = pa.array([item.value for item in part.elts])
                verdict = pc.if_else(pc.is_null(left), pa.scalar(None, pa.bool_()), pc.is_in(left, members))
                verdict = pc.invert(verdict) if isinstance(operator, ast.NotIn) else verdict
            else:
                right = value(part)
                verdict = COMPARE[type(operator)](left, right)
                left = right
            result = verdict if result is None else pc.and_kleene(result, verdict)
        return result


SIMPLE = (ast.Name, ast.Load, ast.Constant, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub)
SIMPLE += (ast.BinOp, ast.Compare, ast.In, ast.NotIn, ast.Tuple, ast.List)
