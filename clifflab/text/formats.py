"""The table of thinking formats (SPEC section 1), and its check against a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clifflab.errors import InputError


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model marks its thinking.

    Attributes:
        name: Key in the table.
        open: Marker before the thinking; empty where there is no thinking.
        close: Marker after it.
        pre_opened: The chat template writes the open marker, so that the model's first token is thinking.
        open_text: What stands between the chat prefix and the thinking in a canonical rendering.
        close_text: What stands between the thinking and the response.
    """

    name: str
    open: str
    close: str
    pre_opened: bool
    open_text: str
    close_text: str

    @property
    def thinks(self) -> bool:
        """Whether the model thinks at all."""
        return bool(self.close)


FORMATS: dict[str, ThinkingFormat] = {
    form.name: form
    for form in (
        # DeepSeek-R1 and its distils, QwQ, Qwen3-Thinking: the template ends with the open marker and a newline.
        ThinkingFormat("r1", "<think>", "</think>", True, "", "\n</think>\n\n"),
        # Qwen3: the model writes the open marker itself.
        ThinkingFormat("qwen3", "<think>", "</think>", False, "<think>\n", "\n</think>\n\n"),
        # A model that answers at once.
        ThinkingFormat("none", "", "", False, "", ""),
    )
}

_SAMPLE = [{"role": "user", "content": "hello"}]


def chat_prefix(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text from the start up to where the model writes: system, user turns, assistant opening.

    Raises:
        InputError: The tokenizer has no chat template, or the template refuses the messages.
    """
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("model", name, "its tokenizer has no chat template", "use a chat or reasoning checkpoint")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # noqa: BLE001 - templates are programs of the checkpoint and raise what they like
        raise InputError("model", name, f"its chat template failed ({error})", "mend the template") from None


def resolve_format(name: str, tokenizer: Any) -> ThinkingFormat:
    """Find the thinking format and check it against the tokenizer's chat template.

    Args:
        name: A key of :data:`FORMATS`, or ``auto``.
        tokenizer: A Hugging Face tokenizer with a chat template.

    Raises:
        InputError: The format is unknown, or the template contradicts it; says which setting to give.
    """
    prefix = chat_prefix(tokenizer, _SAMPLE).rstrip()
    template = str(tokenizer.chat_template)
    found = next((form for form in FORMATS.values() if form.pre_opened and prefix.endswith(form.open)), None)
    if found is None:
        found = next((f for f in FORMATS.values() if f.thinks and not f.pre_opened and f.close in template), None)
    if name == "auto":
        if found is None:
            raise InputError(
                "thinking_format", "auto", "the chat template shows no thinking marker that clifflab knows",
                f"set the model's thinking_format to one of {', '.join(FORMATS)} (none: it answers without thinking)",
            )  # fmt: skip
        return found
    if name not in FORMATS:
        raise InputError("thinking_format", name, "unknown", f"choose auto, {', '.join(FORMATS)}")
    form = FORMATS[name]
    if form.pre_opened and not prefix.endswith(form.open):
        raise InputError(
            "thinking_format", name, f"the chat template does not end with {form.open}", "set it to qwen3 or none"
        )
    if not form.pre_opened and form.thinks and prefix.endswith(form.open):
        raise InputError("thinking_format", name, f"the chat template already writes {form.open}", "set it to r1")
    return form
