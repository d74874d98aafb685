"""The probes that a corpus is scored with: read from the folder of a run, chosen, checked against the model.

Shape suffixes: L layers, D width of the residual stream, Q probes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clifflab.artifacts import file_hash, read_json
from clifflab.errors import InputError

FIELD = "--probes"
# What a model's identity says of the weights; how they are read (the dtype) moves scores by rounding alone.
_WEIGHTS = ("sha256", "gguf", "hub", "revision", "adapter")
_HINT = "give a model's folder of a finished study (it holds probes.safetensors and probes.json)"


@dataclass(frozen=True)
class Probe:
    """One probe on one layer.

    Attributes:
        name: First 12 hexadecimal digits of its file's SHA-256.
        train_positions: Where it was trained: ``all`` or ``final``.
        estimator: ``logistic`` or ``difference``.
        layer: Block after which it reads.
        reported: Whether it is the first file's probe at the layer that its study reports.
        weight: ``[D]``, float32.
        bias: Its bias.
    """

    name: str
    train_positions: str
    estimator: str
    layer: int
    reported: bool
    weight: npt.NDArray[np.float32]
    bias: float


@dataclass(frozen=True)
class ProbeFile:
    """Where probes came from.

    Attributes:
        path: The safetensors file.
        sha256: Of its bytes.
        model: Identity of the model whose states it was trained on.
        template_hash: Of that model's chat template.
        layers: Layers that it holds.
    """

    path: str
    sha256: str
    model: Mapping[str, Any]
    template_hash: str
    layers: int


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one job, in the order of its rows.

    Attributes:
        probes: Q probes.
        files: Where they came from.
    """

    probes: tuple[Probe, ...]
    files: tuple[ProbeFile, ...]

    def __len__(self) -> int:
        return len(self.probes)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that are read, ascending."""
        return tuple(sorted({probe.layer for probe in self.probes}))

    def on(self, layer: int) -> list[int]:
        """Places of the probes that read a layer."""
        return [q for q, probe in enumerate(self.probes) if probe.layer == layer]

    def identity(self) -> list[dict[str, Any]]:
        """What makes the set what it is, as plain data: every probe, with its file's hash."""
        whole = {file.sha256[:12]: file.sha256 for file in self.files}
        keys = ("train_positions", "estimator", "layer", "reported")
        return [{"sha256": whole[p.name], **{key: getattr(p, key) for key in keys}} for p in self.probes]


def load_probes(paths: Iterable[str | Path], specs: Sequence[str]) -> ProbeSet:
    """Read probes.

    Args:
        paths: Folders of a model in a finished study, or the ``.safetensors`` files in them, one for each seed or
            study; the first one's probes at their reported layers are the reported ones.
        specs: Which probes of each, ``POSITIONS[:ESTIMATOR[:LAYER]]`` (see ``ScoreConfig.probes``).

    Raises:
        InputError: A file is missing, damaged, holds no trained probes, or not those asked for.
    """
    probes: dict[tuple[str, str, str, int], Probe] = {}
    files: dict[str, ProbeFile] = {}
    for place, path in enumerate(paths):
        file, tensors, reported = _read(Path(path).expanduser())
        files.setdefault(file.sha256, file)
        for spec in specs:
            for probe in _chosen(file, tensors, reported, spec, first=place == 0):
                probes.setdefault((probe.name, probe.train_positions, probe.estimator, probe.layer), probe)
    if not probes:
        raise InputError(FIELD, "", "no probes are given", _HINT)
    return ProbeSet(tuple(probes.values()), tuple(files.values()))


def check_probes(
    probes: ProbeSet, identity: Mapping[str, Any], template_hash: str, layers: int, d_model: int
) -> None:  # fmt: skip
    """Refuse probes that were trained on other states than the model yields.

    Args:
        probes: The probes.
        identity: The model's (see :func:`clifflab.models.loading.model_identity`).
        template_hash: Of its chat template.
        layers: Its blocks.
        d_model: Width of its residual stream.

    Raises:
        InputError: Another model (or another adapter on it), another template, another width or fewer layers.
    """
    for file in probes.files:
        other = [name for name in _WEIGHTS if file.model.get(name) != identity.get(name)]
        if other:
            trained, given = (_short(about, other[0]) for about in (file.model, identity))
            problem = f"trained on another model ({trained}) than --model ({given})"
            raise InputError(FIELD, file.path, problem, "give the probes of a study of this very model")
        if file.template_hash != template_hash:
            problem = "trained with another chat template, thinking format or system message"
            raise InputError(FIELD, file.path, problem, "give the settings of the study that trained them, or retrain")
        width = next(len(probe.weight) for probe in probes.probes if probe.name == file.sha256[:12])
        if width != d_model:
            problem = f"probes of width {width}, where the model's residual stream has {d_model}"
            raise InputError(FIELD, file.path, problem, "give the probes of a study of this very model")
    deepest = max(probes.layers)
    if deepest >= layers:
        problem = f"reads layer {deepest}, where the model has layers 0 to {layers - 1}"
        raise InputError(FIELD, probes.files[0].path, problem, "give the probes of a study of this very model")


def _read(path: Path) -> tuple[ProbeFile, dict[str, npt.NDArray[np.float32]], dict[str, int]]:
    """A file with its tensors and the reported layer of each of its probes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    weights = path / "probes.safetensors" if path.is_dir() else path
    about_file = weights.with_suffix(".json")
    for file in (weights, about_file):
        if not file.is_file():
            what = f"no such file ({file.name})" if path.exists() else "no such file or folder"
            raise InputError(FIELD, path, what, _HINT)
    try:
        about = read_json(about_file)
        if not isinstance(about, dict):
            raise InputError(FIELD, about_file, "is damaged", _HINT)
        if not about["trained"]:
            problem = f"holds no trained probes ({about.get('reason') or 'the study had too few examples'})"
            raise InputError(FIELD, path, problem, "run the study on more prompts")
        tensors = load_file(weights)
        reported = {key: int(probe["reported_layer"]) for key, probe in about["probes"].items()}
        model, template = dict(about["model"]), str(about["template_hash"])
        counts = {len(tensors[f"{key}.w"]) for key in reported} | {len(tensors[f"{key}.b"]) for key in reported}
        whole = all(np.isfinite(tensors[f"{key}.{part}"]).all() for key in reported for part in "wb")
        whole &= len(counts) == 1 and all(tensors[f"{key}.w"].ndim == 2 for key in reported)
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(FIELD, path, f"cannot be read ({type(error).__name__}: {error})", _HINT) from error
    if not whole:
        raise InputError(FIELD, path, "is damaged: its tensors do not fit together, or are not finite", _HINT)
    return ProbeFile(str(weights), file_hash(weights), model, template, counts.pop()), tensors, reported


def _chosen(
    file: ProbeFile, tensors: dict[str, npt.NDArray[np.float32]], reported: dict[str, int], spec: str, *, first: bool
) -> list[Probe]:
    """The probes of one file that a spec names."""
    positions, _, rest = spec.partition(":")
    estimator, _, layer = rest.partition(":")
    key = f"{positions}.{estimator or 'logistic'}"
    if key not in reported:
        remedy = f"it has {', '.join(name.replace('.', ':') for name in reported)}"
        raise InputError(FIELD, file.path, f"holds no probe {key.replace('.', ':')}", remedy)
    layers = list(range(file.layers)) if layer == "every" else [int(layer) if layer else reported[key]]
    if not 0 <= layers[0] <= layers[-1] < file.layers:
        problem = f"holds no layer {layers[-1]} (asked for as {spec})"
        raise InputError(FIELD, file.path, problem, f"give layers 0 to {file.layers - 1}")
    weights_LD, biases_L = tensors[f"{key}.w"].astype(np.float32), tensors[f"{key}.b"].astype(np.float32)
    return [
        Probe(
            name=file.sha256[:12],
            train_positions=positions,
            estimator=estimator or "logistic",
            layer=index,
            reported=first and index == reported[key],
            weight=weights_LD[index],
            bias=float(biases_L[index]),
        )
        for index in layers
    ]


def _short(identity: Mapping[str, Any], name: str) -> str:
    """One entry of a model's identity, for an error line."""
    value = identity.get(name)
    if value is None:
        return f"no {name}"
    return f"{name} {str(value)[:12]}"
