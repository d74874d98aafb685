"""From rows of a conversation and its answer to token ids and the tokens that are learnt.

An example is rendered as every other stage renders a trace, plus the token that ends the model's turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clifflab.config import PromptSet, TuneConfig
from clifflab.data.files import iter_rows
from clifflab.data.prompts import read_prompts
from clifflab.errors import InputError, TraceError
from clifflab.text.cut import without_middle
from clifflab.text.render import Renderer

LEAST_HELD = 8  # fewer validation examples tell nothing
_SENTINEL = "clifflabsentinel"


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        id: Its id in the data.
        group: Examples of one group are held out together.
        ids: Token ids: chat prefix, thinking, closing tokens, response, end of turn.
        start: First token that is learnt; all after it are, but for ``gap``.
        gap: The first token after thinking that was cut out, which does not follow from what is left of it; ``None``
            where nothing was cut.
    """

    id: str
    group: str
    ids: tuple[int, ...]
    start: int
    gap: int | None = None

    @property
    def learnt(self) -> list[bool]:
        """Whether each token is learnt, one flag a token."""
        return [place >= self.start and place != self.gap for place in range(len(self.ids))]

    @property
    def targets(self) -> int:
        """Number of tokens that are learnt."""
        return len(self.ids) - self.start - (self.gap is not None and self.gap >= self.start)


@dataclass(frozen=True)
class Encoded:
    """What became of a table of rows.

    Attributes:
        examples: The usable ones, in the data's order.
        rejects: ``id, reason, detail`` of the others.
        cut: How many of the examples lost the middle of their thinking.
    """

    examples: list[Example]
    rejects: list[dict[str, Any]]
    cut: int

    @property
    def reasons(self) -> dict[str, int]:
        """Number of rejects by reason."""
        return dict(sorted(Counter(reject["reason"] for reject in self.rejects).items()))


def read_rows(path: str, field: str = "--data") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read a file of examples: chat rows (``messages``), or a prompt and a response column, thinking inline or apart.

    Args:
        path: A JSONL, JSON, CSV or Parquet file, a saved dataset, or ``hf:NAME[:SPLIT]``. Its column ``cluster``, else
            ``group``, names what is held out together; without either, equal requests are.
        field: What the error lines call it.

    Returns:
        Rows ``id, group, messages, thinking, response`` and rejects ``id, reason, detail``.

    Raises:
        InputError: The file cannot be read, or has no usable row.
    """
    if path.startswith("organism:"):
        remedy = "write traces of the planted language to a file: clifflab organism corpus"
        raise InputError(field, path, "names requests without answers", remedy)
    try:
        first = next((record for _, record, _ in iter_rows(field, path) if record is not None), {})
        columns = {"group": "cluster"} if first.get("cluster") is not None else {}
        spec = PromptSet(name="data", path=path, label="benign", existing=True, columns=columns)
        rows, rejects = read_prompts(spec, field)
    except InputError as error:
        if error.field != f"{field}.path":
            raise
        raise InputError(field, error.value, error.problem, error.remedy) from None
    return rows, [{key: reject[key] for key in ("id", "reason", "detail")} for reject in rejects]


def encode(
    rows: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    stop_ids: Collection[int],
    context: int,
    settings: TuneConfig,
    field: str = "--data",
) -> Encoded:
    """Render rows to token ids.

    Args:
        rows: ``id, messages, thinking, response``, and ``group`` (or ``cluster``, which goes first) where known; a last
            turn of the assistant's in ``messages`` is left out.
        renderer: The model's.
        stop_ids: Ids that end a turn.
        context: Longest example in tokens.
        settings: What is learnt, and what becomes of long examples.
        field: What the error line calls the rows.

    Raises:
        InputError: No row is usable.
    """
    end = turn_end(renderer, stop_ids)
    examples: list[Example] = []
    rejects: list[dict[str, Any]] = []
    for row in rows:
        try:
            examples.append(_example(row, renderer, end, context, settings))
        except TraceError as error:
            rejects.append({"id": str(row["id"]), "reason": error.reason, "detail": error.detail})
    if not examples:
        why = f"all {len(rejects)} are rejected, the first: {rejects[0]['detail']}" if rejects else "there is none"
        raise InputError(field, f"{len(rows)} examples", f"no example is usable ({why})", "give other examples")
    return Encoded(examples, rejects, sum(example.gap is not None for example in examples))


def _example(row: Mapping[str, Any], renderer: Renderer, end: int, context: int, settings: TuneConfig) -> Example:
    messages = list(row["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if row["response"] is None or not str(row["response"]).strip():
        raise TraceError("empty", "the response is empty")
    ids, spans = renderer.render(messages, row["thinking"], row["response"])
    ids, gap = [*ids, end], None
    if len(ids) > context:
        if settings.too_long == "reject":
            raise TraceError("too_long", f"{len(ids)} tokens, the model reads {context}")
        found = without_middle(ids, spans, len(ids) - context)
        if found is None:
            raise TraceError("too_long", f"{len(ids)} tokens, and without its thinking still more than {context}")
        ids, spans, gap = found
    start = spans.prefix_end if settings.loss_on == "assistant" else spans.response_start
    group = row.get("cluster") or row.get("group") or row["id"]
    return Example(str(row["id"]), str(group), tuple(ids), start, gap)


def turn_end(renderer: Renderer, stop_ids: Collection[int]) -> int:
    """The token that ends the assistant's turn, as the chat template writes it, where generation stops at that token.

    Where the template writes another one, or none, it is the tokenizer's end of text, or the smallest id that stops.

    Raises:
        InputError: Nothing stops the model.
    """
    tokenizer = renderer.tokenizer
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, strftime_now=lambda _: ""))
    except Exception:  # noqa: BLE001 - templates are programs of the checkpoint; some refuse a finished turn
        text = ""
    _, found, tail = text.rpartition(_SENTINEL)
    for token in renderer.encode(tail) if found else ():
        if token in stop_ids:
            return token
        if renderer.decode([token]).strip():
            break
    if not stop_ids:
        name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        raise InputError("model", name, "no token ends its turn", "set eos_token in the tokenizer's config")
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id in stop_ids else min(stop_ids)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples, whole groups at a time.

    Groups are taken in a seeded order while they fit the share; fewer than :data:`LEAST_HELD` examples hold none out.
    """
    wanted = int(share * len(examples) + 1e-9)
    sizes = Counter(example.group for example in examples)
    names = sorted(sizes)
    held: set[str] = set()
    count = 0
    for place in np.random.default_rng([seed, 1]).permutation(len(names)):
        if count + sizes[names[place]] <= wanted:
            held.add(names[place])
            count += sizes[names[place]]
    if count < LEAST_HELD:
        return list(examples), []
    return [e for e in examples if e.group not in held], [e for e in examples if e.group in held]
