"""A tiny GGUF file, as analyses/damage.py writes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "analyses"))

from damage import write_gguf

__all__ = ["write_gguf"]
