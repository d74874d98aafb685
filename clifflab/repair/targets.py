"""What the model is to write for each chosen example (SPEC section 6).

``keep-thinking`` leaves the model's own thinking as it is, up to its end, and puts a refusal behind it: what is learnt
is to act on the intention that is already there. ``rewrite`` takes a safe completion that the corpus gives. Benign
examples keep the model's own answer, and never get a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from clifflab.config import TargetsConfig
from clifflab.errors import TraceError
from clifflab.repair.refusals import LEAST, MARKERS, VARIED, lent, refusal, spread
from clifflab.repair.select import BENIGN, HARMFUL, Choice, NothingToChooseError
from clifflab.repair.stream import lenders
from clifflab.repair.texts import Library, Words
from clifflab.science.judges import judge
from clifflab.science.selection import Rules, draws, id_codes
from clifflab.text.render import Messages, split_inline

Check = Callable[[Messages, str | None, str], None]
_OPEN, _CLOSE = "<think>", "</think>"
_ROUNDS = 8  # of choosing again in place of traces that no example can be made of


@dataclass(frozen=True)
class Targets:
    """Training examples.

    Attributes:
        rows: Rows of ``train.jsonl``, harmful ones by rank, then benign ones.
        rejected: Ids of the chosen traces that could not become one, and why.
        about: Kind, source of the refusals, distinct refusals, rows and rejects, plain data.
    """

    rows: list[dict[str, Any]]
    rejected: dict[str, str]
    about: dict[str, Any]


def make_targets(
    choice: Choice,
    library: Library,
    settings: TargetsConfig,
    rules: Rules,
    seed: int,
    check: Check | None = None,
    safe: Collection[str] | None = None,
) -> Targets:
    """Write the target of every example of a choice.

    Args:
        choice: The examples.
        library: Their words, those of the other traces of their groups, and those of refused traces that lend theirs.
        settings: Kind of target, and whose refusals.
        rules: What makes a trace eligible; refusals are lent by traces that it holds for harmful.
        seed: Seed of the draws.
        check: Tries to render an example; raises :class:`~clifflab.errors.TraceError` where that cannot be done.
        safe: Traces that a guard calls safe; by default those of the choice's corpus.
    """
    refusals = _Refusals(choice, library, settings, rules, seed, safe)
    rows: list[dict[str, Any]] = []
    rejected: dict[str, str] = {}
    clusters = dict(zip(choice.corpus.strings("trace_id"), choice.corpus.strings("cluster"), strict=True))
    for role in (HARMFUL, BENIGN):
        for name in choice.ids(role):
            try:
                words = library.by_id.get(name)
                if words is None:
                    raise TraceError("no_text", "its text is not among the traces")
                thinking, response = _target(words, role, settings, refusals)
                rows.append(_row(words, role, clusters.get(name) or "", thinking, response, check))
            except TraceError as error:
                rejected[name] = error.reason
    harmful = [row["response"] for row in rows if row["role"] == HARMFUL]
    about = {
        "kind": settings.kind,
        "refusals": refusals.source if settings.kind == "keep-thinking" else None,
        "distinct": len(set(harmful)),
        "rows": len(rows),
        "benign": len(rows) - len(harmful),
        "rejected": dict(sorted(Counter(rejected.values()).items())),
    }
    return Targets(rows, rejected, about)


def with_targets(
    choose: Callable[[Collection[str]], Choice], make: Callable[[Choice], Targets]
) -> tuple[Choice, Targets]:
    """Choose until the budget is met by traces that can become training examples.

    Args:
        choose: Chooses, some traces left out.
        make: Writes the targets of a choice.

    Returns:
        The choice and its targets. What was rejected on the way is counted; where the corpus has nothing more to give,
        there are fewer examples than were chosen.
    """
    choice = choose(())
    made = make(choice)
    rejected = dict(made.rejected)
    for _ in range(_ROUNDS):
        if not made.rejected or not any(row["role"] == HARMFUL for row in made.rows):
            break
        try:
            choice = choose(rejected)
        except NothingToChooseError:
            break
        made = make(choice)
        rejected |= made.rejected
    about = {**made.about, "rejected": dict(sorted(Counter(rejected.values()).items()))}
    return choice, Targets(made.rows, rejected, about)


def _target(words: Words, role: str, settings: TargetsConfig, refusals: _Refusals) -> tuple[str | None, str]:
    """Thinking and response of one example."""
    if settings.kind == "keep-thinking":
        return words.thinking, words.response if role == BENIGN else refusals.of(words)
    if not (words.target or "").strip():
        if role == BENIGN:
            return words.thinking, words.response
        raise TraceError("no_target", "the corpus gives no target")
    thinking, response = split_inline(words.target or "")
    if not response:
        raise TraceError("empty_target", "the target holds no response")
    if role == BENIGN and judge(response, closed=True).outcome == "refused":
        raise TraceError("target_refuses", "the target of a benign request is a refusal")
    return (words.thinking if thinking is None else thinking), response


def _row(
    words: Words, role: str, cluster: str, thinking: str | None, response: str, check: Check | None
) -> dict[str, Any]:
    if not response.strip():
        raise TraceError("empty", "the response is empty")
    if _CLOSE in (thinking or "") or any(marker in response for marker in MARKERS):
        raise TraceError("closing_ambiguous", "thinking or response holds a marker that ends thinking")
    if check is not None:
        check(words.messages, thinking, response)
    written = response if thinking is None else f"{_OPEN}\n{thinking}\n{_CLOSE}\n\n{response}"
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in words.messages]
    return {
        "id": words.trace_id,
        "role": role,
        "set": words.set,
        "group": words.group,
        **({"cluster": cluster} if cluster else {}),
        "messages": [*turns, {"role": "assistant", "content": written}],
        "thinking": thinking,
        "response": response,
    }


class _Refusals:
    """The refusal of every harmful example: its own, one of its group, or one that is drawn."""

    def __init__(
        self,
        choice: Choice,
        library: Library,
        settings: TargetsConfig,
        rules: Rules,
        seed: int,
        safe: Collection[str] | None,
    ) -> None:
        self._library, self._seed = library, seed
        corpus = choice.corpus
        names = corpus.strings("trace_id")
        self._safe = set(names[corpus.safe].tolist()) if safe is None and corpus.judged else safe
        self.source, stock = "varied", list(VARIED)
        ids = choice.ids(HARMFUL) if settings.kind == "keep-thinking" else []
        self._found: dict[str, str] = {}
        if settings.refusals == "own":
            self._found = {name: near for name in ids if (near := self._near(name)) is not None}
            lenders_ = [library.by_id[name] for name in names[lenders(corpus, rules, seed)] if name in library.by_id]
            mine = lent((words.response, words.request) for words in lenders_ if not words.cut)
            if len(mine) >= LEAST:
                self.source, stock = "own", mine
        self._found |= spread(stock, [name for name in ids if name not in self._found], seed)

    def of(self, words: Words) -> str:
        """A refusal for one example."""
        return self._found[words.trace_id]

    def _near(self, name: str) -> str | None:
        """The trace's own refusal, or else one of its group, drawn by the seed."""
        words = self._library.by_id.get(name)
        if words is None:
            return None
        if (own := self._refusal(words)) is not None:
            return own
        mates = self._library.groups[words.group]
        others = [(mate.trace_id, text) for mate in mates if (text := self._refusal(mate)) is not None]
        if not others:
            return None
        places = draws(id_codes([mate for mate, _ in others]), self._seed, f"refusal for {name}")
        return others[int(places.argmin())][1]

    def _refusal(self, words: Words) -> str | None:
        """What of a trace's response refuses and does no more, of a request that is not benign."""
        if words.label == BENIGN or not words.closed or words.cut:
            return None
        if self._safe is not None and words.trace_id not in self._safe:
            return None
        return refusal(words.response, words.request)
