"""Engines write completions: one protocol, several ways."""

from clifflab.engines.base import Completion as Completion
from clifflab.engines.base import Engine as Engine
from clifflab.engines.base import Request as Request
from clifflab.engines.base import row_seed as row_seed
from clifflab.engines.scripted import ScriptedEngine as ScriptedEngine
from clifflab.engines.transformers import TransformersEngine as TransformersEngine
