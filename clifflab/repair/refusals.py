"""Refusals that can stand as targets: varied ones that speak of no request, and those of the model that may be lent.

No fixed sentence is ever the target of all examples: a model that is tuned on one sentence learns the sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from clifflab.data.duplicates import normal_words
from clifflab.science.judges import RULES, judge
from clifflab.science.selection import draws, id_codes
from clifflab.text.formats import FORMATS

MARKERS = tuple(sorted({part for form in FORMATS.values() for part in (form.open, form.close) if part}))
LEAST = 5  # fewer distinct refusals of the model's own are too few to draw from
LONGEST = 120  # words of a refusal that is lent
VARIED = (
    "I'm sorry, but I can't help with that.",
    "I won't help with this. If something else is on your mind, I'm glad to talk it over.",
    "I can't assist with this request because it could lead to someone being harmed.",
    "Sorry, but this is something I have to decline. Is there another way I can be useful?",
    "I understand that you asked for this, but I'm not able to provide it.",
    "I'm not going to help here, since the result could hurt people.",
    "I have to decline this one. I would be happy to help with a safe alternative instead.",
    "I can't provide that. The risk of harm is too high, however the question is put.",
    "No matter how the request is framed, I can't help with something that may cause harm.",
    "Thank you for explaining. Even so, I can't help with this request.",
    "I'm unable to help with this. Please tell me if there is a different question behind it.",
    "I will not do that. I care about keeping people safe, you included.",
    "I must decline: answering would make harm more likely. I can offer general safety advice instead.",
    "I cannot fulfil this request. If you are in a difficult situation, someone you trust may be able to help.",
    "I don't want to contribute to harm, so I won't answer this. Let me know what else you need.",
    "I'm sorry, I can't do that. I'd gladly help with something that puts nobody at risk.",
)

_LIST = next(rule for rule in RULES if rule.name == "gives a list")
# Words of requests and refusals alike: sharing one of them says nothing about what was asked.
_COMMON = frozenset(
    normal_words(
        """
        a about above after again against all also although always am an and another any anyone anything are around as
        ask asked asking at away based be because been before behind being below best better between both but by came
        can cannot cant come could couldnt detail detailed did didnt different discuss do does doesnt doing done dont
        down during each either else engage even ever every everyone example explain feel few find first follow for
        free from general get give given go going good got great guide had happy has have having he hello help helpful
        her here hers hi him his how however i id if ill im important in information instead instructions into is isnt
        it its itself ive just keep kind kindly know last learn let lets like long look made make makes making many may
        maybe me might mine more most much must my myself need needed never new next no none nor not nothing now of off
        offer on once one only or other our ours out over own part people person please possible provide put question
        questions quite rather reach really request requests right safe same say see seek shall she should show
        similar since small so some someone something sorry step steps still such support sure take talk tell than
        thank thanks that thats the their them then there therefore these they thing things think this those though
        through to together too topic try two under understand until up us use used useful using very want was way ways
        we well were what when where whether which while who whom why will with within without wont work would write
        yes yet you your yours yourself assist assistance unable decline refuse unfortunately answer respond response
        appropriate harm harmful
        """
    ).split()
)
_STEM = 4  # letters by which forms of one word are known


def content(text: str) -> frozenset[str]:
    """What a text speaks of: the beginnings of its words, those that requests and refusals share left out."""
    return frozenset(word[:_STEM] for word in normal_words(text).split() if word not in _COMMON)


def whole(response: str) -> bool:
    """Whether a response is a refusal and nothing more: no list of steps follows, and no more thinking."""
    if any(marker in response for marker in MARKERS) or _LIST.pattern.search(response):
        return False
    return judge(response, closed=True).outcome == "refused"


def general(response: str, request: str) -> bool:
    """Whether a refusal of one request could refuse any other: it is short and shares no content word with it."""
    return len(response.split()) <= LONGEST and not content(response) & content(request)


def lent(refusals: Iterable[tuple[str, str]]) -> list[str]:
    """Refusals that may be lent, each once, sorted.

    Args:
        refusals: Pairs of a response and its own request.
    """
    return sorted({response for response, request in refusals if whole(response) and general(response, request)})


def spread(stock: Sequence[str], ids: Sequence[str], seed: int) -> dict[str, str]:
    """A refusal for each id, in an order drawn by the seed; each is used as often as any other, within one."""
    if not ids:
        return {}
    texts = np.argsort(draws(id_codes(stock), seed, "order of refusals"), kind="stable")
    turns = np.argsort(draws(id_codes(ids), seed, "order of examples"), kind="stable")
    return {ids[place]: stock[texts[turn % len(stock)]] for turn, place in enumerate(turns)}
