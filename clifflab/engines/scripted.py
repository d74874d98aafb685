"""An engine that plays back written completions: for tests and for simulating a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clifflab.config import TracesConfig
from clifflab.engines.base import Completion, Request
from clifflab.text.render import Renderer


class ScriptedEngine:
    """Completes each prompt with the text that ``script`` gives for it.

    Args:
        renderer: Encodes the completions.
        script: From the rendered prompt and the row's seed to the completion's text.
    """

    def __init__(self, renderer: Renderer, script: Callable[[str, int], str]) -> None:
        self.renderer, self.script = renderer, script

    def generate(self, requests: Sequence[Request], sampling: TracesConfig) -> list[Completion]:
        """Play back the script, cut at each request's limit; what is written has no heads to change."""
        assert not any(request.heads for request in requests)
        completions = []
        for request in requests:
            text = self.script(self.renderer.decode(request.prompt_ids), request.seed)
            ids = self.renderer.encode(text)
            cut = tuple(ids[: request.limit])
            completions.append(Completion(cut, "stop" if len(cut) == len(ids) else "length"))
        return completions
