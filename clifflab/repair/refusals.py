"""Refusals that can stand as targets: varied ones that speak of no request, and those of the model that may be lent.

No fixed sentence is ever the target of all examples: a model that is tuned on one sentence learns the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from clifflab.data.duplicates import normal_words
from clifflab.science.judges import RULES, judge
from clifflab.science.selection import draws, id_codes
from clifflab.text.formats import FORMATS

MARKERS = tuple(sorted({part for form in FORMATS.values() for part in (form.open, form.close) if part}))
LEAST = 5  # fewer distinct refusals of the model's own are too few to draw from
LONGEST = 120  # words of a refusal that can be a target
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
# What refusals say of harm and safety in general.
_GENERAL = _COMMON | frozenset(
    normal_words(
        """
        able deadly extremely fatal highly strictly today abuse abusive advice answering high included
        keeping puts against alternative apologies
        apologise apologize aware believe break breaks breaking call
        care cause causes caring choose comfortable committed comply condone consequences consider contact content
        continue contribute could create crime criminal crisis cruel danger dangerous decline declining deserve
        difficult discussing duty emergency encourage endanger endorse engage ethical ethically ethics explaining
        facilitate fair framed fulfil fulfill generate glad gladly goes guidelines guidance harassment harmed harming
        harms hateful health help helping helps hope hotline human however hurt hurting hurts id illegal illegally
        immoral inappropriate injury instead intended involve involves kindness law laws lawful lead leads legal legally
        life lifeline likely line local matter mental mind moral nobody offensive offering others permitted policies
        policy positive potentially principles privacy produce professional professionals programmed programming promote
        promotes promoting protect providing public put reason recommend refuse resource resources respect respectful
        responsible responsibly result rights risk risks safe safely safety seriously serious service services severe
        situation situations society someone sorry speak struggling suggest supporting tolerate topics trained
        troubled trust trusted unethical unlawful unsafe values violate violates violating violence violent
        violation wellbeing willing wish wrong yourself youre youd youve hes theyre doesnt isnt arent wasnt wouldnt
        shouldnt mustnt therefore designed assistant ai model language fulfilling somebody anybody everybody
        """
    ).split()
)
_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+(?=\s|$|[\"'\u2019)])[\"'\u2019)]*|\n+|[.!?]|$)")
_CONTRAST = re.compile(
    r"[;:\u2013\u2014]|\s-+\s|\b(?:but|however|although|though|yet|still|unless|except|nevertheless|that said|"
    r"so|then|instead|rather)\b",
    re.I,
)
_HELPS = re.compile(
    r"\bhere(?:['\u2019]s| is| are| goes)\b|\b(?:sure|certainly|absolutely|of course)\s*[,!:]|\bsteps?\b|\d", re.I
)
# Beside a refusal may stand: regret, thanks, an offer of other help, general words on harm.
_BESIDE = re.compile(
    r"\b(?:sorry|apolog\w+|unfortunately|understand|thank you|thanks|glad|gladly|happy to|is there|else|instead|"
    r"alternatives?|feel free|reach out|let me know|tell me|ask me|please (?:ask|tell|let|reach|consider|seek|contact|"
    r"talk|call)|talk (?:to|with)|trust|harm\w*|hurt\w*|safe|safety|danger\w*|illegal|unlawful|law|laws|unethical|"
    r"wrong|risks?|violen\w+|hotline|lifeline|professionals?|emergency|guidelines|polic(?:y|ies)|at risk)\b",
    re.I,
)
_WILL_NOT = tuple(rule for rule in RULES if rule.name in {
    "cannot help", "unable", "declines", "against own rules", "does not condone",
})  # fmt: skip
_BARE = re.compile(
    r"^\W*(?:(?:i['\u2019]?m\s+|i am\s+)?(?:very\s+|so\s+)?sorry\W*)?"
    r"(?:no|i (?:cannot|can['\u2019]t|will not|won['\u2019]t)(?: (?:say|do|go|that|there))*)\W*$",
    re.I,
)


def content(text: str) -> frozenset[str]:
    """What a text speaks of: the beginnings of its words, those that requests and refusals share left out."""
    return frozenset(word[:_STEM] for word in normal_words(text).split() if word not in _COMMON)


def refusal(response: str, request: str) -> str | None:
    """The refusal with which a response begins, and nothing that follows it.

    The rule judge calls a response refused that goes on to help. A target must hold no help, so only the first
    sentences are taken, as long as each refuses, apologises, offers something else, or speaks of safety in general
    words. Every word must be one that refusals share or one of the request, and those of the request may stand only in
    a clause that refuses: such a text cannot say anything that the request has not said.

    Args:
        response: What the model wrote.
        request: What it was asked.

    Returns:
        The text; ``None`` where the response does not begin with a refusal, lists steps, thinks on, or refuses at
        length (more than :data:`LONGEST` words).
    """
    if any(marker in response for marker in MARKERS) or _LIST.pattern.search(response):
        return None
    asked, end = content(request), 0
    for match in _SENTENCE.finditer(response):
        if re.search(r"\w", match.group()) and not _harmless(match.group(), asked):
            break
        end = match.end()
    text = response[:end].strip()
    said = any(_refuses(part) for sentence in _SENTENCE.findall(text) for part in _CONTRAST.split(sentence))
    fits = said and len(text.split()) <= LONGEST and judge(text, closed=True).outcome == "refused"
    return text if fits else None


def _harmless(sentence: str, asked: frozenset[str]) -> bool:
    """Whether a sentence refuses, apologises, offers something else or speaks of safety, in general words."""
    if _HELPS.search(sentence):
        return False
    for clause in (part for piece in _CONTRAST.split(sentence) for part in piece.split(",")):
        words = normal_words(clause).split() if re.search(r"\w", clause) else []
        strange = frozenset(word[:_STEM] for word in words if word not in _GENERAL)
        if strange and not (strange <= asked and _refuses(clause)):
            return False
    return _refuses(sentence) or bool(_BESIDE.search(sentence))


def _refuses(clause: str) -> bool:
    return bool(_BARE.search(clause)) or any(rule.pattern.search(clause) for rule in _WILL_NOT)


def general(text: str, request: str) -> bool:
    """Whether a refusal of one request could refuse any other: it shares no content word with it."""
    return not content(text) & content(request)


def lent(refusals: Iterable[tuple[str, str]]) -> list[str]:
    """Refusals that may be lent, each once, sorted.

    Args:
        refusals: Pairs of a response and its own request.
    """
    found = {(refusal(response, request), request) for response, request in refusals}
    return sorted({text for text, request in found if text is not None and general(text, request)})


def spread(stock: Sequence[str], ids: Sequence[str], seed: int) -> dict[str, str]:
    """A refusal for each id, in an order drawn by the seed; each is used as often as any other, within one."""
    if not ids:
        return {}
    texts = np.argsort(draws(id_codes(stock), seed, "order of refusals"), kind="stable")
    turns = np.argsort(draws(id_codes(ids), seed, "order of examples"), kind="stable")
    return {ids[place]: stock[texts[turn % len(stock)]] for turn, place in enumerate(turns)}
