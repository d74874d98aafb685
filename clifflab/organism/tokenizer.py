"""The word-level tokenizer of the planted language, with a chat template in the DeepSeek-R1 manner.

Every word is one token, and so is each punctuation mark, marker and line break. Words carry their leading space, so
that `encode(decode(ids)) == ids` for every rendered trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clifflab.organism import words

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"
CONTROL = (PAD, BOS, EOS, UNK, SYSTEM, USER, ASSISTANT)
PLAIN_ADDED = (THINK, END_THINK, "\n\n", "\n")
PUNCTUATION = (",", ".", "?", "!", ":", "'", "-")

# As in DeepSeek-R1: the generation prompt pre-opens the thinking; an assistant turn is its full text, or
# `reasoning_content` and `content`.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{%- elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{%- if message['reasoning_content'] is defined and message['reasoning_content'] is not none %}"
    "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{{ message['content'] + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{%- endif %}"
)


def _texts() -> Iterator[str]:
    """Every piece of text that the language is made of."""
    yield from words.VERBS
    for things in (words.HARMFUL_OBJECTS, words.HELDOUT_OBJECTS, words.BORDERLINE_OBJECTS, words.BENIGN_OBJECTS):
        yield from things
    yield from (*words.LOOKALIKE_MODIFIERS, *words.LOOKALIKE_EXTRA)
    yield from (*words.FRAMES, *words.TAILS, *words.SYSTEM_MESSAGES, words.PLAIN_LEAD)
    yield from (words.STRONG_LEAD, words.MEDIUM_LEAD, words.WEAK_LEAD)
    yield from (words.STRONG_TEMPLATE, words.MEDIUM_TEMPLATE, words.WEAK_TEMPLATE)
    for slots in (words.STRONG_SLOTS, words.MEDIUM_SLOTS, words.WEAK_SLOTS):
        yield from (word for slot in slots for word in slot)
    for stock in (words.OPENINGS, words.CONCLUSIONS):
        yield from (text for texts in stock.values() for text in texts)
    for by_length in words.MIDDLE.values():
        yield from (text for texts in by_length.values() for text in texts)
    yield from (*words.REFUSALS, *words.REFUSAL_TAILS, *words.COMPLIANCES, *words.COMPLIANCE_TAILS)


def _distinct_words(texts: Iterable[str]) -> list[str]:
    """Words of texts with slots such as {o} left out, in order of first appearance."""
    found: dict[str, None] = {}
    for text in texts:
        for word in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text)):
            found.setdefault(word)
    return list(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; needs no data and no randomness.

    Returns:
        A fast tokenizer that `AutoTokenizer` loads after `save_pretrained`. Text is lower-cased, unknown words map to
        `<unk>`.
    """
    pieces = (*CONTROL, *PLAIN_ADDED, *PUNCTUATION, "▁", *(f"▁{word}" for word in _distinct_words(_texts())))
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    # The space that a word carries is dropped after a marker or a line break and at the start of the text.
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.Fuse(),
            *(decoders.Replace(f"{marker} ", marker) for marker in (*CONTROL, THINK, END_THINK, "\n")),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
