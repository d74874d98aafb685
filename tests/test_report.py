"""The report: nothing in it runs or asks for anything, its figures are files, and it says what it must."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clifflab
from clifflab.report import numbers
from clifflab.runtime.study import identify, plan, prepare
from tests.browser import Canary, Elements, canary, needs_chromium, opened
from tests.conftest import tiny_config
from tests.studies import NO_HEADS, parse

RUN = "document.documentElement.setAttribute('data-h'+'it','1')"
MARK = 'data-hit="1"'
LONG = "a-set-with-the-longest-name-that-is-allowed-" + "x" * 36
BENIGN_END, HARMFUL_END = "the kettle whistles", "never to be shown"


def payloads(url: str) -> list[str]:
    """Text that runs or calls home where it is taken for markup."""
    return [
        f"<script>{RUN}</script>",
        f'<script src="{url}/script"></script>',
        f'<img src="{url}/img" onerror="{RUN}">',
        f'"><svg onload="{RUN}"><image href="{url}/svg"></svg>',
        f"'><iframe src='{url}/frame'></iframe>",
        f"</style></title></pre><img src=x onerror={RUN}><link rel=stylesheet href={url}/css>",
        f'<style>body {{ background: url({url}/bg) }}</style><a href="javascript:{RUN}">x</a>',
        f"<!-- --><details open ontoggle={RUN}>{{{{7*7}}}}{{% raw %}}${{7*7}}\\u202e\u202e\x07",
    ]


@pytest.fixture(scope="module")
def bird() -> Iterator[Canary]:
    with canary() as it:
        yield it


def byte_checkpoint(folder: Path) -> Path:
    """A tiny random model that reads and writes bytes, so that any text survives in its traces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from clifflab.organism.tokenizer import CHAT_TEMPLATE

    special = ["<pad>", "<bos>", "<eos>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    config = tiny_config("llama", len(names))
    config.pad_token_id, config.max_position_embeddings = 0, 4096
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hostile_study(tmp_path_factory: pytest.TempPathFactory, bird: Canary) -> dict[str, Any]:
    """Two models and three sets of finished traces whose every text is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    texts = payloads(bird.url)
    sets = []
    for name, label, count in (("harmful", "harmful", 24), (LONG, "benign", 24), ("wrapped", "harmful", 8)):
        path = root / f"{name} <img src=x onerror={RUN.replace('/', '')}>.jsonl"
        rows = []
        for i in range(count):
            text = texts[i % len(texts)]
            refuses = name == "harmful" or i % 2
            response = f"I cannot help with that. {text} {HARMFUL_END}" if refuses else f"Sure: {text} {HARMFUL_END}"
            rows.append(
                {
                    "id": f"{text} {i}",
                    "prompt": f"{text} é漢🙂 request {i}?",
                    "thinking": f"{text} thinking {name[0] * (40 + 20 * (i % 5))}",
                    "response": f"{BENIGN_END} {text}" if label == "benign" else response,
                }
            )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets.append({"name": name, "path": str(path), "label": label, "existing": True})
    checkpoint = str(byte_checkpoint(root / "model"))
    return {
        "name": "hostile",
        "models": [{"name": n, "path": checkpoint, "system": text} for n, text in zip("ab", texts[:2], strict=True)],
        "prompts": sets,
        "probe": {"min_examples": 6},
        "cliff": {"bootstrap": 100},
        **NO_HEADS,
    }


@pytest.fixture(scope="module")
def hostile(hostile_study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's folder after a real run."""
    result = clifflab.run(parse(hostile_study), tmp_path_factory.mktemp("runs"), runtime="inline")
    assert not result.warnings
    return result.root


@needs_chromium
def test_hostile_text_neither_runs_nor_calls_home(hostile: Path, bird: Canary, tmp_path: Path) -> None:
    bird.hits.clear()
    found = opened(hostile / "report.html", tmp_path)
    assert "In short" in found
    assert "&lt;script&gt;" in found, "the payloads are in the page, as text"
    assert MARK not in found
    assert bird.hits == []


@needs_chromium
def test_the_browser_would_have_told(bird: Canary, tmp_path: Path) -> None:
    """The same texts taken for markup run and call home: the test above can fail."""
    for number, text in enumerate(payloads(bird.url)):
        bird.hits.clear()
        page = tmp_path / f"{number}.html"
        page.write_text(f"<!doctype html><html><head><title>x</title></head><body>{text}</body></html>")
        assert MARK in opened(page, tmp_path / f"p{number}") or bird.hits, text


@needs_chromium
def test_the_policy_holds_where_escaping_failed(hostile: Path, bird: Canary, tmp_path: Path) -> None:
    bird.hits.clear()
    page = tmp_path / "raw.html"
    text = (hostile / "report.html").read_text()
    page.write_text(text.replace("<body>", "<body>" + "".join(payloads(bird.url))))
    assert MARK not in opened(page, tmp_path)
    assert bird.hits == []


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_does_not_scroll_sideways(hostile: Path, tmp_path: Path, width: int) -> None:
    frame = html.escape((hostile / "report.html").read_text())
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><body><iframe style="width:{width}px;height:800px;border:0" srcdoc="{frame}"></iframe><script>'
        "onload = () => { const d = document.querySelector('iframe').contentDocument.documentElement;"
        "document.body.textContent = `width ${d.scrollWidth} of ${d.clientWidth}, ${d.scrollHeight} high`; }</script>"
    )
    found = re.search(r"width (\d+) of (\d+), (\d+) high", opened(wrapper, tmp_path))
    assert found
    assert int(found[1]) == int(found[2]) == width
    assert int(found[3]) > 5000, "the page is laid out"


def test_the_page_stands_alone(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "iframe", "img", "link", "object", "embed", "base", "form"}
    for tag, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster", "background"):
                assert value is not None
                assert value.startswith(("#", "data:image/png")), (tag, name, value[:80])
            if name == "style":
                assert not re.search(r"url\((?!#)", value or "")
    style_text = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style_text
    assert "@import" not in style_text
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert not [name for name, count in ids.items() if count > 1]
    for _, attributes in elements:
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids
    assert "\u202e" not in page
    assert "\x07" not in page


def test_figures_are_files_too(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    index = json.loads((hostile / "figures" / "index.json").read_text())
    assert len(index) == page.count("<svg ") >= 20
    listed = json.loads((hostile / "manifest.json").read_text())["files"]
    for entry in index:
        pdf, png = ((hostile / entry[kind]).read_bytes() for kind in ("pdf", "png"))
        assert pdf.startswith(b"%PDF")
        assert b"CreationDate" not in pdf
        assert png.startswith(b"\x89PNG")
        assert {entry["pdf"], entry["png"]} <= listed.keys()
        assert entry["see"]
    names = {Path(entry["pdf"]).stem.split("-")[0] for entry in index if entry["pdf"].startswith("figures/a/")}
    assert names == {"outcomes", "curves", "cross", "cliffs", "drops", "truncation", "map", "auroc", "reliability"}
    on_disk = {p.relative_to(hostile).as_posix() for p in (hostile / "figures").rglob("*.p*")}
    assert on_disk == {entry[kind] for entry in index for kind in ("pdf", "png")}


def test_a_lost_figure_is_drawn_again(hostile: Path, hostile_study: dict[str, Any], tmp_path: Path) -> None:
    root = shutil.copytree(hostile, tmp_path / "hostile")
    assert plan(identify(prepare(parse(hostile_study)), root)) == []
    lost = next((root / "figures").rglob("*.png"))
    whole = {p: p.read_bytes() for p in (root / "figures").rglob("*.*")}
    page = (root / "report.html").read_bytes()
    lost.unlink()
    assert plan(identify(prepare(parse(hostile_study)), root)) == [("report", None)]
    clifflab.run(parse(hostile_study), tmp_path, runtime="inline")
    assert {p: p.read_bytes() for p in whole} == whole, "the same bytes again"
    assert (root / "report.html").read_bytes() == page


def test_a_study_without_probe(hostile: Path, hostile_study: dict[str, Any], tmp_path: Path) -> None:
    """What needs no score is drawn, nothing else; figures of the run before, which had a probe, are gone."""
    root = shutil.copytree(hostile, tmp_path / "hostile")
    result = clifflab.run(parse({**hostile_study, "probe": {"min_examples": 500}}), tmp_path, runtime="inline")
    assert len(result.warnings) == 2
    names = {p.name for p in (root / "figures" / "a").iterdir()}
    drawn = [f"{what}-{label}" for what in ("outcomes", "truncation") for label in ("harmful", "benign")]
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")}
    page = (root / "report.html").read_text()
    assert re.search(r"No probe could be trained: \d+ refusals in 32 harmful prompts, 500 needed", page)
    assert page.count("<svg ") == 8


def test_what_the_page_says(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    for part in (
        "In short",
        "Not checked here",
        "How to read this page",
        "side by side",
        "Provenance",
        "<dt>excess cliff",
    ):
        assert part in page, part
    assert "cause: a probe reads" in page
    metrics = json.loads((hostile / "metrics.json").read_text())["models"]
    for model in metrics.values():
        for entry in model["sets"].values():
            assert numbers.interval(entry["probes"]["all"]["final"]) in page
    for text in ("code version", hostile.as_posix(), "started_at"):
        assert text not in page
    identity = json.loads((hostile / "manifest.json").read_text())
    for digest in (identity["models"]["a"]["sha256"], *identity["sources"].values()):
        assert digest in page


def test_no_harmful_answer_is_shown(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    assert BENIGN_END in page
    assert HARMFUL_END not in page
    assert "more tokens are not shown" in page
