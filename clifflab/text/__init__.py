"""Tokens and text: thinking formats, rendering, parsing. No other module looks for markers or counts tokens."""

from clifflab.text.formats import FORMATS as FORMATS
from clifflab.text.formats import ThinkingFormat as ThinkingFormat
from clifflab.text.formats import resolve_format as resolve_format
from clifflab.text.render import Renderer as Renderer
from clifflab.text.spans import Spans as Spans
from clifflab.text.spans import find_spans as find_spans
