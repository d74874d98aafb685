"""Reading what users bring: prompt sets and existing traces."""

from clifflab.data.files import source_hash as source_hash
from clifflab.data.prompts import read_prompts as read_prompts
