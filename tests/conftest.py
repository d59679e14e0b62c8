"One thread a test process: small tensors gain nothing from more, and results stay the same bit for bit."
import pytest
import torch

from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import ChessTransformer, ModelConfig, Policy

torch.set_num_threads(1)

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=2)) as pool: yield pool

@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return Policy(ChessTransformer(ModelConfig(width=16, layers=1, heads=2, dropout=.3)), temperature=1.3)
