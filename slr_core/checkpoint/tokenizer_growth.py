"""How much longer a tokenizer may make a text: a prompt before it is tokenized, and an answer when it is decoded."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slr_core.checkpoint.validate import checkpoint_error

MAX_GROWTH = 64
"""Characters that replacements may make of one. The normal forms of Unicode come on top: at most 18 for one."""
MAX_PARTS = 256
"""Parts of a normalizer, pre-tokenizer, post-processor or decoder: each reads the whole text."""
MAX_ADDED_TOKEN = 4096
"""Characters of an added token."""


def check_growth(path: Path, parts: dict[str, Any]) -> None:
    """Refuse a ``tokenizer.json`` that makes a text much longer, or reads it very often.

    Args:
        path: of the file, for the message.
        parts: its content.

    Raises:
        CheckpointError: it does.
    """
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (count := sum(1 for _ in _parts(parts.get(name)))) > MAX_PARTS:
            raise checkpoint_error(path, f"its {name} has {count} parts; at most {MAX_PARTS}")
    added = sum(_added_tokens(part) for part in _parts(parts.get("post_processor")))
    if added > MAX_GROWTH:
        raise checkpoint_error(path, f"its post_processor adds {added} tokens to a text; at most {MAX_GROWTH}")
    for token in parts.get("added_tokens") or ():
        if len(token["content"]) > MAX_ADDED_TOKEN:
            raise checkpoint_error(path, f"an added token has more than {MAX_ADDED_TOKEN} characters")
    for name in ("normalizer", "decoder"):
        growth = _growth(parts.get(name) or {"type": "none"})
        if growth > MAX_GROWTH:
            raise checkpoint_error(path, f"its {name} may make {growth} characters of one; at most {MAX_GROWTH}")


def _growth(part: dict[str, Any]) -> int:
    match part["type"]:
        case "Sequence":
            product = 1
            for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
                product *= _growth(inner)
            return product
        case "Prepend":  # once for a text
            return len(part["prepend"]) if len(part["prepend"]) > MAX_GROWTH else 1
        case "Replace" if set(part["pattern"]) == {"String"} and part["pattern"]["String"]:
            return max(1, -(-len(part["content"]) // len(part["pattern"]["String"])))
        case "Replace":  # a pattern may match nothing, before every character
            return 1 + len(part["content"])
        case "Precompiled":
            return max(1, _longest_replacement(part["precompiled_charsmap"]))
        case _:
            return 1


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A part, or those of a sequence of parts."""
    if not isinstance(part, dict):
        return
    yield part
    for inner in (inner for value in part.values() if isinstance(value, list) for inner in value):
        if isinstance(inner, dict) and "type" in inner:
            yield from _parts(inner)


def _added_tokens(processor: dict[str, Any]) -> int:
    """Tokens that a template adds to a text."""
    if processor["type"] != "TemplateProcessing":
        return 0
    special = [piece["SpecialToken"]["id"] for piece in processor["single"] if "SpecialToken" in piece]
    return sum(len(processor["special_tokens"][name]["ids"]) for name in special)


def _longest_replacement(charsmap: str | list[int]) -> int:
    """The longest text in SentencePiece's map: the size of a trie (32 bits), the trie, texts that end with a zero."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(len(text.decode(errors="replace")) for text in texts)
