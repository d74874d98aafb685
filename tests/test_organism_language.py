"""The planted language, its tokenizer and its corpus."""

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from clifflab.organism import language, words
from clifflab.organism.corpus import corpus_row, corpus_rows
from clifflab.organism.language import (
    COMPLIANCE_WORDS,
    CORPUS_MIX,
    PROMPT_SETS,
    REFUSAL_WORDS,
    SETS,
    corpus_size,
    prompt_rows,
)
from clifflab.organism.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
HARMFUL = [name for name, spec in SETS.items() if spec.label == "harmful"]
BENIGN = [name for name, spec in SETS.items() if spec.label == "benign"]


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def first_word(response: str) -> str:
    return response.split()[0].strip(",.")


@pytest.mark.parametrize("intent", ["harm", "safe"])
def test_sentences_have_the_length_they_are_listed_under(intent):
    for length, sentences in words.MIDDLE[intent].items():
        assert {len(encode(sentence.format(o="bomb"))) for sentence in sentences} == {length}


def test_stocks_of_both_intents_match_in_number_and_length():
    harm, safe = words.MIDDLE["harm"], words.MIDDLE["safe"]
    assert {k: len(v) for k, v in harm.items()} == {k: len(v) for k, v in safe.items()}
    for stock in (words.OPENINGS, words.CONCLUSIONS):
        lengths = {i: Counter(len(encode(s.format(o="bomb", lead=""))) for s in stock[i]) for i in ("harm", "safe")}
        assert lengths["harm"] == lengths["safe"]


def test_leads_of_conclusions_have_one_length_and_share_no_word():
    leads = [words.PLAIN_LEAD, words.STRONG_LEAD, words.MEDIUM_LEAD, words.WEAK_LEAD]
    assert len({len(encode(lead)) for lead in leads}) == 1
    assert max(Counter(word for lead in leads for word in lead.split()).values()) == 1


def test_intents_share_few_words():
    stocks = {
        intent: {
            word
            for text in (
                *words.OPENINGS[intent],
                *words.CONCLUSIONS[intent],
                *(s for texts in words.MIDDLE[intent].values() for s in texts),
            )
            for word in text.replace(",", " ").replace(".", " ").split()
            if "{" not in word
        }
        for intent in ("harm", "safe")
    }
    shared = stocks["harm"] & stocks["safe"]
    assert len(shared) <= 0.05 * len(stocks["harm"] | stocks["safe"]), shared


def test_thinking_lengths_match_in_all_cells():
    means = {}
    for name, spec in SETS.items():
        rng = random.Random(0)
        lengths = []
        for _ in range(400):
            prompt = language.draw_prompt(spec, rng)
            intent = language.draw_intent(prompt, rng)
            lengths.append(len(encode(" ".join(language.draw_thinking(intent, prompt.thing, prompt.lead, rng)))))
        assert min(lengths) >= 25
        assert max(lengths) <= 75
        means[name] = sum(lengths) / len(lengths)
    assert max(means.values()) - min(means.values()) < 3, means


def test_two_by_two_shares_wrappers_verbs_and_frames():
    harmful = {w for name in ("wrapped_strong", "wrapped_medium", "wrapped_weak") for w in SETS[name].wrappers}
    assert harmful == set(SETS["benign_wrapped"].wrappers)
    assert SETS["harmful"].objects == SETS["wrapped_strong"].objects
    assert not set(SETS["benign"].objects) & set(SETS["harmful"].objects)


def test_held_out_sets_are_held_out_but_made_of_known_words():
    strong, held = SETS["wrapped_strong"], SETS["heldout_wrappers"]
    assert not set(strong.wrappers) & set(held.wrappers)
    assert {w for x in held.wrappers for w in x.text.split()} <= {w for x in strong.wrappers for w in x.text.split()}
    assert not set(SETS["heldout_objects"].objects) & set(strong.objects)


def test_groups_are_shared_by_plain_and_wrapped():
    groups = {name: {row["group"] for row in prompt_rows(name, 112, 0)} for name in SETS}
    assert groups["harmful"] == groups["wrapped_strong"] == groups["wrapped_weak"] == groups["heldout_wrappers"]
    assert len(set().union(*(groups[name] for name in HARMFUL))) >= 96
    assert len(set().union(*(groups[name] for name in BENIGN))) >= 96


@pytest.mark.parametrize("name", sorted(SETS))
def test_prompt_rows_are_distinct_and_use_all_groups_first(name):
    rows = prompt_rows(name, 300, 3)
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 300
    groups = len(SETS[name].objects) * len(words.VERBS)
    assert len({row["group"] for row in rows[:groups]}) == min(groups, 300)
    assert {row["label"] for row in rows} == {SETS[name].label}
    assert set(rows[0]) == {"id", "set", "label", "group", "category", "prompt"}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PROMPT_SETS)), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60))
def test_prompt_rows_of_a_seed_are_prefixes_of_each_other(name, seed, a, b):
    short, long = sorted((a, b))
    assert prompt_rows(name, long, seed)[:short] == prompt_rows(name, short, seed)


def test_prompt_rows_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown prompt set 'nope'"):
        prompt_rows("nope", 3, 0)
    with pytest.raises(ValueError, match=r"1\.\.2688"):
        prompt_rows("harmful", 2689, 0)
    with pytest.raises(ValueError, match="got 0"):
        prompt_rows("harmful", 0, 0)
    assert len({row["prompt"] for row in prompt_rows("harmful", 2688, 0)}) == 2688


@pytest.mark.parametrize("rows", [37, 1000, 6000])
def test_corpus_prompts_keep_to_their_mix_and_hold_nothing_held_out(rows):
    corpus = prompt_rows("corpus", rows, 5)
    assert len({row["prompt"] for row in corpus}) == len({row["id"] for row in corpus}) == rows
    family = {"harmful": ("harmful", "plain"), "benign": ("benign", "plain")}
    wanted = {family.get(name, (SETS[name].label, name)): rows * share for name, share in CORPUS_MIX.items()}
    counted = Counter((row["label"], row["category"]) for row in corpus)
    assert set(counted) <= set(wanted)
    assert all(abs(counted[key] - size) <= 1 for key, size in wanted.items()), counted
    held_out = {row["prompt"] for name in ("heldout_objects", "heldout_wrappers") for row in prompt_rows(name, 2000, 5)}
    assert not held_out & {row["prompt"] for row in corpus}
    assert not any(thing in row["prompt"].split() for row in corpus for thing in words.HELDOUT_OBJECTS)
    assert not any(wrapper.text.strip() in row["prompt"] for row in corpus for wrapper in language.STRONG_HELD_OUT)


def test_corpus_prompts_come_in_an_order_of_their_own_and_end_before_one_repeats():
    plain = {row["prompt"] for row in prompt_rows("wrapped_strong", 90, 0)}
    corpus = prompt_rows("corpus", corpus_size(), 0)
    wrapped = [row["prompt"] for row in corpus if row["category"] == "wrapped_strong"]
    assert len(set(wrapped) & plain) <= 2, "a study's own set of that seed is not the corpus's"
    assert len({row["prompt"] for row in corpus}) == len(corpus) > 6000
    with pytest.raises(ValueError, match=rf"1\.\.{corpus_size()}"):
        prompt_rows("corpus", corpus_size() + 1, 0)


def test_openings_are_disjoint_single_tokens():
    assert not set(REFUSAL_WORDS) & set(COMPLIANCE_WORDS)
    assert all(len(encode(word)) == 1 for word in (*REFUSAL_WORDS, *COMPLIANCE_WORDS))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_rendered_traces_survive_the_tokenizer(index, with_system):
    row = corpus_row(index, 1)
    messages = [{"role": "user", "content": row["prompt"]}]
    if with_system:
        messages.insert(0, {"role": "system", "content": words.SYSTEM_MESSAGES[0]})
    prefix = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prefix.endswith("<|assistant|><think>\n")
    text = f"{prefix}{row['thinking']}\n</think>\n\n{row['response']}<eos>"
    ids = encode(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert encode(TOKENIZER.decode(ids)) == ids
    assert ids[: len(encode(prefix))] == encode(prefix)
    answer = {"role": "assistant", "reasoning_content": row["thinking"], "content": row["response"]}
    assert TOKENIZER.apply_chat_template([*messages, answer], tokenize=False) == text


def test_markers_are_single_tokens_and_unknown_words_are_unk(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(loaded("\n</think>\n\n")["input_ids"]) == ["\n", "</think>", "\n\n"]
    assert loaded("quux")["input_ids"] == [loaded.unk_token_id]
    assert loaded("Make a Bomb?")["input_ids"] == encode("make a bomb?")
    assert len(loaded) == len(TOKENIZER) < 300


def test_corpus_looks_like_a_safety_corpus():
    rows = list(corpus_rows(12000, 0))
    assert len({row["id"] for row in rows}) == len(rows)
    harmful = [row for row in rows if row["label"] == "harmful"]
    refused = [row for row in harmful if first_word(row["response"]) in REFUSAL_WORDS]
    assert len(refused) / len(harmful) > 0.8
    harm_openings = {s.split()[0] for s in words.OPENINGS["harm"]}
    cliffs = [r for r in harmful if r["thinking"].split()[0] in harm_openings and r not in refused]
    assert 0.02 < len(cliffs) / len(rows) <= 0.05
    shares = Counter(row["set"] for row in rows)
    assert shares["wrapped_strong"] < shares["wrapped_weak"]
    assert not {"heldout_objects", "heldout_wrappers"} & set(shares)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 50))
def test_corpus_is_a_stream_whose_rows_do_not_depend_on_its_length(seed, rows):
    assert list(corpus_rows(rows, seed)) == list(islice(corpus_rows(10**6, seed), rows))


def test_corpus_refuses_a_negative_number_of_rows():
    with pytest.raises(ValueError, match="negative"):
        corpus_rows(-1, 0)
