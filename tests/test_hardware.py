"What fits a GPU, counted on a CPU."

import types

import pytest
import torch

from grpo_chess import hardware
from grpo_chess.config import preset, presets
from grpo_chess.hardware import check_device, check_memory, kept_bytes, needed_bytes, pass_positions, suited_preset
from grpo_chess.model import MODELS, ChessTransformer, ModelConfig
from grpo_chess.settings import ConfigError
from grpo_chess.train import main
from runs import TINY

GB = 2**30
GPUS = dict(colab=14.6, l4=22.0, a100=39.5)


def autograd_keeps(cfg, dtype, positions):
    "Bytes, each piece of memory once."
    seen, model = {}, ChessTransformer(cfg)
    tokens = torch.zeros(positions, 65, dtype=torch.uint8)
    legal = torch.arange(20).repeat(positions, 1)

    def note(x):
        seen[x.untyped_storage().data_ptr()] = x
        return x
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), hooks:
        model(tokens, legal).logsumexp(-1).sum()
    return sum(x.untyped_storage().nbytes() for x in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", [*MODELS.values(), ModelConfig(64, 2, 8, 4.0), ModelConfig(128, 3, 2, 0.5)], ids=str)
def test_the_count_is_what_autograd_keeps(cfg, dtype):
    measured = (autograd_keeps(cfg, dtype, 10) - autograd_keeps(cfg, dtype, 4)) / 6
    assert kept_bytes(cfg, dtype != torch.float32) == pytest.approx(measured, rel=0.04)


def test_each_gpu_has_its_preset_and_the_preset_fits():
    for name, gb in GPUS.items():
        assert suited_preset(int(gb * GB), bf16=name != "colab") == name
        check_memory(preset(name), True, int(gb * GB) - GB // 2)
    assert suited_preset(0, False) == "tiny" and suited_preset(80 * GB, True) == "a100"
    assert suited_preset(32 * GB, False) == suited_preset(8 * GB, True) == "colab"


def said(cfg, free, low=True):
    with pytest.raises(ConfigError) as error:
        check_memory(cfg, low, free)
    assert "\n" not in str(error.value)
    return str(error.value)


def value(text):
    return int(text.split("use --")[1].split()[1].rstrip(","))


@pytest.mark.parametrize("free", [6, 9, 14.6, 22])
def test_what_is_said_to_fit_fits(free):
    free = int(free * GB)
    text = said(preset("colab", trainer=dict(micro_batch=2**15), sampler=dict(boards=2048)), free)
    assert "sampler.boards = 2048 needs about" in text
    boards = value(text)
    text = said(preset("colab", trainer=dict(micro_batch=2**15), sampler=dict(boards=boards)), free)
    assert "trainer.micro_batch = 32768 needs about" in text
    smaller = preset("colab", trainer=dict(micro_batch=value(text)), sampler=dict(boards=boards))
    check_memory(smaller, True, free)
    assert needed_bytes(preset("colab", trainer=dict(micro_batch=2 * value(text) + 1), sampler=dict(boards=boards)),
                        True) > free


def test_one_board_may_be_too_large():
    cfg = preset("colab", sampler=dict(boards=1, group=256, plies=32))
    assert pass_positions(cfg) == 8192 and "lower sampler.group × sampler.plies to" in said(cfg, 10 * GB)
    assert "a smaller model" in said(preset("colab"), GB // 2)


def test_every_preset_fits_the_large_one_and_processes_share():
    for name in presets():
        check_memory(preset(name), False, 80 * GB)
    assert needed_bytes(preset("colab"), True, 4) <= needed_bytes(preset("colab"), True)


def test_a_cpu_is_not_asked_and_a_gpu_is_before_the_first_step(tmp_path, monkeypatch, capsys):
    check_device(preset("colab", trainer=dict(micro_batch=2**20)), torch.device("cpu"), "32-true")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(GB), 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    with pytest.raises(ConfigError, match="1.0 GB are free"):
        check_device(preset("colab"), torch.device("cuda"), "16-mixed")
    cuda = types.SimpleNamespace(type="cuda")
    asks = hardware.check_device
    monkeypatch.setattr("grpo_chess.train.check_device", lambda cfg, device, *rest: asks(cfg, cuda, *rest))
    assert main([*TINY, "--model.width", "384", "--sampler.boards", "512", "--out", str(tmp_path), "--name", "x"]) == 2
    assert "GPU memory" in capsys.readouterr().err and not [*tmp_path.iterdir()]
