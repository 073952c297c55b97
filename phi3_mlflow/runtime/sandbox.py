"""A jinja2 sandbox that is bounded: chat templates come with a model, and may be anybody's.

jinja2's own sandbox keeps a template from reaching the process; it does not keep it from taking
all of its time or memory. Here whatever can make much out of little is counted: loops, calls, and
the size of every text and list that comes into being. What a step in between can cost is bounded
by the sizes of what it works on, so a template is stopped soon after it has used up its budget,
in the thread that renders it.
"""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from .budget import TooMuch
from .budget import current_budget as _budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.runtime import Context

_BITS = 4096
"""Of a whole number."""
_MOST_SPACES = 1000
"""Of what pads a text."""

_EACH, _JOINED, _MADE = "(each)", "(joined)", "(made)"
"""Names of filters that no template can write."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT_METHODS = _words(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition "
    "removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith "
    "strip swapcase title upper"
)
_PADDING = frozenset(("center", "ljust", "rjust", "zfill"))
_OTHER_METHODS = {
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length", "is_integer")),
    float: frozenset(("is_integer",)),
}
_FILTERS = _words(
    "abs attr capitalize count d default dictsort e escape first float format groupby indent int "
    "items join last length list lower map max min reject rejectattr replace reverse round safe "
    "select selectattr slice sort string sum title trim truncate unique upper "
    "wordcount"
)
_CALLABLE = (Macro, LoopContext, Joiner, Undefined)
_WIDTH = re.compile(r"%(?:\(.*?\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_STRFTIME_WIDTH = re.compile(r"%[-_0^#+]*\d")
_FIELD = re.compile(r"\d{4,}|\{[^{}]*\{")
"""In the texts of `str.format`: a large number, or a width that is computed."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; use what it makes of a template inside `budgeted` only."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        # What the optimizer computes beforehand nobody would count.
        super().__init__(optimized=False, finalize=_shown, **options)
        self.filters = {name: _counted(self.filters[name]) for name in _FILTERS}
        self.filters |= {_EACH: _each, _JOINED: _joined, _MADE: _made}
        for name, check in _CHECKS.items():
            self.filters[name] = _checked(check, self.filters[name])
        self.globals.pop("lipsum", None)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the pieces of a text: of the whole, of a block, of what a macro gives."""
        parts, step = [], _budget().step
        size = 0
        for piece in pieces:
            size += len(piece)
            step(len(piece))
            parts.append(piece)
        step(size)
        return "".join(parts)

    def bounded(self, source: str) -> Any:
        """Compile a template.

        Raises:
            jinja2.TemplateError: it is not one.
            TooMuch: it does what could not be bounded.
        """
        return self.from_string(_Bounds(self).visit(self.parse(source)))

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, which is counted like the others."""
        self.filters[name] = _counted(function)

    def call(self, context: Context, called: Any, /, *args: Any, **named: Any) -> Any:
        """Call what a template calls, if it is bounded."""
        _budget().step()
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(called, _Format):
            _check_format(called.text, args, named)
        elif isinstance(owner, str):
            _check_text_method(owner, name, args)
        elif not self._is_bounded(called, owner, name):
            raise TooMuch(f"it calls {name or called!r:.80}")
        return _result(super().call(context, called, *args, **named))

    def _is_bounded(self, called: Any, owner: Any, name: str) -> bool:
        if isinstance(called, _CALLABLE) or isinstance(owner, Cycler | LoopContext):
            return True
        if methods := _OTHER_METHODS.get(type(owner)):
            return name in methods
        return any(called is known for known in self.globals.values())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The method `format` of a text, in the sandbox."""
        method = super().wrap_str_format(value)
        return method and _Format(value.__self__, method)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what can make much out of little."""
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right)
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _budget().step(len(left) + len(right))
        return _result(super().call_binop(context, operator, left, right))


class _Bounds(NodeTransformer):
    """Puts counters around loops, joined texts and the lists that a template writes."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def _filtered(self, node: nodes.Node, name: str) -> nodes.Filter:
        made = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self._environment)
        return made

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TooMuch("it has a recursive loop")
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        parts.set_environment(self._environment)
        return self._filtered(parts, _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return self._filtered(node, _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return self._filtered(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return self._filtered(node, _MADE) if node.ctx == "load" else node


class _Sized:
    """What a loop goes through, where it is known how much it is."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return _turns(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _turns(values: Iterable[Any]) -> Iterator[Any]:
    step = _budget().step
    for value in values:
        step()
        yield value


def _each(values: Any) -> Iterable[Any]:
    """What a loop goes through; each turn counts."""
    return _Sized(values) if hasattr(values, "__len__") else _turns(values)


class _Format:
    """The method `format` of a text."""

    def __init__(self, text: str, method: Callable[..., str]) -> None:
        self.text = text
        self._method = method

    def __call__(self, *args: Any, **named: Any) -> str:
        return self._method(*args, **named)


def _result(value: Any) -> Any:
    """What was computed, counted."""
    if isinstance(value, str):
        _budget().step(len(value))
    elif isinstance(value, dict | list | tuple):
        _budget().step(_budget().weigh(value))
    elif hasattr(value, "__next__"):
        return _each(value)
    return value


def _made(value: Any) -> Any:
    _budget().weigh(value)
    return value


def _shown(value: Any) -> Any:
    """A value that is about to be written out."""
    if isinstance(value, dict | list | tuple | set | frozenset | Namespace):
        _budget().weigh(value, shown=True)
    return value


def _joined(parts: list[Any]) -> str:
    return BoundedEnvironment.concat(str(_shown(part)) for part in parts)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose values are counted before and after."""

    @wraps(function)  # with what tells jinja2 whether it wants the context
    def filtered(*args: Any, **named: Any) -> Any:
        for given in (*args, *named.values()):
            _shown(given)
        return _result(function(*args, **named))

    return filtered


def _checked(
    check: Callable[..., tuple[Any, ...]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """A filter that can make much out of little."""

    @wraps(function)  # with what tells jinja2 whether it wants the context
    def filtered(*args: Any, **named: Any) -> Any:
        return function(*check(*args, **named), **named)

    return filtered


def _check_join(context: Any, values: Any, d: Any = "", *more: Any, **_: Any) -> tuple[Any, ...]:
    parts = list(_each(values))
    _budget().step(len(str(_shown(d))) * len(parts) + _budget().weigh(parts, shown=True))
    return (context, parts, *((d, *more) if d != "" or more else ()))


def _check_replace(
    context: Any, text: Any, old: Any = "", new: Any = "", *more: Any, **_: Any
) -> tuple[Any, ...]:
    text, old, new = str(_shown(text)), str(_shown(old)), str(_shown(new))
    _budget().step(len(text) + text.count(old) * len(new))
    return (context, text, old, new, *more)


def _check_indent(text: Any, width: Any = 4, *more: Any, **_: Any) -> tuple[Any, ...]:
    if not isinstance(width, int) or width > _MOST_SPACES:
        raise TooMuch("it indents by a text or by too much")
    text = str(_shown(text))
    _budget().step(len(text) + text.count("\n") * width)
    return (text, width, *more)


def _check_sum(*args: Any, start: Any = 0, **_: Any) -> tuple[Any, ...]:
    if len(args) > 3 or not isinstance(start, int | float):
        raise TooMuch("it sums up what are no numbers")
    return args


def _check_formatted(text: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    _check_percent(str(_shown(text)), named or args)
    return (text, *args)


_CHECKS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "join": _check_join,
    "replace": _check_replace,
    "indent": _check_indent,
    "sum": _check_sum,
    "format": _check_formatted,
}


def _check_text_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    budget = _budget()
    budget.step(len(text))
    if name in _TEXT_METHODS:
        return
    if name == "replace" and len(args) > 1:
        _check_replace(None, text, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], str | list | tuple | dict):
        budget.step(budget.weigh(args[0], shown=True) + len(text) * len(args[0]))
    elif name not in _PADDING or not args or not isinstance(args[0], int):
        raise TooMuch(f"it calls {name} of a text")
    elif args[0] > len(text) + _MOST_SPACES:
        raise TooMuch(f"it pads a text to {args[0]!r:.20} characters")


def _check_format(text: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    if _FIELD.search(text):
        raise TooMuch("it pads a text")
    given = _budget().weigh([*args, *named.values()], shown=True)
    _budget().step(text.count("{") * given)


def _check_percent(text: str, given: Any) -> None:
    for width in _WIDTH.finditer(text):
        if "*" in width[0] or max(map(len, width.groups(""))) > 3:
            raise TooMuch("it pads a text")
    _budget().step(text.count("%") * _budget().weigh(given, shown=True))


def _check_product(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                _budget().step(_budget().weigh(many) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * right
        if bits > _BITS:
            raise TooMuch("it computes with numbers that are too large")


def check_time_format(text: str) -> None:
    """Refuse to pad a date.

    Raises:
        TooMuch: it does.
    """
    if len(text) > _MOST_SPACES or _STRFTIME_WIDTH.search(text):
        raise TooMuch("it pads a date")
