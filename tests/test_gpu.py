"What a GPU will meet, checked without one: attention, devices, waiting, and the script that measures the rest."
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from grpo_chess import trainer as trainer_module
from grpo_chess.model import Block, ModelConfig
from small import make

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks/gpu.py"

@pytest.mark.parametrize("width, heads", [(32, 2), (48, 3)])
def test_attention_is_torchs(width, heads):
    "Written out and as one call of torch: the same values and the same gradients, that of the bias too."
    torch.manual_seed(0)
    block, x = Block(ModelConfig(width, 1, heads)).eval(), torch.randn(5, 64, width)
    torch.nn.init.normal_(block.bias)
    q, k, v = block.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    theirs = block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=block.bias).transpose(1, 2).flatten(-2))
    ours, params = block.attend(x), [block.qkv.weight, block.out.weight, block.bias]
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), params) for y in (ours, theirs))):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3) and a.abs().max() > 0

@pytest.mark.parametrize("loss", [dict(), dict(moves="all", entropy_coef=.1), dict(kl_to="reference", kl_coef=1.)])
def test_nothing_in_the_inner_loop_waits_for_the_device_or_forgets_it(loss, monkeypatch):
    """On torch's meta device tensors have no values: whoever looks at one, to branch or to print, fails, and so does
    who mixes devices. All of a minibatch runs there, but for its last line, which fetches its sums."""
    t, fetched = make(loss=loss, micro_batch=16), []
    played = t.play()
    t.model.to("meta")
    if t.reference is not None: t.reference.to("meta")
    on_meta = {name: getattr(played, name).to("meta") for name in ("adv", "logp_old")}

    def fetch(fabric, x):
        fetched.append(x.device.type)
        return torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x
    monkeypatch.setattr(trainer_module, "sum_of_all", fetch)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: nullcontext())       # it does not know that device
    terms, logp = t.minibatch(replace(played, **on_meta), list(range(6)))
    assert fetched == ["cpu", "meta"] and logp.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in t.model.parameters())

def test_a_measurement_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path/"t.md"], capture_output=True, text=True)
    assert done.returncode and "no GPU here" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path/"t.md").exists()

def test_the_measurements_run_on_a_cpu(tmp_path):
    "Every part of the script, in small: what it writes has a row for each, and none that failed."
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--out", tmp_path/"t.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    table = (tmp_path/"t.md").read_text()
    assert done.returncode == 0 and "failed" not in table, done.stdout + done.stderr
    for row in ("ratio error, tiny, 16-mixed", "matrix product, bf16-mixed", "update of tiny, 32-true",
                "rollout and reward, tiny", "preset colab, end to end"): assert row in table
