"""Tokenizers for models from random weights, with few tokens per fact.

ProsQA and ProntoQA: "Every wumpus is a rorpus." is two tokens, ``Every wumpus`` and `` is a rorpus.``; a graph of ten
nodes is about twenty tokens instead of sixty. Each token is a template around one word. Tokens that share a word start
from related embeddings (:func:`start_embeddings`). Decoding gives back every sentence exactly. For other tasks with a
small vocabulary use :func:`word_tokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from slr_core.tasks import prontoqa
from slr_core.tasks.prosqa import CONCEPTS, NAMES

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_NAME_TEMPLATES = ("{}", "Is {}")
_CONCEPT_TEMPLATES = ("Every {}", " is a {}.", " a {}", " or {}?")
_PROPERTY_TEMPLATES = (" is {}.", " is not {}.", " are {}.", " are not {}.")
_PROPERTIES = tuple(word for family in prontoqa.PROPERTIES for word in family)


def prosqa_tokenizer(*, chain_of_thought: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer for ProsQA; unknown words become ``<unk>``. Written steps need the extra token ``#``."""
    words = [t.format(name) for t in _NAME_TEMPLATES for name in NAMES]
    words += [t.format(concept) for t in _CONCEPT_TEMPLATES for concept in CONCEPTS]
    return _sentence_tokenizer(words, r"Every \w+|Is \w+| is a \w+\.| a \w+| or \w+\?|\w+", mark=chain_of_thought)


def prontoqa_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer for ProntoQA: one token for the subject of a sentence, one for its predicate."""
    words = [t.format(name) for t in ("{}", "True or false: {}") for name in prontoqa.NAMES]
    for concept in CONCEPTS:
        article = "an" if concept[0] in "aeiou" else "a"
        words += [f"Each {concept}", f"Every {concept}", f"{concept.capitalize()}es"]
        words += [f" is {article} {concept}.", f" are {concept}es."]
    words += [t.format(word) for t in _PROPERTY_TEMPLATES for word in _PROPERTIES]
    pieces = r"True or false: \w+|Each \w+|Every \w+| is an? \w+\.| (?:is|are)(?: not)? \w+\.|\w+"
    return _sentence_tokenizer([*words, "True", "False"], pieces, mark=True)


def _sentence_tokenizer(words: list[str], pieces: str, *, mark: bool) -> PreTrainedTokenizerFast:
    words = [*words, "#"] if mark else words
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*_SPECIAL, *words])}, unk_token="<unk>"))
    # Spaces between sentences get no token; decoding puts them back.
    blanks = [normalizers.Replace(Regex(r"(?<=\.)\s+"), ""), normalizers.Replace(Regex(r"\s*#\s*"), "#")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), *blanks[: 1 + mark]])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces + ("|#" if mark else "")), "isolated")
    spaced = [decoders.Replace(Regex(r"\.(?=\w)"), ". "), decoders.Replace(Regex("#"), " # ")]
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), *spaced[: 1 + mark]])
    return _wrap(tokenizer)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word (with the space before it) or punctuation mark of ``texts``; others become ``<unk>``.

    Decoding gives back text of known words exactly.
    """
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*_SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def start_embeddings(tokenizer: PreTrainedTokenizerFast, hidden_size: int, generator: torch.Generator) -> Tensor:
    """An embedding table ``[V, d]``: the vector of a token is that of its word plus that of its template.

    ``Every wumpus`` and `` is a wumpus.`` mean the same node. With independent vectors the model would first have to
    learn this for every concept.
    """
    vocabulary = tokenizer.get_vocab()
    words = "|".join((*NAMES, *CONCEPTS, *_PROPERTIES))
    symbols = re.compile(rf"\b({words})(?:es)?\b", re.IGNORECASE)
    vectors: dict[str, Tensor] = {}

    def vector(key: str, std: float) -> Tensor:
        if key not in vectors:
            vectors[key] = std * torch.randn(hidden_size, generator=generator)
        return vectors[key]

    table = torch.zeros(len(vocabulary), hidden_size)
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        match = symbols.search(token)
        if match is None:
            table[index] = vector(token, 0.05)
        else:
            table[index] = vector(match[1].lower(), 0.05) + vector(symbols.sub("{}", token), 0.035)
    return table
