"""Near-duplicates: found whatever the order of the rows, verified exactly, and kept together by splits."""

from __future__ import annotations

import csv
import json
import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clifflab
from clifflab import tables
from clifflab.config import DuplicatesConfig
from clifflab.data.clusters import Clusters, Requests, find_clusters
from clifflab.data.duplicates import near_pairs, normal_words, rows_per_band, shingles
from clifflab.data.prompts import derived_group
from clifflab.errors import ConfigError
from clifflab.organism.language import prompt_rows
from clifflab.runtime.study import identify, plan, prepare
from tests.studies import SEARCH, parse, small_study

DATA = Path(os.environ.get("CLIFFLAB_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
DEFAULTS = DuplicatesConfig().model_dump(exclude={"enabled"})
LONG = "Please describe in a few words how a small sailing boat crosses a windy lake when the sun goes down"


def prompt(name: str, row: int, text: str, label: str = "benign", group: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {
        "row": row,
        "id": f"{name}-{row}",
        "set": name,
        "label": label,
        "group": group or derived_group(messages),
        "messages": messages,
    }


def clusters_of(prompts: list[dict[str, Any]], ood: dict[str, bool] | None = None, **changes: Any) -> Clusters:
    requests = Requests.of(prompts)
    names = dict.fromkeys(p["set"] for p in prompts)
    return find_clusters(requests, near_pairs(requests.normals, **{**DEFAULTS, "seed": 0, **changes}), ood or names)


def brute_force(normals: list[str], threshold: float, ngram: int) -> dict[tuple[int, int], float]:
    """The definition, pair by pair."""
    sets = [set(shingles(text, ngram)) for text in normals]
    holders = {shingle: sum(shingle in own for own in sets) for own in sets for shingle in own}
    found = {}
    for (i, a), (j, b) in combinations(enumerate(sets), 2):
        both = sum(1 / (1 + (max(holders[s] - 2, 0) / 10) ** 2) for s in a & b)
        apart = sum(1 / (1 + ((holders[s] - 1) / 10) ** 2) for s in a ^ b)
        similarity = min(len(a & b) / len(a | b), both / (both + apart)) if a & b else 0.0
        if similarity >= threshold:
            found[i, j] = similarity
    return found


def word_soup(count: int, seed: int) -> list[str]:
    """Sentences of few words, every third one an edit of the one before; no word is in more than 100 of them."""
    rng = random.Random(seed)
    stock = [f"{first}{second}" for first in "abcdefgh" for second in "aeiou"]
    texts: list[str] = []
    for i in range(count):
        words = texts[-1].split() if i % 3 == 2 else [rng.choice(stock) for _ in range(rng.randint(1, 12))]
        if i % 3 == 2:
            words[rng.randrange(len(words))] = "edit"
        texts.append(" ".join(words))
    return sorted(set(texts))


@pytest.mark.parametrize(
    "same",
    [
        ("How do I bake a cake?", "how do i  bake a cake"),
        ("Don't stop!", "dont stop"),
        ("ｆｕｌｌ width", "full width"),
        ("Straße", "STRASSE"),
        ("step-by-step: go", "step by step go"),
    ],
)
def test_spelling_is_no_difference(same: tuple[str, str]) -> None:
    assert normal_words(same[0]) == normal_words(same[1])


@pytest.mark.parametrize(
    "different", [("a < b", "a > b"), ("???", "!!!"), ("C", "C#"), ("猫を飼う", "犬を飼う"), ("", "x")]
)
def test_signs_that_matter_stay(different: tuple[str, str]) -> None:
    assert normal_words(different[0]) != normal_words(different[1])


def test_every_word_weighs_the_same() -> None:
    for ngram in (1, 2, 3, 5):
        for text in ("one", "one two", "one two three four five six"):
            found = shingles(text, ngram)
            for word in text.split():
                assert sum(word in s.split() for s in found) == ngram
    assert shingles("two words", 2) == [" two", "two words", "words "]


@pytest.mark.parametrize(("threshold", "ngram"), [(0.5, 3), (0.4, 2), (0.7, 1)])
def test_pairs_are_those_of_the_definition(threshold: float, ngram: int) -> None:
    normals = word_soup(600, seed=1)
    wanted = brute_force(normals, threshold, ngram)
    assert len(wanted) > 50
    hits = 0
    for seed in range(5):
        columns = near_pairs(normals, threshold=threshold, ngram=ngram, permutations=128, seed=seed)
        found = {(int(i), int(j)): s for i, j, s in zip(*columns, strict=True)}
        assert found.keys() <= wanted.keys(), "no pair is returned unverified"
        assert all(abs(found[pair] - wanted[pair]) < 1e-12 for pair in found)
        hits += len(found)
    assert hits >= 0.99 * 5 * len(wanted)


def test_bands_find_what_lies_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        for permutations in (16, 128, 256):
            rows = rows_per_band(threshold, permutations)
            assert 1 - (1 - threshold**rows) ** (permutations // rows) >= 0.99
    assert rows_per_band(0.9, 128) > rows_per_band(0.5, 128), "similar pairs need fewer candidates"


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "two"]])
def test_few_texts(texts: list[str]) -> None:
    assert [len(column) for column in near_pairs(texts, **DEFAULTS, seed=0)] == [0, 0, 0]


SOUP = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=9).map(" ".join),
        st.sampled_from([None, None, "g1", "g2"]),
        st.sampled_from(["harmful", "benign"]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(SOUP, st.randoms(use_true_random=False), st.integers(0, 2**63 - 1))
def test_row_order_changes_nothing(rows: list[tuple[str, str, str | None, str]], rng: random.Random, seed: int) -> None:
    prompts = [prompt(name, i, text, label, group) for i, (name, text, group, label) in enumerate(rows)]
    mixed = rng.sample(prompts, len(prompts))
    one, other = (clusters_of(p, ood={"a": False, "b": True}, seed=seed) for p in (prompts, mixed))
    assert one.links == other.links
    assert one.report == other.report
    named = [
        {p["id"]: c for p, c in zip(ps, found.clusters, strict=True)} for ps, found in ((prompts, one), (mixed, other))
    ]
    assert named[0] == named[1]
    for p, cluster in zip(prompts, one.clusters, strict=True):
        assert cluster <= p["group"], "the smallest group names the cluster"
        same_group = {c for q, c in zip(prompts, one.clusters, strict=True) if q["group"] == p["group"]}
        assert same_group == {cluster}, "a group is never split"


def test_planted_duplicates_are_found_across_sets() -> None:
    words = LONG.split()
    twins = {
        "case": LONG.upper(),
        "punctuation": LONG.replace(" ", ", ") + "!",
        "one word changed": " ".join([*words[:8], "rowing", *words[9:]]),
        "one word more": " ".join([*words[:4], "very", *words[4:]]),
        "one word less": " ".join(words[:6] + words[7:]),
    }
    others = [
        f"{verb} a {thing} for {who}" for verb in ("Draw", "Sing") for thing in ("fox", "hill") for who in ("me", "us")
    ]
    prompts = [prompt("a", 0, LONG), *(prompt("a", i + 1, text) for i, text in enumerate(others))]
    prompts += [prompt("b", i, text, "harmful") for i, text in enumerate(twins.values())]
    found = clusters_of(prompts)
    assert len({c for p, c in zip(prompts, found.clusters, strict=True) if p["set"] == "b" or p["row"] == 0}) == 1
    assert len(set(found.clusters)) == 1 + len(others), "nothing else is joined"
    assert [link["similarity"] for link in found.links] == sorted((x["similarity"] for x in found.links), reverse=True)
    assert sum(link["similarity"] == 1.0 for link in found.links) == 1, "case alone is one group already"
    a, b = (found.report["across"][x][y] for x, y in (("a", "b"), ("b", "a")))
    assert (a["exact"], a["near"], a["cluster"]) == (1, 1, 1)
    assert (b["exact"], b["near"], b["cluster"], b["near_share"]) == (2, 5, 5, 1.0)
    assert found.conflicts.sum() == 6, "a harmful prompt and its benign near-duplicate both say so"
    assert found.report["sets"]["b"]["label_conflicts"] == 5
    assert found.report["sets"]["b"] | {"near_duplicates": 0, "groups": 0} == {
        "prompts": 5, "groups": 0, "clusters": 1, "exact_repeats": 1, "near_duplicates": 0, "label_conflicts": 5,
        "ood": None, "ood_contaminated": None,
    }  # fmt: skip


def test_a_shared_template_makes_no_duplicates() -> None:
    template = " ".join(f"word{i}" for i in range(60))
    asks = [f"{template} and now the {i} question is about thing{i} of kind{i}" for i in range(80)]
    wrapped = [prompt("a", i, text) for i, text in enumerate(asks)]
    assert len(set(clusters_of(wrapped).clusters)) == 80
    assert len(set(clusters_of(wrapped[:3]).clusters)) == 1, "three such prompts are near-duplicates and no template"


def test_given_groups_are_believed() -> None:
    other = LONG.replace("lake", "bay")
    given = clusters_of([prompt("a", 0, LONG, group="one"), prompt("b", 0, other, group="two")])
    assert given.clusters == ["one", "two"]
    assert [(link["joined"], link["kind"]) for link in given.links] == [(False, "across")]
    assert given.report["across"]["a"]["b"]["near"] == 1, "reported all the same"
    assert given.report["kept_apart"] == 1
    half = clusters_of([prompt("a", 0, LONG, group="one"), prompt("b", 0, other)])
    assert len(set(half.clusters)) == 1
    exact = clusters_of([prompt("a", 0, LONG, group="one"), prompt("b", 0, LONG.upper(), group="two")])
    assert exact.clusters == ["one", "one"], "the same words are the same request, whatever the groups"


def test_the_planted_language_keeps_its_groups() -> None:
    """Prompts that differ in one word ask for different things there, and their sets say so by their groups."""
    names = {"harmful": "harmful", "benign_lookalike": "benign", "wrapped_weak": "harmful", "benign_wrapped": "benign"}
    prompts = [
        prompt(name, i, row["prompt"], label, row["group"])
        for name, label in names.items()
        for i, row in enumerate(prompt_rows(name, 96, 0))
    ]
    found = clusters_of(prompts)
    assert found.clusters == [p["group"] for p in prompts]
    assert found.report["kept_apart"] > 0, "there are pairs to keep apart"


def test_public_sets() -> None:
    """Every JailbreakBench behaviour said to be taken from AdvBench and worded like it, and no other."""
    if not DATA.is_dir():
        pytest.skip("no folder with the public evaluation sets (CLIFFLAB_DATA, or shared/data beside the repository)")
    with (DATA / "advbench" / "advbench.csv").open() as file:
        prompts = [prompt("advbench", i, row["goal"]) for i, row in enumerate(csv.DictReader(file))]
    with (DATA / "jailbreakbench" / "harmful.csv").open() as file:
        behaviours = list(csv.DictReader(file))
    prompts += [prompt("jbb", i, row["Goal"]) for i, row in enumerate(behaviours)]
    with (DATA / "xstest" / "xstest_prompts.csv").open() as file:
        prompts += [prompt("xstest", i, row["prompt"]) for i, row in enumerate(csv.DictReader(file))]
    found = clusters_of(prompts)
    advbench = {c for p, c in zip(prompts, found.clusters, strict=True) if p["set"] == "advbench"}
    hits = [p["row"] for p, c in zip(prompts, found.clusters, strict=True) if p["set"] == "jbb" and c in advbench]
    assert {behaviours[row]["Source"] for row in hits} == {"AdvBench"}
    assert 15 <= len(hits) <= sum(row["Source"] == "AdvBench" for row in behaviours)
    sets = found.report["sets"]
    assert sets["xstest"]["clusters"] >= 440, "contrast pairs are not joined for their template"
    assert sets["advbench"]["clusters"] >= 480, "no chain joins everything"


@pytest.mark.parametrize(
    ("key", "value"),
    [("threshold", 0), ("threshold", 1.5), ("ngram", 0), ("permutations", 4), ("treshold", 0.5), ("enabled", "maybe")],
)
def test_bad_settings_are_one_line(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^duplicates\.{key}: {value}: .+; .+$"):
        parse(small_study(duplicates={key: value}))


def test_not_everything_is_out_of_distribution() -> None:
    data = small_study()
    with pytest.raises(ConfigError, match="every set is marked ood"):
        parse(small_study(prompts=[{**p, "ood": True} for p in data["prompts"]]))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Planted prompts without groups; ``twin`` and ``new`` are marked ood, and half of ``twin`` is not."""
    folder = tmp_path_factory.mktemp("sets")
    rows = {name: prompt_rows(name, 48, 0) for name in ("benign", "harmful")}
    twins = [f"{row['prompt'].upper()}!" for row in rows["harmful"][:12]]
    twins += [row["prompt"] for row in prompt_rows("heldout_objects", 12, 0)]
    texts = {
        "benign": [row["prompt"] for row in rows["benign"]],
        "harmful": [row["prompt"] for row in rows["harmful"]],
        "twin": [text.lower() for text in twins],
        "new": [row["prompt"] for row in prompt_rows("heldout_objects", 36, 0)[24:]],
    }
    for name, said in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in said))
    sets = [
        {
            "name": name,
            "path": str(folder / f"{name}.jsonl"),
            "label": "benign" if name == "benign" else "harmful",
            "ood": name in ("twin", "new"),
        }
        for name in texts
    ]
    return small_study(prompts=sets, probe={"min_examples": 8})


@pytest.fixture(scope="module")
def root(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clifflab.run(parse(study), tmp_path_factory.mktemp("ood"), runtime="inline").root


def test_tables_and_report(root: Path) -> None:
    clusters, links = (pq.read_table(root / f"{name}.parquet") for name in ("clusters", "duplicates"))
    assert clusters.schema.equals(tables.CLUSTERS)
    assert links.schema.equals(tables.DUPLICATES)
    assert clusters["id"].to_pylist() == pq.read_table(root / "prompts.parquet")["id"].to_pylist()
    report = json.loads((root / "duplicates.json").read_text())
    assert report == json.loads((root / "metrics.json").read_text())["duplicates"]
    assert {k: report[k] for k in ("enabled", *DEFAULTS)} == {"enabled": True, **DEFAULTS}
    assert report["sets"]["twin"]["ood_contaminated"] == 12
    assert report["sets"]["new"]["ood_contaminated"] == 0
    assert report["sets"]["harmful"]["ood_contaminated"] is None
    assert report["across"]["twin"]["harmful"]["exact"] == 12


def test_splits_keep_clusters_together(root: Path) -> None:
    cliffs = pq.read_table(root / "planted" / "cliffs.parquet", columns=["cluster", "group", "set", "id", "split"])
    split: dict[str, str] = {}
    for row in cliffs.to_pylist():
        assert split.setdefault(row["cluster"], row["split"]) == row["split"]
    clusters = pq.read_table(root / "clusters.parquet").to_pylist()
    own = {row["id"]: row["cluster"] for row in clusters}
    assert all(row["cluster"] == own[row["id"]] for row in cliffs.to_pylist())
    assert set(split.values()) == {"train", "validation", "test", "ood"}


def test_out_of_distribution_sets_are_held_out(root: Path) -> None:
    clusters = pq.read_table(root / "clusters.parquet").to_pylist()
    inside = {row["cluster"] for row in clusters if row["set"] in ("benign", "harmful")}
    rows = pq.read_table(root / "planted" / "cliffs.parquet", columns=["set", "cluster", "split"]).to_pylist()
    for row in rows:
        assert (row["split"] == "ood") == (row["cluster"] not in inside)
        assert row["set"] != "new" or row["split"] == "ood"
    assert {row["split"] for row in rows if row["set"] == "twin"} > {"ood"}, "a repeat keeps its twin's split"
    about = json.loads((root / "planted" / "probes.json").read_text())
    assert set(about["examples"]) == {"train", "validation", "test"}


def test_what_a_setting_touches(root: Path, study: dict[str, Any]) -> None:
    """Another threshold, or another set held out, moves splits and never generates anew."""

    def steps(**changes: Any) -> list[str]:
        return [name for name, _ in plan(identify(prepare(parse({**study, **changes})), root))]

    after = ["duplicates", "capture", "probe", "controls", "cliff", "truncation", *SEARCH, "report"]
    assert steps() == []
    assert steps(duplicates={"threshold": 0.6}) == after
    assert steps(duplicates={"enabled": False}) == after
    assert steps(prompts=[{**p, "ood": p["name"] == "new"} for p in study["prompts"]]) == after


def test_switched_off(tmp_path: Path, study: dict[str, Any]) -> None:
    """Groups alone: equal text is still one request, near text is not."""
    from clifflab.stages import STEPS, Unit

    data = parse({**study, "duplicates": {"enabled": False}})
    context = identify(prepare(data), tmp_path)
    for name in ("prompts", "duplicates"):
        for unit in STEPS[name].plan(context, None):
            assert isinstance(unit, Unit)
            STEPS[name].compute(context, unit)
        STEPS[name].merge(context, None)
    report = json.loads((tmp_path / "duplicates.json").read_text())
    assert (report["enabled"], report["near_pairs"]) == (False, 0)
    assert report["sets"]["twin"]["ood_contaminated"] == 12
    similarity = pq.read_table(tmp_path / "duplicates.parquet")["similarity"]
    assert np.all(np.asarray(similarity) == 1.0)
