"""Looking at the machine: what works, what does not, and what to do about it.

Everything heavy is imported inside the checks, so that a broken package is a finding and not a traceback. No secret is
read further than to see that it is there.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clifflab.errors import ClifflabError, UserError, shorten
from clifflab.findings import Finding

# Free space below which a study is bound to fail, and below which a larger one may.
OUT_PROBLEM, OUT_WARNING = 100 << 20, 2 << 30
# A checkpoint of 8 billion parameters in bfloat16 takes 16 GB.
CACHE_WARNING = 20 << 30
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def examine(
    out: Path, *, model: str | None = None, thinking_format: str = "auto", start_ray: bool = False
) -> list[Finding]:
    """Look at everything that a study needs.

    Args:
        out: Where results would go.
        model: A checkpoint folder, hub id or ``organism:planted`` whose access is checked too.
        thinking_format: That model's setting.
        start_ray: Really start a local Ray and run a task in it.
    """
    findings = [_python(), *_torch(), *_packages(), *_extras(), _ray(start_ray), _network()]
    findings += [_space("results", out, OUT_PROBLEM, OUT_WARNING), _cache(), _token(), _offline()]
    if model is not None:
        findings.append(_model(model, thinking_format))
    findings.append(_browser())
    return findings


def _python() -> Finding:
    version = platform.python_version()
    try:
        wanted = str(metadata.metadata("clifflab")["Requires-Python"])
    except metadata.PackageNotFoundError:
        remedy = "run pip install -c constraints.txt -e . in the project's folder"
        return Finding("python", "warning", f"{version}; clifflab itself is not installed", remedy)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        remedy = f"make an environment with Python {wanted}"
        return Finding("python", "problem", f"{version} is not supported ({wanted})", remedy)
    return Finding("python", "ok", f"{version} in {sys.prefix}", data={"version": version})


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "run pip install --force-reinstall -c constraints.txt torch"
        return [Finding("torch", "problem", f"cannot be imported ({shorten(error)})", remedy)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    detail = f"{torch.__version__}, {build} build, {cores} cores, {torch.get_num_threads()} threads"
    found = [Finding("torch", "ok", detail, data={"version": torch.__version__, "build": build, "cores": cores})]
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if driver:
            remedy = "install a CUDA build of torch that fits the driver (see pytorch.org), or use the CPU"
            found.append(
                Finding("gpus", "warning", f"torch sees none although a driver is there ({build} build)", remedy)
            )
        else:
            detail = "none: runs on the CPU; enough for the shipped model and other small ones"
            remedy = "for models above a billion parameters use a machine with a CUDA GPU"
            found.append(Finding("gpus", "info", detail, remedy))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} free"
        found.append(Finding(f"gpu {index}", "ok", detail, data={"free": free, "total": total}))
    return found


def _packages() -> list[Finding]:
    """Installed versions against the ranges that clifflab's own metadata gives."""
    found, count = [], 0
    for requirement in _requirements(""):
        count += 1
        if problem := _unmet(requirement):
            remedy = f"run pip install -c constraints.txt '{requirement}'"
            found.append(Finding(requirement.name, "problem", problem, remedy))
    if not count:
        return [Finding("packages", "skip", "clifflab is not installed: its requirements are not known")]
    return found or [Finding("packages", "ok", f"{count} required, all within their ranges")]


def _extras() -> list[Finding]:
    found = []
    for extra, use in (("gguf", "reads GGUF checkpoints"), ("vllm", "generates faster on CUDA machines")):
        unmet = [problem for requirement in _requirements(extra) if (problem := _unmet(requirement))]
        remedy = f"if you need it: pip install -c constraints.txt 'clifflab[{extra}]'"
        if not unmet:
            found.append(Finding(f"extra {extra}", "ok", f"installed: {use}"))
        elif all("not installed" in problem for problem in unmet):
            found.append(Finding(f"extra {extra}", "info", f"not there ({use})", remedy))
        else:
            found.append(Finding(f"extra {extra}", "warning", "; ".join(unmet), remedy))
    return found


def _requirements(extra: str) -> list[Requirement]:
    """What clifflab needs, or what an extra adds to it."""
    try:
        every = [Requirement(line) for line in metadata.requires("clifflab") or []]
    except metadata.PackageNotFoundError:
        return []
    markers = [(requirement, requirement.marker) for requirement in every]
    plain = [r for r, marker in markers if marker is None or marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [r for r, marker in markers if r not in plain and marker and marker.evaluate({"extra": extra})]


def _unmet(requirement: Requirement) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    met = requirement.specifier.contains(version, prereleases=True)
    return "" if met else f"{requirement.name} {version} is outside of {requirement.specifier}"


def _ray(start: bool) -> Finding:
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        remedy = "run pip install -c constraints.txt 'ray[data,default,train]', or use --runtime inline"
        return Finding("ray", "problem", "not installed", remedy)
    if not start:
        return Finding("ray", "ok", f"{version} installed, not started", "--start-ray tries a local one")
    from clifflab.config import RuntimeConfig
    from clifflab.runtime import local

    began = time.perf_counter()
    own = False
    try:
        own = local.start_ray(RuntimeConfig(workers=1))
        import ray

        other = ray.get(ray.remote(_pid).remote(), timeout=60)
    except Exception as error:  # noqa: BLE001 - whatever keeps Ray from starting is the finding
        remedy = "use --runtime inline, or make room: Ray needs /dev/shm, /tmp and free ports on 127.0.0.1"
        return Finding("ray", "problem", f"{version} does not start ({shorten(error)})", remedy)
    finally:
        if own:
            local.stop_ray()
    seconds = time.perf_counter() - began
    return Finding("ray", "ok", f"{version} started on 127.0.0.1 and ran a task (pid {other}) in {seconds:.0f} s")


def _pid() -> int:
    return os.getpid()


def _network() -> Finding:
    """Whether other machines may reach this one, where Ray's processes listen on all interfaces."""
    addresses = [a for a in (_address(socket.AF_INET, "192.0.2.1"), _address(socket.AF_INET6, "2001:db8::1")) if a]
    if not addresses:
        return Finding("network", "ok", "loopback alone: nothing that Ray opens can be reached from outside")
    detail = f"this machine has the address {', '.join(addresses)}; Ray asks for a token but binds all interfaces"
    remedy = "where others can reach it: a firewall, --runtime inline, or .ci/loopback before the command"
    return Finding("network", "info", detail, remedy)


def _address(family: socket.AddressFamily, documentation: str) -> str | None:
    """The address that packets to the outside would carry; connecting a UDP socket sends none."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((documentation, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _space(name: str, folder: Path, problem: int, warning: int) -> Finding:
    """Free space where a folder is or would be made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(name, "problem", f"{there} cannot be read ({error.strerror})", "choose another folder")
    detail, data = f"{_gib(free)} free at {folder}", {"path": str(folder), "free": free}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "problem", f"{there} cannot be written to", "choose a writable folder", data)
    if free < problem:
        remedy = "make space, or choose a folder on another disk"
        return Finding(name, "problem", f"{detail}; a study needs {_gib(problem)} at least", remedy, data)
    if free < warning:
        remedy = f"have {_gib(warning)} free, or choose a folder on another disk"
        return Finding(name, "warning", f"{detail}; large ones do not fit", remedy, data)
    return Finding(name, "ok", detail, data=data)


def _cache() -> Finding:
    from huggingface_hub import constants

    found = _space("model cache", Path(constants.HF_HUB_CACHE), 0, CACHE_WARNING)
    if found.status != "warning":
        return found
    remedy = "point HF_HOME at a larger disk before downloading models; local checkpoints need none of it"
    return Finding(found.name, "warning", found.detail, remedy, found.data)


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "ok", "present (not shown)", data={"present": True})
    remedy = "for gated models: hf auth login, or set HF_TOKEN"
    return Finding("hub token", "info", "none: public models only", remedy, {"present": False})


def _offline() -> Finding:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE to download models"
        return Finding("hub", "info", "offline mode: only what is in the cache", remedy, {"offline": True})
    return Finding("hub", "ok", "online mode", data={"offline": False})


def _model(path: str, thinking_format: str) -> Finding:
    """Whether a model is there, has safe weights, and a chat template whose thinking format is known."""
    try:
        from clifflab.config import ModelSpec
        from clifflab.models.loading import load_tokenizer, resolve_path, resolve_spec
        from clifflab.text import resolve_format

        spec = resolve_spec(ModelSpec(name="model", path=path, thinking_format=thinking_format))
        folder = Path(resolve_path(spec))
        if folder.is_file():
            return Finding("model", "ok", f"{path} is there", "clifflab model check converts it and looks inside")
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            remedy = "convert it: clifflab reads no pickled weights"
            return Finding("model", "problem", f"{path} holds no .safetensors file", remedy)
        options = {"revision": spec.revision, "trust_remote_code": False}
        try:
            tokenizer = load_tokenizer(str(folder) if folder.is_dir() else spec.path, options)
        except Exception as error:  # noqa: BLE001 - the libraries' errors change with their version
            remedy = "check the checkpoint's tokenizer files, and whether you may read it"
            return Finding("model", "problem", f"{path}: its tokenizer cannot be loaded ({shorten(error)})", remedy)
        form = resolve_format(spec.thinking_format, tokenizer)
    except UserError as error:
        return Finding("model", "problem", f"{error.field}: {shorten(error.value)}: {error.problem}", error.remedy)
    except ClifflabError as error:
        return Finding("model", "problem", str(error), "give a checkpoint folder or a hub id")
    detail = f"{path} is there, thinking format {form.name}"
    return Finding("model", "ok", detail, "clifflab model check looks inside", {"format": form.name})


def _browser() -> Finding:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found:
        return Finding("chromium", "ok", found)
    remedy = "install it from the system's packages to run the report's browser test; studies need none"
    return Finding("chromium", "info", "not there", remedy)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
