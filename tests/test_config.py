"Settings of a run: presets, the file that a run keeps, what may change."
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from grpo_chess import preset
from grpo_chess.board import encode
from grpo_chess.config import (
    Config, MatchConfig, check_resumable, from_values, parse, presets, read_settings, write_settings)
from grpo_chess.model import MODELS, ChessTransformer
from grpo_chess.settings import ELSEWHERE, ConfigError, flatten, known_keys, make_parser, sections

TOP = Path(__file__).resolve().parent.parent

@pytest.mark.parametrize("name", presets())
def test_presets_parse_and_name_only_known_keys(name):
    cfg, _ = parse(["--preset", name])
    assert isinstance(cfg, Config) and (cfg.sampler.group >= 2 or cfg.loss.moves == "all")
    assert cfg == preset(name) == from_values(flatten(dataclasses.asdict(cfg)))

def test_config_without_arguments_is_the_command_without_arguments():
    cfg, how = parse([])
    assert how == dict(label="imitator") and cfg == preset() == preset("imitator")
    assert cfg.init == "imitator" and cfg.model == MODELS["tiny"] and cfg.loss.moves == "all"
    assert preset("tiny") == Config() and (Config().init, Config().trainer.steps) == ("tiny", 600)

def test_tiny_is_what_the_page_on_learning_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(TOP/"nbs/experiments"))
    from run import settings
    plan = yaml.safe_load((TOP/"nbs/experiments/plan.yaml").read_text())["learning"]
    arguments = settings([*plan["base"], *plan["arms"]["tiny"]])
    ran, _ = parse(["--preset", "scratch", "--minutes", "15", *arguments])
    ran.engine.processes = 0                                                # they ran on one core each
    assert Config() == ran

def test_presets_hold_what_they_held():
    "Before the defaults became those of the default run; digit for digit."
    scratch, record, colab = (preset(name) for name in ("scratch", "record", "colab"))
    for cfg in (scratch, record, colab):
        assert (cfg.init, cfg.loss.moves, cfg.reward.depth, cfg.trainer.entropy_end) == ("", "sampled", 4, -1.)
    assert [(c.loss.entropy_coef, c.trainer.minibatches, c.minutes) for c in (scratch, record, colab)] == [
        (.1, 2, 7.), (0., 4, 0.), (0., 1, 0.)]

def test_the_preset_for_a_t4_fits_into_its_memory():
    "What one backward pass keeps, counted over eight positions and taken to a micro-batch, in 16 GB with room."
    import chess
    cfg, kept = preset("colab"), {}
    torch.manual_seed(0)
    model = ChessTransformer(cfg.model)
    tokens, legal = (torch.as_tensor(x) for x in encode([chess.Board()]*8))
    def keep(x):
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autocast("cpu", torch.float16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens, legal).float().logsumexp(-1).sum()
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    a_position = (sum(kept.values()) - weights)/8
    assert loss.isfinite() and a_position > 2**20
    assert a_position*cfg.trainer.micro_batch < 9*2**30, f"{a_position/2**20:.1f} MiB a position"

def test_what_others_call_a_setting_is_a_setting_here():
    assert not set(ELSEWHERE.values()) - {*known_keys(Config)} and not {*ELSEWHERE} & {*known_keys(Config)}

def test_order_of_precedence(tmp_path):
    file = tmp_path/"my.yaml"
    file.write_text("sampler: {boards: 5}\nseed: 7\n")
    cfg, _ = parse(["--preset", "record", "--config", str(file), "--seed", "9"])
    assert (cfg.sampler.boards, cfg.seed, cfg.model.width) == (5, 9, 256)

@pytest.mark.parametrize("changes, says", [
    (dict(minuts=1), "did you mean 'minutes'"), ({"sampler.grup": 8}, "sampler.group"), (dict(seed=-1), "seed = -1"),
    (dict(seed="many"), "seed"), (dict(init=None), "no value"), (dict(trainer=dict(steps=2.5)), "trainer.steps"),
    (dict(minutes=float("nan")), "not a finite number"), (dict(minutes=float("inf")), "not a finite number"),
    (dict(minutes=1e9), "minutes = 1000000000.0"), (dict(minutes=-1), "minutes = -1"), (dict(seed=10**26), "too large"),
    (dict(minutes="1m"), "minutes = 1m must be a number"), (dict(seed="x"), "seed = x must be a whole number"),
    (dict(trainer=dict(learning_rate=1)), "did you mean 'trainer.lr'"), (dict(beta=1), "did you mean 'loss.kl_coef'"),
    ({"trainer.stepss": 1}, "did you mean 'trainer.steps'"), (dict(batch_size=1), "did you mean 'sampler.boards'"),
    (dict(match=dict(games=3)), "match.games = 3"), (dict(match=dict(games=10**9)), "match.games"),
    (dict(match=dict(depth=0)), "match.depth = 0"), (dict(track="mlflow"), "wandb"), (dict(accelerator="tpu"), "cuda"),
    (dict(sampler=dict(boards=2), trainer=dict(minibatches=3)), "minibatches = 3 is more than sampler.boards = 2"),
    (dict(trainer=dict(freeze=9)), "trainer.freeze = 9 is more than model.layers")])
def test_a_wrong_change_of_a_preset_is_one_line(changes, says):
    with pytest.raises(ConfigError) as e: preset("tiny", **changes)
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), -1., 1e300])
def test_a_time_limit_is_a_time_also_without_the_parser(minutes):
    with pytest.raises(ValueError, match="minutes"): Config(minutes=minutes)

def test_there_is_no_such_preset():
    says = "there is no preset 'huge'; there are a100, colab, imitator, l4, record, scratch, tiny"
    with pytest.raises(ConfigError, match=says): preset("huge")

def test_every_changed_setting_arrives(tmp_path):
    "From Python and from the command line alike."
    changes = dict(seed=3, minutes=2.5, name="x", match=dict(games=2, depth=1), loss=dict(entropy_coef=.01),
                   engine=dict(deterministic=False))
    arguments = [f"--{key}={value}" for key, value in flatten(changes).items()]
    assert preset("scratch", **changes) == parse(["--preset", "scratch", *arguments])[0]
    assert preset("scratch", **flatten(changes)).loss.entropy_coef == .01

# The file that a run keeps

def test_the_settings_of_a_run_read_back_as_themselves(tmp_path):
    cfg = preset("colab", loss=dict(delta=3), name="ü 'x': #y")
    write_settings(tmp_path, cfg)
    assert from_values(read_settings(tmp_path)) == cfg
    assert parse(["--config", str(tmp_path/"config.yaml")])[0] == cfg        # and a new run may begin with them
    resumed, how = parse(["--resume", str(tmp_path), "--minutes", "3"])
    assert resumed == dataclasses.replace(cfg, minutes=3.) and how == dict(resume=str(tmp_path))

def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    write_settings(tmp_path, preset("record"))
    text = (tmp_path/"config.yaml").read_text()
    for cut in [*range(0, len(text) - 1, 37), len(text) - 2]:
        (tmp_path/"config.yaml").write_text(text[:cut])
        with pytest.raises(ConfigError) as e: parse(["--resume", str(tmp_path)])
        assert len(str(e.value).splitlines()) == 1
    for damaged in (text.replace("seed: 0", "seed: 1"), text.replace("  boards: 32\n", ""), text + "seed: 1\n"):
        (tmp_path/"config.yaml").write_text(damaged)
        with pytest.raises(ConfigError, match="not as its run wrote it"): parse(["--resume", str(tmp_path)])

def test_writing_settings_leaves_the_old_ones_or_the_new_ones(tmp_path, monkeypatch):
    from grpo_chess import settings
    write_settings(tmp_path, preset("record"))
    def fails(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(settings.os, "fsync", fails)
    with pytest.raises(OSError): write_settings(tmp_path, preset("tiny"))
    assert from_values(read_settings(tmp_path)) == preset("record")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]

@pytest.mark.parametrize("word, may", [
    ("--minutes=3", True), ("--engine.processes", True), ("--engine.timeout=9", True), ("--engine.retries=9", True),
    ("--engine.path=/x", True), ("--match.games=0", True), ("--trainer.micro_batch=9", True), ("--track=wandb", True),
    ("--engine.deterministic=false", False), ("--seed", False), ("--trainer.lr=1", False), ("--reward.depth=3", False),
    ("--trainer.precision=32-true", False), ("--sampler.temperature=2", False), ("--trainer.keeps=9", None)])
def test_what_may_change_in_a_resumed_run(word, may):
    if may: return check_resumable([word])
    says = "cannot change" if may is False else "did you mean 'trainer.keep'"
    with pytest.raises(ConfigError, match=says): check_resumable([word])

# Help

def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as e: parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for action in make_parser(Config, "train")._actions:
        assert action.help, action.option_strings
        assert "SUPPRESS" not in str(action.help) or action.dest in sections(Config), action.option_strings
    assert "default: 400)" in text                                            # the preset's steps, not the dataclass's
    def fields(cls, prefix=""):
        inner = sections(cls)
        for f in dataclasses.fields(cls):
            if f.name in inner: yield from fields(inner[f.name], f"{prefix}{f.name}.")
            else: yield f"{prefix}{f.name}", f.name, "\n".join(c.__doc__ or "" for c in cls.__mro__)
    for dotted, name, doc in fields(Config):
        described = re.search(rf"^\s+{name}: (.+)$", doc, re.M)
        assert described, f"{dotted} has no description"
        assert f"--{dotted} " in text and " ".join(described.group(1).split())[:30] in text, dotted

def test_help_of_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit): parse(["--preset", "record", "--help"])
    assert re.search(r"--sampler.boards BOARDS.*?default: 32\)", " ".join(capsys.readouterr().out.split()))

def test_every_dataclass_field_is_a_setting():
    known = known_keys(Config)
    assert len(known) > 70 and {f"match.{f.name}" for f in dataclasses.fields(MatchConfig)} <= {*known}
