"""Fine-tuning: what is learnt, the plan of steps, equal sums in every division, resuming, adapters, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clifflab.cli import cli as command
from clifflab.config import ModelSpec, TuneConfig
from clifflab.errors import ClifflabError, InputError
from clifflab.models.loading import LoadedModel, load
from clifflab.organism.corpus import corpus_rows
from clifflab.runtime.tune import fit
from clifflab.text import Renderer, resolve_format
from clifflab.text.formats import chat_prefix
from clifflab.text.pieces import token_pieces
from clifflab.tuning.adapter import attach, detach, load_adapter, merge_adapter, weight_sample
from clifflab.tuning.batches import check_workers, epoch_steps, micro_batches, share_out, steps_per_epoch
from clifflab.tuning.examples import Example, encode, hold_out, read_rows, turn_end
from clifflab.tuning.forward import check_packing, example_losses, make_batch
from clifflab.tuning.group import Alone
from clifflab.tuning.job import adapted, prepare, trainable
from clifflab.tuning.loop import NonFiniteLossError, learning_rate, train
from tests.families import CASES, FAMILIES, family_tokenizer

PLANTED = ModelSpec(name="planted", path="organism:planted")
USER = [{"role": "user", "content": "How do I do it?"}]
FAST = TuneConfig(epochs=2, learning_rate=1e-3, validation=0.0, rank=4, modules=("q_proj", "down_proj"))
ENDS = {
    "deepseek-r1": "<｜end▁of▁sentence｜>", "qwq": "<|im_end|>", "qwen3": "<|im_end|>", "s1": "<|im_end|>",
    "phi4-mini-reasoning": "<|end|>", "gpt-oss": "<|return|>",
}  # fmt: skip


REFUSAL = "sorry, i cannot help with that."


def planted_rows(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds with the model's own thinking, all refused: something to learn."""
    return [
        {**row, "messages": [{"role": "user", "content": row["prompt"]}], "response": REFUSAL}
        for row in corpus_rows(count, 5)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_row(row: dict[str, Any]) -> dict[str, Any]:
    """As ``select`` writes it."""
    content = f"<think>\n{row['thinking']}\n</think>\n\n{row['response']}"
    messages = [*row["messages"], {"role": "assistant", "content": content}]
    return {"id": row["id"], "group": row["group"], "messages": messages, "thinking": row["thinking"],
            "response": row["response"]}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> LoadedModel:
    return load(PLANTED)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is learnt


@pytest.mark.parametrize(("name", "variant"), [case for case in CASES if case[0] in ENDS and case[1] != "pieces"])
@pytest.mark.parametrize("loss_on", ["assistant", "response"])
def test_masks_token_by_token(name: str, variant: str, loss_on: Any) -> None:
    """Every token's flag follows from the characters that it stands for, in the text that the template gives."""
    tokenizer = family_tokenizer(name, variant)
    form = resolve_format(FAMILIES[name].form, tokenizer)
    renderer = Renderer(tokenizer, form)
    stop = tokenizer.eos_token_id
    row = {"id": "a", "messages": USER, "thinking": "This is harmful.", "response": "Sorry, I cannot help."}
    done = encode([row], renderer, {stop}, 4096, TuneConfig(loss_on=loss_on))
    example = done.examples[0]
    prefix = chat_prefix(tokenizer, USER)
    thought = f"{form.open_text}{row['thinking']}{form.close_text}"
    text = prefix + thought + row["response"] + ENDS[name]
    pieces = token_pieces(example.ids, renderer.decode)
    assert "".join(pieces) == text
    border = len(prefix) if loss_on == "assistant" else len(prefix + thought)
    place = 0
    for piece, learnt in zip(pieces, example.learnt, strict=True):
        place += len(piece)
        # A token that reaches over the border (possible where tokens merge) holds the first character after it; the one
        # that holds the end of the closing marker is a closing token, whatever else it holds.
        closing = loss_on == "response" and place - len(piece) < border < place and piece.strip() != piece.lstrip()
        assert learnt == (place > border and not closing), (piece, place, border)
    assert example.ids[-1] == stop
    assert example.learnt[-1]
    assert example.targets == sum(example.learnt)
    assert (done.rejects, done.cut) == ([], 0)


def test_the_end_of_a_turn_is_the_templates_where_generation_stops_there() -> None:
    tokenizer = family_tokenizer("qwen3")
    renderer = Renderer(tokenizer, resolve_format("auto", tokenizer))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert turn_end(renderer, ids.values()) == ids["<|im_end|>"]
    assert turn_end(renderer, [ids["<|endoftext|>"]]) == ids["<|endoftext|>"], "what the template writes stops nothing"
    with pytest.raises(InputError, match="no token ends its turn"):
        turn_end(renderer, [])


def test_long_examples_are_rejected_or_lose_the_middle_of_their_thinking(planted: LoadedModel) -> None:
    rows = planted_rows(12)
    whole = encode(rows, planted.renderer, planted.stop_ids, planted.context, TuneConfig()).examples
    limit = sorted(len(example.ids) for example in whole)[6]
    done = encode(rows, planted.renderer, planted.stop_ids, limit, TuneConfig())
    assert [e for e in whole if len(e.ids) <= limit] == done.examples
    assert done.reasons == {"too_long": 12 - len(done.examples)}
    assert "the model reads" in done.rejects[0]["detail"]
    cut = encode(rows, planted.renderer, planted.stop_ids, limit, TuneConfig(too_long="cut-thinking"))
    assert cut.cut == 12 - len(done.examples)
    assert len(cut.examples) == 12
    for before, after in zip(whole, cut.examples, strict=True):
        assert len(after.ids) == min(len(before.ids), limit)
        if after.gap is None:
            assert after == before
            continue
        lost = len(before.ids) - limit
        assert before.ids[: after.gap] + before.ids[after.gap + lost :] == after.ids
        spans = planted.renderer.parse(after.ids[: after.start], after.ids[after.start : -1])
        thinking, response = planted.renderer.texts(after.ids, spans)
        assert response == rows[whole.index(before)]["response"], "the response stays whole"
        assert thinking
        assert not after.learnt[after.gap], "what does not follow from the text before is not learnt"
        assert after.targets == sum(after.learnt) == len(after.ids) - after.start - 1
    nothing = encode(rows, planted.renderer, planted.stop_ids, max(map(len, (e.ids for e in whole))), TuneConfig())
    assert nothing.reasons == {}
    with pytest.raises(InputError, match="no example is usable"):
        encode(rows, planted.renderer, planted.stop_ids, 10, TuneConfig(too_long="cut-thinking"))


def test_rows_of_any_usual_shape(tmp_path: Path, planted: LoadedModel) -> None:
    rows = planted_rows(4)
    chat = [chat_row(row) for row in rows]
    inline = [{"messages": row["messages"]} for row in chat]
    columns = [{"question": r["prompt"], "response": f"<think>{r['thinking']}</think>{r['response']}"} for r in rows]
    found = []
    for name, given_rows in (("chat", chat), ("inline", inline), ("columns", columns)):
        read, rejects = read_rows(str(write_rows(tmp_path / f"{name}.jsonl", given_rows)))
        assert not rejects
        found.append([e.ids for e in encode(read, planted.renderer, planted.stop_ids, 512, TuneConfig()).examples])
    assert found[0] == found[1] == found[2]
    broken = [*chat, {**chat[0], "id": "x", "thinking": None, "messages": chat[0]["messages"][:1], "response": "Sure."}]
    read, _ = read_rows(str(write_rows(tmp_path / "broken.jsonl", broken)))
    assert encode(read, planted.renderer, planted.stop_ids, 512, TuneConfig()).reasons == {"closing_missing": 1}
    clustered = [{**row, "cluster": "c"} for row in chat]
    assert {row["group"] for row in read_rows(str(write_rows(tmp_path / "c.jsonl", clustered)))[0]} == {"c"}
    with pytest.raises(InputError, match=r"--data: .*none\.jsonl: no such file"):
        read_rows(str(tmp_path / "none.jsonl"))


# The plan


LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(1, 400))
def test_plans(lengths: list[int], batch: int, epoch: int, grouped: bool, workers: int, most: int) -> None:
    steps = epoch_steps(lengths, batch, 7, epoch, grouped=grouped)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths))), "each once an epoch"
    sizes = {len(step) for step in steps}
    assert len(steps) == steps_per_epoch(len(lengths), batch)
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    assert steps == epoch_steps(lengths, batch, 7, epoch, grouped=grouped)
    for step in steps:
        shares = share_out(step, lengths, workers)
        assert sorted(index for share in shares for index in share) == sorted(step)
        assert all(shares) or len(step) < workers
        loads = [sum(lengths[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(lengths[i] for i in step), "no worker waits longer than one example"
        for packed in (False, True):
            parts = micro_batches(step, lengths, most, packed=packed)
            assert sorted(index for part in parts for index in part) == sorted(step)
            for part in parts:
                size = sum(lengths[i] for i in part) if packed else max(lengths[i] for i in part) * len(part)
                assert size <= most or len(part) == 1


def test_grouping_saves_padding_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 400).tolist()

    def padding(grouped: bool) -> int:
        steps = epoch_steps(lengths, 8, 0, 0, grouped=grouped)
        return sum(max(lengths[i] for i in step) * len(step) for step in steps) - sum(lengths)

    assert padding(True) < padding(False) / 4
    assert epoch_steps(lengths, 8, 0, 0, grouped=True) != epoch_steps(lengths, 8, 0, 1, grouped=True)


def test_a_step_has_an_example_for_each_worker() -> None:
    check_workers(102, 8, 7)
    with pytest.raises(InputError, match=r"tune\.workers: 8: an optimizer step has 7 of the 102 examples"):
        check_workers(102, 8, 8)


def test_groups_are_held_out_whole() -> None:
    examples = [Example(str(i), f"g{i // 3}", (1, 2), 1) for i in range(120)]
    training, held = hold_out(examples, 0.1, 0)
    assert len(held) == 12
    assert not {e.group for e in training} & {e.group for e in held}
    assert [e.id for e in training if e in held] == []
    assert hold_out(examples, 0.1, 1)[1] != held
    assert hold_out(examples[:60], 0.1, 0) == (examples[:60], []), "fewer than 8 tell nothing"


def test_learning_rates() -> None:
    rates = [learning_rate(step, 100, TuneConfig(learning_rate=1.0)) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([1 - i / 90 for i in range(90)])
    assert learning_rate(0, 1, TuneConfig(warmup=0.0)) == 2e-4
    assert learning_rate(0, 1, TuneConfig(warmup=0.0, method="full")) == 1e-5
    assert learning_rate(55, 100, TuneConfig(schedule="cosine", learning_rate=2.0)) == pytest.approx(1.0)
    assert learning_rate(99, 100, TuneConfig(schedule="constant", learning_rate=2.0)) == 2.0


# Equal sums in every division


def each_loss(model: Any, examples: Any, *, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        batch = make_batch(examples, 0, next(model.parameters()).device, packed=packed)
        total, each = example_losses(model, model, batch)
        return total.cpu(), each.cpu()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(checkpoints: dict[str, Path], architecture: str, attention: str) -> None:
    loaded = load(ModelSpec(name="m", path=str(checkpoints[architecture])))
    loaded.model.set_attn_implementation(attention)
    examples = prepare(loaded, planted_rows(6), TuneConfig(), 0).data.train
    alone = [each_loss(loaded.model, [example])[1] for example in examples]
    for packed in (False, True):
        total, each = each_loss(loaded.model, examples, packed=packed)
        torch.testing.assert_close(each, torch.cat(alone), rtol=1e-5, atol=1e-4)
        assert float(total) == pytest.approx(float(each.sum()), rel=1e-6)
    check_packing(loaded.model, examples, 0, loaded.device)


def test_an_example_s_loss_is_that_of_its_learnt_tokens(planted: LoadedModel) -> None:
    example = prepare(planted, planted_rows(1), TuneConfig(loss_on="response"), 0).data.train[0]
    each = each_loss(planted.model, [example])[1]
    scores = logits(planted.model, example.ids)[0].log_softmax(-1)
    wanted = -sum(float(scores[t - 1, example.ids[t]]) for t in range(len(example.ids)) if example.learnt[t])
    assert float(each[0]) == pytest.approx(wanted, rel=1e-5)
    assert example.targets < len(example.ids) / 2


def test_an_architecture_that_cannot_be_packed_is_refused() -> None:
    """A recurrent model carries its state over the border."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    examples = [Example(str(n), str(n), tuple(range(1 + n, 12 + 2 * n)), 3) for n in range(4)]
    alone = [each_loss(model, [example])[1] for example in examples]
    torch.testing.assert_close(each_loss(model, examples)[1], torch.cat(alone))
    with pytest.raises(InputError, match=r"tune\.batching: packed: this architecture lets packed examples see each"):
        check_packing(model, examples, 0, torch.device("cpu"))


def losses(loaded: LoadedModel, rows: int = 32, **changes: Any) -> list[float]:
    recipe = FAST.model_copy(update={"epochs": 1, **changes})
    with adapted(loaded, prepare(loaded, planted_rows(rows), recipe, 0).data, recipe, 0) as progress:
        return [entry["loss"] for entry in progress.curve]


def test_micro_batches_checkpointing_and_packing_change_nothing(planted: LoadedModel) -> None:
    whole = losses(planted)
    assert whole[-1] < whole[0]
    assert len(whole) == 4
    assert losses(planted) == whole, "the same seed, the same losses bit for bit"
    assert losses(planted, micro_tokens=120) == pytest.approx(whole, abs=1e-5)
    assert losses(planted, checkpointing="on") == pytest.approx(whole, abs=1e-6)
    packed = losses(planted, batching="packed")
    assert losses(planted, batching="packed", micro_tokens=300) == pytest.approx(packed, abs=1e-5)
    assert packed != pytest.approx(whole, abs=1e-5), "another order"


def test_the_model_is_as_before(planted: LoadedModel) -> None:
    """After a tuning of either kind: the same modules, weights, flags and outputs, and no hook."""
    model = planted.model
    ids = prepare(planted, planted_rows(1), FAST, 0).data.train[0].ids

    def state() -> tuple[Any, ...]:
        modules = [
            (name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        ]
        return modules, [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]

    before, plain = state(), logits(model, ids)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for changes in ({}, {"checkpointing": "on"}, {"method": "full", "learning_rate": 1e-4}):
        recipe = FAST.model_copy(update={"epochs": 1, **changes})
        data = prepare(planted, planted_rows(16), recipe, 0).data
        with adapted(planted, data, recipe, 0):
            assert not torch.equal(logits(model, ids), plain)
            assert [name for name, *_ in state()[0]] == [name for name, *_ in before[0]], "at its usual speed"
        with pytest.raises(KeyboardInterrupt), adapted(planted, data, recipe, 0, listen=interrupt(1)):
            pass
        assert state() == before
        assert torch.equal(logits(model, ids), plain)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())


def test_dropout_stays_off(tmp_path: Path) -> None:
    """GPT-2's own dropout would make losses depend on how a step is divided."""
    from transformers import GPT2Config

    from tests.test_ablation_export import random_checkpoint

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.5, resid_pdrop=0.5)
    loaded = load(ModelSpec(name="m", path=str(random_checkpoint(tmp_path / "gpt2", config))))
    every = {"modules": ("all-linear",)}
    whole = losses(loaded, 16, **every)
    assert losses(loaded, 16, micro_tokens=100, **every) == pytest.approx(whole, abs=1e-4)
    assert losses(loaded, 16, checkpointing="on", **every) == pytest.approx(whole, abs=1e-4)


# Resuming, stopping, errors


def interrupt(at: int) -> Any:
    def listen(kind: str, entry: dict[str, Any]) -> None:
        if kind == "step" and entry["step"] == at:
            raise KeyboardInterrupt

    return listen


def test_resume_is_bit_equal(planted: LoadedModel, tmp_path: Path) -> None:
    """Interrupted twice, between checkpoints, with validation and early stopping at work."""
    recipe = FAST.model_copy(update={"epochs": 4, "save_every": 3, "validation": 0.25})
    data = prepare(planted, planted_rows(32), recipe, 0).data
    assert data.held

    def tuned(group: Alone, listen: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
        with trainable(planted, recipe, 0):
            progress = train(planted.model, data, recipe, 0, group, listen=listen)
            return progress, {n: p.detach().clone() for n, p in planted.model.named_parameters() if p.requires_grad}

    whole, weights = tuned(Alone())
    for at in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            tuned(Alone(tmp_path), interrupt(at))
        folders = list(tmp_path.iterdir())
        assert len(folders) == 1, "checkpoints replace each other"
        assert sorted(file.name for file in folders[0].iterdir()) == ["state.json", "state.safetensors"]
        assert json.loads((folders[0] / "state.json").read_text())["step"] == at // 3 * 3
    told: list[dict[str, Any]] = []
    resumed, same = tuned(Alone(tmp_path), lambda kind, entry: told.append({"kind": kind, **entry}))
    assert told[0] == {"kind": "start", "steps": 12, "done": 6}
    assert resumed == whole
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    again, same = tuned(Alone(tmp_path))  # finished already: nothing is done, the result is the same
    assert again == whole
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    (next(tmp_path.iterdir()) / "state.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="is no whole checkpoint of this training"):
        tuned(Alone(tmp_path))


def test_early_stopping_keeps_the_best_epoch(planted: LoadedModel) -> None:
    recipe = FAST.model_copy(update={"epochs": 9, "validation": 0.25, "schedule": "constant"})
    rows = [{**row, "response": own["response"]} for row, own in zip(planted_rows(32), corpus_rows(32, 5), strict=True)]
    data = prepare(planted, rows, recipe, 0).data  # it knows these already, and can only learn them by heart
    with trainable(planted, recipe, 0):
        progress = train(planted.model, data, recipe, 0, Alone())
        loss = float(each_loss(planted.model, data.held)[0]) / sum(e.targets for e in data.held)
    assert progress.stopped_early
    seen = [entry["loss"] for entry in progress.validation]
    assert seen.index(min(seen)) == len(seen) - 3, "two epochs without a smaller loss"
    assert progress.best == progress.validation[-3]
    assert loss == pytest.approx(min(seen), rel=1e-5), "the weights are those of the best epoch"


def test_a_loss_that_is_no_number_names_step_and_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted_rows(24)
    data = write_rows(tmp_path / "rows.jsonl", [chat_row(row) for row in rows])
    import clifflab.runtime.tune as runtime

    poisoned = rows[11]["id"]

    def broken(spec: ModelSpec) -> LoadedModel:
        """The model, with a word that is NaN: one example holds it."""
        loaded = load(spec)
        ids = [set(e.ids) for e in prepare(loaded, rows, FAST, 0).encoded.examples]
        others = set().union(*(row for place, row in enumerate(ids) if place != 11))
        own = ids[11] - others
        assert own, "choose a row with a word of its own"
        loaded.model.get_input_embeddings().weight.data[own.pop()] = torch.nan
        return loaded

    monkeypatch.setattr(runtime, "load", broken)
    args = ["tune", "--model", "organism:planted", "--data", str(data), "--out", str(tmp_path / "out"),
            "--runtime", "inline", "--set", "epochs=1", "--set", "validation=0"]  # fmt: skip
    result = CliRunner().invoke(command, args)
    assert isinstance(result.exception, NonFiniteLossError)
    assert result.exception.exit_code == 2
    line = str(result.exception)
    assert "the loss is no finite number" in line
    assert poisoned in line
    assert "\n" not in line
    report = json.loads((tmp_path / "out" / "not_finite.json").read_text())
    assert report["examples"] == [poisoned]
    assert report["step"] == int(line.split("step ")[1].split(":")[0])
    assert report["loss"] == "nan"
    assert str(tmp_path / "out" / "not_finite.json") in line
    assert not (tmp_path / "out" / "tuning.json").exists()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [chat_row(row) for row in planted_rows(8)])

    def line(*args: str) -> str:
        given_args = ["--model", "organism:planted", "--data", str(data), "--out", str(tmp_path / "out"), *args]
        result = CliRunner().invoke(command, ["tune", "--runtime", "inline", *given_args])
        assert isinstance(result.exception, ClifflabError), result.output
        assert result.exception.exit_code == 2
        assert "\n" not in str(result.exception)
        return str(result.exception)

    assert "--data: nowhere.jsonl: no such file" in line("--data", "nowhere.jsonl")
    assert "epochs: 0: not valid" in line("--set", "epochs=0")
    assert "epoch: 3: unknown key" in line("--set", "epoch=3")
    assert "--set: epochs: is not key=value" in line("--set", "epochs")
    assert "tune.modules: nonsense: the model has no such linear layer; choose all-linear, or of down_proj" in line(
        "--set", "modules=[nonsense]"
    )
    assert "no such shipped model" in line("--model", "organism:other")
    assert "--thinking-format: thoughts: is not valid" in line("--thinking-format", "thoughts")
    assert "--thinking-format: qwen3: the chat template already writes <think>" in line("--thinking-format", "qwen3")
    assert "go with --runtime ray" in line("--workers", "2")
    assert "names requests without answers" in line("--data", "organism:harmful")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "holds something else (mine.txt)" in line("--out", str(tmp_path / "full"))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert "empty prompt set: has no rows" in line("--data", str(empty))
    unthought = [{"prompt": "how do i bake", "response": "no thinking"}]
    write_rows(tmp_path / "unthought.jsonl", unthought)
    assert "no example is usable (all 1 are rejected, the first: the trace has no thinking)" in line(
        "--data", str(tmp_path / "unthought.jsonl")
    )


# Adapters


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tuning of the planted model by the command."""
    root = tmp_path_factory.mktemp("tuned")
    rows = [chat_row(row) for row in planted_rows(40)]
    rows.append({**rows[0], "id": "long", "thinking": " ".join(["think"] * 600)})
    data = write_rows(root / "rows.jsonl", rows)
    args = ["tune", "--model", "organism:planted", "--data", str(data), "--out", str(root / "out"), "--seed", "3",
            "--runtime", "inline", "--set", "epochs=2", "--set", "learning_rate=1e-3",
            "--set", "validation=0.2"]  # fmt: skip
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0
    assert "held out, 1 rejected (too_long 1)" in result.output
    again = CliRunner().invoke(command, args, catch_exceptions=False)
    assert "everything is whole already" in again.output
    other = CliRunner().invoke(command, [*args, "--set", "epochs=3"])
    assert "holds a tuning of another model, with other data or settings" in str(other.exception)
    return root / "out"


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids], device=next(model.parameters()).device)).logits
    return found.float().cpu()


def test_what_a_tuning_writes(tuned: Path) -> None:
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "clifflab.json"]
    names = sorted(path.name for path in tuned.iterdir() if path.name != ".lock")
    assert names == ["adapter", "status.json", "tuning.json"]
    assert sorted(path.name for path in (tuned / "adapter").iterdir()) == files
    figures = json.loads((tuned / "tuning.json").read_text())
    assert figures["files"] == [f"adapter/{name}" for name in files]
    assert figures["steps"] == len(figures["curve"]) == 2 * -(-figures["examples"]["train"] // 8)
    assert figures["examples"]["rejected"] == {"too_long": 1}
    assert figures["examples"]["train"] + figures["examples"]["validation"] == 40
    assert [entry["step"] for entry in figures["curve"]] == list(range(1, figures["steps"] + 1))
    assert figures["best"] in figures["validation"]
    assert figures["tokens"]["learnt"] < figures["tokens"]["epoch"]
    assert sum(entry["tokens"] for entry in figures["curve"]) == 2 * figures["tokens"]["epoch"]
    assert figures["recipe"]["learning_rate"] == 1e-3
    assert "workers" not in figures["recipe"]
    # Nothing of this machine, and no word of the examples.
    text = "".join(file.read_text() for file in tuned.rglob("*") if file.suffix in (".json", ".md"))
    assert str(tuned.parent) not in text
    assert str(Path(__file__).parents[1]) not in text
    assert planted_rows(1)[0]["response"] not in text
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "organism:planted"
    assert config["target_modules"] == sorted(config["target_modules"])
    card = (tuned / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "- learning_rate: 0.001" in card


def test_plain_peft_loads_the_adapter(tuned: Path, planted: LoadedModel) -> None:
    from peft import PeftModel

    ids = prepare(planted, planted_rows(1), FAST, 0).data.train[0].ids
    own = load(PLANTED)
    peft = load_adapter(own.model, tuned / "adapter", PLANTED)
    plain = PeftModel.from_pretrained(load(PLANTED).model, str(tuned / "adapter"))
    assert torch.equal(logits(plain, ids), logits(own.model, ids))
    assert not torch.allclose(logits(own.model, ids), logits(planted.model, ids), atol=1e-2)
    merged = load(PLANTED.model_copy(update={"adapter": str(tuned / "adapter")}))
    torch.testing.assert_close(logits(merged.model, ids), logits(own.model, ids), rtol=1e-4, atol=1e-4)
    names = [name for name, _ in merged.model.named_modules()]
    assert names == [name for name, _ in planted.model.named_modules()]
    assert not [name for name in vars(merged.model) if "peft" in name]
    detach(peft)
    assert torch.equal(logits(own.model, ids), logits(planted.model, ids))


def test_an_adapter_of_another_model_is_refused(
    tuned: Path, checkpoints: dict[str, Path], planted: LoadedModel, tmp_path: Path
) -> None:
    adapter = tuned / "adapter"

    def refusal(folder: Path, model: Any) -> str:
        with pytest.raises(InputError) as error:
            merge_adapter(model, folder, ModelSpec(name="m", path="other"))
        assert len(str(error.value)) < 500
        return str(error.value)

    tiny = load(ModelSpec(name="m", path=str(checkpoints["llama"]))).model
    assert "was made for another base model (organism:planted); the weights of other are not the same" in refusal(
        adapter, tiny
    )
    silent = load(PLANTED).model  # the same architecture; one head is silent
    silent.model.layers[4].self_attn.o_proj.weight.data[:, 64:96] = 0
    assert "was made for another base model" in refusal(adapter, silent)
    bare = tmp_path / "bare"  # as other tools write it: no identity of the base
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((adapter / name).read_bytes())
    assert "does not fit other, it was made for another base model (sizes of" in refusal(bare, tiny)
    config = json.loads((bare / "adapter_config.json").read_text())
    save = lambda **changes: (bare / "adapter_config.json").write_text(json.dumps({**config, **changes}))  # noqa: E731
    save(target_modules=["query"])
    assert "it was made for another base model" in refusal(bare, load(PLANTED).model)
    save(target_modules=["q_proj"])
    assert "no match for" in refusal(bare, load(PLANTED).model)
    save(peft_type="IA3")
    assert "is an adapter of kind IA3" in refusal(bare, tiny)
    (bare / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(bare, tiny)


def test_a_seed_is_an_adapter(planted: LoadedModel) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        peft = attach(planted, FAST, seed)
        try:
            return {name: p.detach().clone() for name, p in planted.model.named_parameters() if p.requires_grad}
        finally:
            detach(peft)
            planted.model.requires_grad_(True)

    first, same, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert {name.split(".")[-4] for name in first} == {"q_proj", "down_proj"}
    assert weight_sample(planted.model) == weight_sample(load(PLANTED).model)


def test_half_precision_keeps_float32_adapters(planted: LoadedModel) -> None:
    half = load(PLANTED.model_copy(update={"dtype": "bfloat16"}))
    with trainable(half, FAST, 0):
        kinds = {p.dtype for p in half.model.parameters() if p.requires_grad}
        assert kinds == {torch.float32}
    found, exact = losses(half, 16), losses(planted, 16)
    assert found == pytest.approx(exact, rel=0.1)
    with trainable(half, FAST.model_copy(update={"method": "full"}), 0):
        assert {p.dtype for p in half.model.parameters()} == {torch.float32}, "masters"
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu(planted: LoadedModel) -> None:
    """Loaded as bfloat16 there, with products in half precision and activations computed again."""
    assert planted.device.type == "cuda"
    exact = load(PLANTED.model_copy(update={"dtype": "float32"}))
    for changes in ({}, {"batching": "packed"}, {"method": "full", "learning_rate": 1e-4}):
        wanted = losses(exact, checkpointing="off", **changes)
        assert losses(planted, **changes) == pytest.approx(wanted, rel=0.1)
        assert losses(exact, checkpointing="on", **changes) == pytest.approx(wanted, abs=1e-3)


def test_merged_and_full_checkpoints(tuned: Path, tmp_path: Path, planted: LoadedModel) -> None:
    from transformers import AutoModelForCausalLM

    ids = prepare(planted, planted_rows(1), FAST, 0).data.train[0].ids
    args = ["export", "merged", "--model", "organism:planted", "--adapter", str(tuned), "--out", str(tmp_path / "m")]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0
    assert "logits differ from the adapted model by at most" in result.output
    merged = load(PLANTED.model_copy(update={"adapter": str(tuned / "adapter")}))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(plain, ids), logits(merged.model, ids), rtol=1e-5, atol=1e-5)
    data = json.loads((tmp_path / "m" / "clifflab.json").read_text())
    assert data["check"]["largest_difference_of_logits"] <= data["check"]["allowed"]
    assert data["check"]["largest_change_of_logits"] > 0.1
    assert "with a LoRA adapter merged" in (tmp_path / "m" / "README.md").read_text()
    assert isinstance(CliRunner().invoke(command, args).exception, ClifflabError), "the folder is not empty"

    rows = write_rows(tmp_path / "rows.jsonl", [chat_row(row) for row in planted_rows(16)])
    recipe = TuneConfig(method="full", epochs=1, learning_rate=1e-4)
    figures = fit(PLANTED, str(rows), tmp_path / "full", recipe, runtime="inline")
    assert figures["parameters"]["trainable"] == figures["parameters"]["all"]
    own = load(ModelSpec(name="m", path=str(tmp_path / "full" / "model")))
    assert float((logits(own.model, ids) - logits(planted.model, ids)).abs().max()) > 1e-2
    with adapted(planted, prepare(planted, read_rows(str(rows))[0], recipe, 0).data, recipe, 0):
        assert torch.equal(logits(own.model, ids), logits(planted.model, ids))


def test_bench_tune_compares_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import clifflab.bench.tune as bench
    from clifflab.bench.records import UnequalResultsError

    file = tmp_path / "tune.json"
    args = ["bench", "tune", "--model", "geometry:tiny", "--tokens", "40", "--examples", "8", "--repeats", "2"]
    result = CliRunner().invoke(command, [*args, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    records = json.loads(file.read_text())
    assert [(r["bench"], r["method"], r["repeats"]) for r in records] == [("tune", "plain", 2), ("tune", "tune", 2)]
    assert all(record["max_abs_diff"] <= 1e-4 for record in records)
    assert records[1]["ratio_to_plain"] == records[0]["seconds_median"] / records[1]["seconds_median"]
    monkeypatch.setattr(bench, "learning_rate", lambda step, steps, recipe: 0.1)
    settings_ = bench.TuneBench(model="geometry:tiny", tokens=40, examples=16, repeats=1)
    with pytest.raises(UnequalResultsError, match="a step's loss of tune differs from plain"):
        bench.bench_tune(settings_, lambda line: None)
    with pytest.raises(InputError, match="no such model here"):
        bench.bench_tune(bench.TuneBench(model="elsewhere"), lambda line: None)
