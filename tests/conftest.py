"One thread a test process: small tensors gain nothing from more, and results stay the same bit for bit."
import io

import pytest
import torch
from PIL import Image

from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import ChessTransformer, ModelConfig, Policy

torch.set_num_threads(1)

@pytest.fixture
def quick_pictures(request):
    "Reports with empty pictures, for tests of runs: drawing is four fifths of a short run. `draws` draws."
    from matplotlib.figure import Figure

    from grpo_chess import page, report
    if request.node.get_closest_marker("draws"):
        yield
        return
    empty = io.BytesIO()
    Image.new("RGB", (1, 1)).save(empty, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "instrument_png", lambda *_: empty.getvalue())
        patch.setattr(report, "draw_panel", lambda *_: Figure(figsize=(1, 1)))
        yield

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=2)) as pool: yield pool

@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return Policy(ChessTransformer(ModelConfig(width=16, layers=1, heads=2, dropout=.3)), temperature=1.3)
