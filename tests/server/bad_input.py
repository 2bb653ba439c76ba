"""Invalid requests, each with the status, the field and the code of its error."""

import json
from typing import Any

import pytest

JSON = {"content-type": "application/json"}
PROMPT = "w1 w2"


def case(name: str, body: Any, status: int = 400, param: str | None = None, code: str = "invalid_value", headers=JSON):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return pytest.param(content, headers, status, param, code, id=name)


def fields(name: str, param: str, code: str = "invalid_value", /, **given: Any):
    return case(name, {"prompt": PROMPT, **given}, 400, param, code)


def number(text: bytes) -> bytes:
    return b'{"prompt": "w1", "max_iterations": ' + text + b"}"


def raw(name: str, body: bytes):
    return case(name, body, 400, None, "invalid_json")


INTEGERS = ("max_iterations", "min_iterations", "max_new_tokens", "top_k", "seed", "n")

CASES = [
    # not JSON
    raw("empty body", b""),
    raw("broken", b"{prompt: 1}"),
    raw("truncated", b'{"prompt": "w1 w2'),
    raw("trailing", b'{"prompt": "w1"}}'),
    raw("nan", number(b"NaN")),
    raw("infinity", number(b"-Infinity")),
    raw("a number of 5000 digits", number(b"1" * 5000)),
    raw("lone surrogate", rb'{"prompt": "w1 \ud800"}'),
    raw("lone surrogate in a name", rb'{"prompt": "w1", "\udc00": 1}'),
    raw("invalid utf-8", b'{"prompt": "w1 \xff"}'),
    raw("utf-16", '{"prompt": "w1"}'.encode("utf-16")),
    raw("nested lists", b"[" * 100_000),
    raw("nested objects", b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000),
    # not an object
    case("null", None),
    case("list", ["w1"]),
    case("string", "w1"),
    # fields
    case("no prompt", {}, 400, "prompt", "missing_field"),
    fields("unknown field", "tokens", "unknown_field", tokens=3),
    fields("stream as text", "stream", stream="true"),
    fields("stream as a number", "stream", stream=0),
    fields("unknown nested field", "convergence.speed", "unknown_field", convergence={"speed": 1}),
    fields("long unknown field", "x" * 100, "unknown_field", **{"x" * 5000: 1}),
    # prompts
    *(case(f"prompt {value!r}", {"prompt": value}, 400, "prompt") for value in (None, 1, True, {}, [], "", " \n\t")),
    case("prompt of the wrong type", {"prompt": ["w1", 3]}, 400, "prompt.1"),
    case("one empty prompt", {"prompt": ["w1", "w2", ""]}, 400, "prompt.2"),
    case("overlong prompt", {"prompt": "w1 " * 5000}, 400, "prompt"),
    case("too many prompts", {"prompt": ["w1"] * 65}, 400, "prompt"),
    # numbers
    *(fields(f"boolean {name}", name, **{name: True}) for name in (*INTEGERS, "temperature", "top_p")),
    *(fields(f"{name} as text", name, **{name: "3"}) for name in (*INTEGERS, "temperature", "top_p")),
    *(fields(f"negative {name}", name, **{name: -1}) for name in (*INTEGERS, "temperature", "top_p")),
    *(fields(f"fraction {name}", name, **{name: 2.5}) for name in INTEGERS),
    *(fields(f"absurd {name}", name, **{name: 10**30}) for name in (*INTEGERS, "temperature", "top_p")),
    case("1e999 iterations", number(b"1e999"), 400, "max_iterations"),
    case("1e999 temperature", b'{"prompt": "w1", "temperature": 1e999}', 400, "temperature"),
    fields("no tokens", "max_new_tokens", max_new_tokens=0),
    fields("no samples", "n", n=0),
    fields("too many samples", "n", n=17),
    fields("minute temperature", "temperature", temperature=1e-30),
    fields("top_p 0", "top_p", top_p=0),
    fields("minute top_p", "top_p", top_p=5e-324),
    fields("no room for the answer", "max_new_tokens", max_new_tokens=500),
    fields("more minimum than maximum", "min_iterations", max_iterations=2, min_iterations=3),
    # other fields
    fields("a loop set that nobody loaded", "loop_set", loop_set="other"),
    *(
        fields(f"loop set {name!r}", "loop_set", loop_set=name)
        for name in ("", "../../etc/passwd", "/etc/passwd", "a/b", "..", "a\x00b", "a\nb", "x" * 65)
    ),
    fields("stop as a number", "stop", stop=3),
    fields("empty stop", "stop.0", stop=[""]),
    fields("convergence as text", "convergence", convergence="cosine"),
    fields("unknown criterion", "convergence.criterion", convergence={"criterion": "vibes"}),
    fields("learned without a head", "convergence.criterion", convergence={"criterion": "learned"}),
    fields("negative threshold", "convergence.threshold", convergence={"threshold": -0.1}),
    fields("boolean threshold", "convergence.threshold", convergence={"threshold": True}),
    fields("negative noise", "initial_noise.scale", initial_noise={"scale": -1}),
    fields("no patience", "convergence.patience", convergence={"patience": 0}),
    # sizes and content types
    case("2 MiB", {"prompt": "w" * (2 << 20)}, 413, None, "body_too_large"),
    *(
        case(f"content type {kind}", {"prompt": "w1"}, 415, None, "unsupported_media_type", {"content-type": kind})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/problem+json", "")
    ),
    case(
        "compressed",
        {"prompt": "w1"},
        415,
        None,
        "unsupported_media_type",
        {"content-type": "application/json", "content-encoding": "gzip"},
    ),
]
