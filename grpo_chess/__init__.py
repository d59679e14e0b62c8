"""A small transformer learns chess by GRPO. The front door: `from grpo_chess import preset, run, load, match`."""
__version__ = "0.1.0"

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Threads that wait spin for a moment, then sleep. Beside a busy process that is several times as fast as libgomp's own
# choice (benchmarks/threads.py measures it). libgomp reads it when torch is loaded, hence here, before other imports.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN remembers 1,024 kernels, one for every shape that it met, 250 MB once it is full: batches here seldom have the
# same shape again. A pass in bfloat16 needs twenty, the small batches of a rollout some two hundred.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

_DOOR = dict(preset="config", presets="config", run="train", load="front", match="front", play_board="widget",
             view_group="widget")       # name -> module

if TYPE_CHECKING:
    from .config import preset, presets
    from .front import load, match
    from .train import run
    from .widget import play_board, view_group

__all__ = ["load", "match", "play_board", "preset", "presets", "run", "view_group"]

def __getattr__(name:str)->Any:
    "A name of the front door, from its module, which is loaded when it is first used."
    if name in _DOOR: return getattr(import_module(f".{_DOOR[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the front door has {', '.join(_DOOR)}")

def __dir__()->list[str]:
    return sorted([*globals(), *_DOOR])
