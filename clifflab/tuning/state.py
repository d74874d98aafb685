"""A training's state in files: tensors as safetensors, the rest as JSON, nothing pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clifflab.artifacts import read_json, write_json
from clifflab.errors import InputError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Parameters = Mapping[str, torch.nn.Parameter]


@dataclass
class Progress:
    """How far a training is, and what it saw.

    Attributes:
        step: Optimizer steps done; with the plan, which follows from data and seed, the place in the data.
        curve: ``step, epoch, loss, learning_rate, grad_norm, tokens`` of each step.
        validation: ``step, epoch, loss`` after each epoch.
        best: The entry of ``validation`` with the smallest loss.
        stale: Epochs since then.
        stopped_early: Whether there were ``patience`` of these.
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stale: int = 0
    stopped_early: bool = False


def write_state(
    folder: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, torch.Tensor],
    progress: Progress,
) -> None:
    """Write everything that the next step depends on into a folder."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight:{name}"] = parameter.detach()
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    tensors.update({f"best:{name}": tensor for name, tensor in best.items()})
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "state.safetensors")
    write_json(folder / "state.json", asdict(progress))


@torch.no_grad()
def read_state(
    folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], Progress]:
    """Put a checkpoint back into the parameters and the optimizer.

    Returns:
        The best weights so far (on the CPU; empty without validation), and the progress.

    Raises:
        InputError: The checkpoint is damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved = read_json(folder / "state.json")
    try:
        tensors = load_file(folder / "state.safetensors")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight:{name}"])
            state = {moment: tensors.get(f"{moment}:{name}") for moment in _MOMENTS}
            # AdamW keeps its count of steps on the CPU, its moments beside the parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in state.items()
                if value is not None
            }
        progress = Progress(**saved)
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = f"is no whole checkpoint of this training ({error})"
        raise InputError("checkpoint", folder, problem, "delete it and run again") from None
    best = {name.removeprefix("best:"): tensor for name, tensor in tensors.items() if name.startswith("best:")}
    return best, progress
