"""Rendering chat templates, which come from a checkpoint and may be hostile, with bounds on time and size.

A template sees what ``transformers`` shows it: the same extensions, filters, globals and variables.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEMPLATE_CHARACTERS = 2**17
MAX_SECONDS = 2.0
"""Processor time of one rendering. It is looked at in every pass of a loop, and before every call and filter."""
MAX_CHARACTERS = 2**26
"""Characters of all values that a rendering makes, intermediate ones included; a list item counts as several."""
_ITEM = 64
MAX_NUMBER = 100_000
"""Numbers that a template may give to a filter or method: widths, counts."""
_AMPLIFIERS = frozenset({"urlize", "wordwrap", "xmlattr", "pprint", "format"})
"""Filters without a use in a chat template, whose results may be much larger than their arguments."""
_TEXT_FILTERS = frozenset(
    "capitalize center e escape forceescape indent join lower replace safe string striptags title tojson trim truncate "
    "upper urlencode wordcount".split()
)
"""Filters that turn a value of any kind into text."""
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\*|\d{6})|\{[^}]*(\{|\d{6})")
_made = threading.local()


def render_chat(template: str, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a chat.

    Args:
        template: Jinja source.
        messages: the chat.
        variables: further variables of the template, such as the tokenizer's special tokens.

    Raises:
        Exception: the template refuses the messages, is faulty, or exceeds a bound. It may raise any kind.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError(f"it has more than {MAX_TEMPLATE_CHARACTERS} characters")
    plain = [_with_reasoning({k: _plain(v) for k, v in message.items() if v is not None}) for message in messages]
    given = {"messages": plain, "tools": None, "documents": None, "add_generation_prompt": True}
    _made.characters, _made.end = 0, time.thread_time() + MAX_SECONDS
    return str(_compiled(template).render(**{**variables, **given}))


def _check_time() -> None:
    if time.thread_time() > _made.end:
        raise TemplateError(f"it takes more than {MAX_SECONDS:g} seconds")


def _count(value: Any) -> Any:
    """Count the size of a new value."""
    if isinstance(value, str | bytes):
        _reserve(len(value))
    elif isinstance(value, list | tuple):
        _reserve(len(value) * _ITEM)
    return value


def _reserve(size: int) -> None:
    _made.characters += size
    if _made.characters > MAX_CHARACTERS:
        raise TemplateError(f"it makes more than {MAX_CHARACTERS} characters")


def _count_nested(value: Any) -> Any:
    """Count everything that a value shows: a list that holds the same one twice, and so on, is small in memory only."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        _reserve(len(item) if isinstance(item, str | bytes) else _ITEM)
    return value


def _check_numbers(arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_NUMBER:
            raise TemplateError(f"it uses a number above {MAX_NUMBER} as an argument")


def _reserve_result(name: str, text: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Check the size of what a text's method or a filter will make, where this is much more than it gets."""
    given = [*arguments, *options.values()]
    match name:
        case "replace" if len(given) > 1:
            _reserve(str(text).count(str(given[0])) * len(str(given[1])))
        case "expandtabs" | "indent":
            width = max((len(x) if isinstance(x, str) else int(x) for x in given), default=8)
            _reserve((str(text).count("\n") + str(text).count("\t") + 1) * width)
        case "translate" | "encode":
            raise TemplateError(f"{name} is not available")
        case "format" | "format_map" if _WIDE_FORMAT.search(str(text)):
            raise TemplateError("it formats with a width above 99999, or one that is not a constant")


class _CodeGenerator(CodeGenerator):
    """Compiles loops that look at the time, and ``a ~ b``, lists, tuples and dictionaries that count what they hold.

    Otherwise a few lines could make a list that holds another one twice, and so on: comparing it would take for ever.
    """

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("time_is_left")))
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.count_nested(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.count_nested(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self.write("environment.count_nested(")
        super().visit_Tuple(node, frame)
        if node.ctx == "load":
            self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """``{% generation %}``, which marks what the assistant wrote, for training."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose operators, filters and calls count what they make."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"*", "**", "+", "%"})
    count_nested = staticmethod(_count_nested)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_count_nested
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _counted(name, f) for name, f in self.filters.items() if name not in _AMPLIFIERS}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    @property
    def time_is_left(self) -> bool:
        """True; if it is not, an error is raised."""
        _check_time()
        return True

    def concat(self, parts: Iterable[str]) -> str:
        """Join texts, counted before they are joined."""
        return "".join([_count(part) for part in parts])

    def join_texts(self, values: Iterable[Any]) -> str:
        """``a ~ b``."""
        return self.concat([str(_count_nested(value)) for value in values])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an intercepted operator."""
        both_integers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not both_integers:
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(times, int):
                    _reserve(len(text) * max(times, 0))
        elif both_integers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_NUMBER:
                raise TemplateError("it computes a number with too many digits")
        elif operator == "%" and isinstance(left, str | bytes):
            _reserve_result("format", left, (), {})
            _count_nested(right)
        return _count(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method."""
        _check_time()
        _check_numbers((*args, *kwargs.values()))
        # The sandbox wraps str.format.
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = method.__name__
            if name == "join":
                args = tuple([*map(_count_nested, argument)] for argument in args)
                _reserve(len(owner) * len(args[0]) if args else 0)
            elif name in ("format", "format_map"):
                _count_nested([*args, *kwargs.values()])
            _reserve_result(name, owner, args, kwargs)
        elif isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            _count_nested([*args, *kwargs.values()])  # they become a tuple and a dictionary
        return _count(super().call(__context, __obj, *args, **kwargs))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it makes."""
    context_arguments = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        value, *given = arguments[context_arguments:]
        _check_time()
        _check_numbers((*given, *options.values()))
        everything = (*given, *options.values())
        if name == "join":
            value = list(value)
            _reserve(len(value) * max((len(x) for x in everything if isinstance(x, str)), default=0))
        if name in _TEXT_FILTERS:
            _count_nested(value)
        if name == "sum" and any(isinstance(x, list | tuple) for x in everything):
            raise TemplateError("sum adds lists")
        _reserve_result(name, value, tuple(given), options)
        return _count(function(*arguments[:context_arguments], value, *given, **options))

    return counted


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 16:
        raise TemplateError("tojson indents by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise TemplateError(str(_count_nested(message)))


class _Dict:
    def __call__(self, *arguments: Any, **options: Any) -> dict[Any, Any]:
        made = dict(*arguments, **options)
        _count_nested(made)
        return made

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        made = dict.fromkeys(*arguments)
        _count_nested(made)
        return made


class _Namespace(Namespace):
    """A namespace without private names."""

    def __init__(*arguments: Any, **options: Any) -> None:  # so that a name may be ``self``
        self, *rest = arguments
        attributes = dict(*rest, **options)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace cannot hold the private name {name!r}")


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _Environment().from_string(template)


def _plain(value: Any) -> Any:
    """The value in JSON's types: objects may have methods that a template must not call."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under both names that templates read, as in ``transformers``."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
