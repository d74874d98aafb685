"""The training loop: AdamW over a fixed plan of steps, the same sums however many workers share them.

The loss of a step is the sum over all tokens that its examples learn, divided by their number, so neither micro-batches
nor workers enter it. Dropout stays off: the model that is tuned is the one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clifflab.config import TuneConfig
from clifflab.errors import ClifflabError, InputError, shorten
from clifflab.pulse import beat
from clifflab.tuning.batches import check_workers, epoch_steps, micro_batches, share_out, steps_per_epoch
from clifflab.tuning.examples import Example
from clifflab.tuning.forward import check_packing, example_losses, make_batch
from clifflab.tuning.group import Group
from clifflab.tuning.state import Progress, read_state, write_state

Listen = Callable[[str, dict[str, Any]], None]


class NonFiniteLossError(ClifflabError):
    """The loss or the gradient is no number: the training cannot go on.

    Attributes:
        report: ``what``, the step's entry, and ``examples``: those whose own loss is no number, or all of the step
            where only the gradient is none.
    """

    def __init__(self, report: dict[str, Any], file: str = "") -> None:
        self.report, self.file = report, file
        ids = report["examples"]
        super().__init__(
            f"tune: step {report['step']}: the {report['what']} is no finite number; it came with "
            f"{len(ids)} example{'s' if len(ids) != 1 else ''} ({shorten(', '.join(ids), 160)}"
            f"{f'; all in {file}' if file else ''}); lower the learning rate, use dtype bfloat16 or float32, or look "
            "at these examples"
        )

    def at(self, file: Path) -> NonFiniteLossError:
        """The same error, with the file that its report was written to."""
        return NonFiniteLossError(self.report, str(file))

    def __reduce__(self) -> tuple[type[NonFiniteLossError], tuple[dict[str, Any], str]]:
        """Pickle by arguments: the error crosses process borders."""
        return type(self), (self.report, self.file)


@dataclass(frozen=True)
class Data:
    """What is learnt.

    Attributes:
        train: Training examples.
        held: Validation examples; may be none.
        pad_id: Any token id, for padding.
    """

    train: Sequence[Example]
    held: Sequence[Example]
    pad_id: int


def train(
    model: Any,
    data: Data,
    settings: TuneConfig,
    seed: int,
    group: Group,
    *,
    listen: Listen | None = None,
) -> Progress:
    """Train whatever parameters of the model require a gradient, and leave it with the best weights.

    Goes on from the group's last checkpoint where there is one. On one worker the losses are then bit-equal to those of
    a training that was never interrupted.

    Args:
        model: A causal language model of transformers.
        data: The examples.
        settings: The recipe.
        seed: Of the order of the examples.
        group: The workers.
        listen: Told on the first worker of the ``start`` (``steps``, ``done``), of every ``step`` (its entry of the
            curve) and of every ``validation``.

    Raises:
        InputError: More workers than examples in a step, or an architecture that cannot do what the settings ask.
        NonFiniteLossError: The loss or the gradient is no number.
        OutputError: A checkpoint cannot be written.
    """
    return _Training(model, data, settings, seed, group, listen).run()


def learning_rate(step: int, steps: int, settings: TuneConfig) -> float:
    """Rate of the step ``step`` (from 0): a linear rise, then the schedule, which would reach 0 after the last step."""
    rise = math.ceil(settings.warmup * steps)
    if step < rise:
        return settings.peak * (step + 1) / rise
    if settings.schedule == "constant":
        return settings.peak
    done = (step - rise) / (steps - rise)
    return settings.peak * (1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class _Training:
    def __init__(
        self, model: Any, data: Data, settings: TuneConfig, seed: int, group: Group, listen: Listen | None
    ) -> None:
        self.model, self.data, self.settings, self.seed, self.group = model, data, settings, seed, group
        self.listen = listen if listen and group.rank == 0 else lambda kind, entry: None
        self.device = next(model.parameters()).device
        self.packed = settings.batching == "packed"
        self.lengths = [len(example.ids) for example in data.train]
        check_workers(len(data.train), settings.batch_size, group.size)
        self.per_epoch = steps_per_epoch(len(data.train), settings.batch_size)
        self.steps = settings.epochs * self.per_epoch
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.peak, weight_decay=settings.weight_decay
        )
        self.best: dict[str, torch.Tensor] = {}
        self.progress = Progress()

    def run(self) -> Progress:
        """All steps that are still to do."""
        if (folder := self.group.restore()) is not None:
            self.best, self.progress = read_state(folder, self.parameters, self.optimizer)
        with _training_mode(self.model, self.settings, self.device):
            if self.packed and len(self.data.train) > 1:
                check_packing(self.model, self.data.train, self.data.pad_id, self.device)
            self.forward = self.group.wrap(self.model)
            self.listen("start", {"steps": self.steps, "done": self.progress.step})
            while self.progress.step < self.steps and not self.progress.stopped_early:
                self._one_epoch()
        self.optimizer.zero_grad(set_to_none=True)  # no gradient outlives the training
        if self.best:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])
        return self.progress

    def _one_epoch(self) -> None:
        """The rest of the epoch that the training stands in."""
        epoch, done = divmod(self.progress.step, self.per_epoch)
        plan = epoch_steps(self.lengths, self.settings.batch_size, self.seed, epoch, grouped=not self.packed)
        for indices in plan[done:]:
            entry = self._step(indices, epoch)
            self.progress.curve.append(entry)
            self.progress.step += 1
            step, every = self.progress.step, self.settings.save_every
            ends = step % self.per_epoch == 0
            if ends and self.data.held:
                self._validate(epoch)
            over = step == self.steps or self.progress.stopped_early
            if over or (step % every == 0 if every else ends):
                self._save()
            self.listen("step", entry)

    def _step(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One optimizer step over these examples."""
        examples, group = self.data.train, self.group
        targets = sum(examples[index].targets for index in indices)
        mine = share_out(indices, self.lengths, group.size)[group.rank]
        batches = micro_batches(mine, self.lengths, self.settings.micro_tokens, packed=self.packed)
        rate = learning_rate(self.progress.step, self.steps, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(indices), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            with nullcontext() if number == len(batches) - 1 else group.apart(self.forward):
                loss, each_E = self._losses(self.forward, [examples[index] for index in batch])
                # Workers' gradients are averaged, and the sums of all are wanted.
                (loss * (group.size / targets)).backward()  # type: ignore[no-untyped-call]
            losses[[indices.index(index) for index in batch]] = each_E.double()
        losses = group.total(losses)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip))
        entry = {
            "step": self.progress.step + 1,
            "epoch": epoch + 1,
            "loss": float(losses.sum()) / targets,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(self.lengths[index] for index in indices),
        }
        if not (math.isfinite(entry["loss"]) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(entry["loss"]) else "loss"
            raise _not_finite(what, entry, [examples[index] for index in indices], losses.tolist())
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.step()
        return entry

    def _losses(self, forward: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        beat()
        batch = make_batch(examples, self.data.pad_id, self.device, packed=self.packed)
        with _precision(self.model):
            return example_losses(forward, self.model, batch)

    def _validate(self, epoch: int) -> None:
        """Loss on the held-out examples; keeps the weights if it is the smallest, counts the epoch if it is not."""
        losses = self._held_losses()
        loss = sum(losses) / sum(example.targets for example in self.data.held)
        entry = {"step": self.progress.step, "epoch": epoch + 1, "loss": loss}
        if not math.isfinite(loss):
            raise _not_finite("validation loss", entry, self.data.held, losses)
        self.progress.validation.append(entry)
        if self.progress.best is None or loss < self.progress.best["loss"]:
            self.progress.best, self.progress.stale = entry, 0
            self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        else:
            self.progress.stale += 1
            self.progress.stopped_early = self.progress.stale >= self.settings.patience
        self.listen("validation", entry)

    @torch.no_grad()
    def _held_losses(self) -> list[float]:
        """Loss of each held-out example, summed over what it learns."""
        held, group = self.data.held, self.group
        lengths = [len(example.ids) for example in held]
        mine = share_out(range(len(held)), lengths, group.size)[group.rank]
        losses = torch.zeros(len(held), dtype=torch.float64, device=self.device)
        for batch in micro_batches(mine, lengths, self.settings.micro_tokens, packed=self.packed):
            losses[batch] = self._losses(self.model, [held[index] for index in batch])[1].double()
        found: list[float] = group.total(losses).tolist()
        return found

    def _save(self) -> None:
        self.group.save(
            lambda folder: write_state(folder, self.parameters, self.optimizer, self.best, self.progress),
            self.progress.step,
        )


def _not_finite(
    what: str, entry: dict[str, Any], examples: Sequence[Example], losses: Sequence[float]
) -> NonFiniteLossError:
    broken = [e.id for e, loss in zip(examples, losses, strict=True) if not math.isfinite(loss)]
    report: dict[str, Any] = {
        "what": what,
        **{key: value if math.isfinite(value) else str(value) for key, value in entry.items()},
        "examples": sorted(broken or [example.id for example in examples]),
    }
    return NonFiniteLossError(report)


def _precision(model: Any) -> AbstractContextManager[Any]:
    """Half precision for the products on a GPU where the weights are halves, or float32 masters of halves."""
    weight = model.get_input_embeddings().weight
    halves = {getattr(model.config, "dtype", None), weight.dtype} & {torch.bfloat16, torch.float16}
    return torch.autocast("cuda", torch.bfloat16) if weight.is_cuda and halves else nullcontext()


@contextmanager
def _training_mode(model: Any, settings: TuneConfig, device: torch.device) -> Iterator[None]:
    """Activation checkpointing where it is wanted, and everything as before at the end.

    Only the blocks are told that they train, which is what checkpointing asks for; their parts, and with them dropout,
    stay as in evaluation.
    """
    can = getattr(model, "supports_gradient_checkpointing", False)
    if settings.checkpointing == "on" and not can:
        problem = "the architecture cannot compute activations again"
        raise InputError("tune.checkpointing", "on", problem, "set it to off, and lower tune.micro_tokens")
    was = [(module, module.training, set(vars(module))) for module in model.modules()]
    model.eval()
    wanted = settings.checkpointing == "on" or (settings.checkpointing == "auto" and device.type == "cuda" and can)
    try:
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.training = True
        yield
    finally:
        if wanted:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        for module, training, names in was:
            module.training = training
            for name in set(vars(module)) - names if wanted else ():
                delattr(module, name)
