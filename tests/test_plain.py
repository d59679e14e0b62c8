"Logs as other trainers write them, each with one plain fault or none: what a reader of the diagnosis sees."
import math

import numpy as np
import pytest

from grpo_chess.doctor import as_markdown, diagnose
from grpo_chess.firststep import normalised, numbers_of, two_temperatures
from grpo_chess.histories import HistoryError, as_history, rows_in
from grpo_chess.history import from_rows
from grpo_chess.figures import data
from grpo_chess.panel import read_metrics
from grpo_chess.watch import alarms

N = 200


def log(names, steps=N, seed=0, every=1, **config):
    "A history of `names`: logged name -> value of a step k and its noise, or a number."
    rng = np.random.default_rng(seed)
    rows = [{"step": every*k} | {name: f(k, rng.standard_normal()) if callable(f) else f for name, f in names.items()}
            for k in range(steps)]
    return as_history(rows, config, "log")


def rises(k, e): return .3 + .4*k/N + .05*e
def noise(k, e): return .3 + .05*e


HEALTHY = dict(
    cleanrl={"losses/approx_kl": lambda k, e: .013 + .002*e, "losses/clipfrac": lambda k, e: .14 + .02*e,
             "losses/entropy": lambda k, e: 1.5 - k/N, "charts/episodic_return": rises},
    openrlhf={"ppo_kl": lambda k, e: .012 + .002*e, "ppo_clip_ratio": lambda k, e: .08 + .01*e, "reward": rises},
    verl={"actor/ppo_kl": lambda k, e: .003 + .0003*e, "actor/pg_clipfrac": lambda k, e: .11 + .01*e,
          "actor/entropy": lambda k, e: .5 - .001*k, "critic/rewards/mean": rises},
    trl={"clip_ratio/region_mean": lambda k, e: .11 + .01*e, "kl": lambda k, e: .0004 + .0003*k, "reward": rises},
)
VLLM = {"sampling/sampling_logp_difference/max": .7, "sampling/importance_sampling_ratio/mean": 1.0005, "entropy": .4,
        "clip_ratio/region_mean": 0., "reward": rises}


@pytest.mark.parametrize("name", HEALTHY)
def test_several_updates_a_step_are_no_alarm_while_the_reward_rises(name):
    found = diagnose(log(HEALTHY[name]))
    assert not found.alarms, as_markdown(found)
    assert "reward_rises" in found.names() and "Before the first update" not in as_markdown(found)


@pytest.mark.parametrize("gap", (.004, .012, .03))
def test_two_programs_in_half_precision_are_a_note(gap):
    found = diagnose(log(VLLM | {"sampling/sampling_logp_difference/mean": gap}))
    assert not found.alarms and "usual_gap" in found.names()


def test_a_gap_between_two_programs_is_fitted_without_the_numbers_of_another_ratio():
    names = VLLM | {"sampling/sampling_logp_difference/mean": .35, "sampling/importance_sampling_ratio/mean": 1.,
                    "reward": noise}
    first = diagnose(log(names)).alarms[0]
    assert first.severity == "critical" and "clip fraction" not in first.says
    assert "from the mean log-ratio" in first.says
    assert "Compute the log-probabilities of one batch twice" in first.change + first.refute


ENGINES = {"actor/pg_clipfrac": .11, "actor/ppo_kl": .003, "actor/entropy": .5, "critic/rewards/mean": rises}


@pytest.mark.parametrize("name", ("rollout_corr/kl", "mismatch_kl/mean"))
@pytest.mark.parametrize("size", (2e-4, .0015, .012))
def test_a_small_kl_between_two_programs_is_no_alarm(name, size):
    "Rounding and staleness: several updates a step, one of them logged over all."
    for rest in (ENGINES, {"reward": rises, "actor/entropy": .5}):
        found = diagnose(log(rest | {name: lambda k, e: size*(1 + .1*e)}))
        assert not found.alarms, as_markdown(found)
        grown = diagnose(log(rest | {name: lambda k, e: 1.5e-4 + size*k/N}))
        assert not grown.alarms, as_markdown(grown)


def test_of_two_ratios_the_worse_one_decides():
    "verl logs the KL of its updates and that between its two programs; either may be wrong."
    between = ENGINES | {"rollout_corr/kl": .06, "critic/rewards/mean": noise}
    for rest in (between, between | {"actor/ppo_kl": 0., "actor/pg_clipfrac": 0.}):
        first = diagnose(log(rest)).alarms[0]
        assert "KL 0.06" in first.says and "clip fraction" not in first.says and "kl_engines" in first.columns
    wrong = {"actor/pg_clipfrac": .45, "actor/ppo_kl": .2, "actor/entropy": 2.1, "critic/rewards/mean": noise}
    for small in (1e-4, 5e-4):
        alone, with_it = (diagnose(log(x)).alarms[0] for x in (wrong, wrong | {"rollout_corr/kl": small}))
        assert (alone.name, alone.severity) == (with_it.name, with_it.severity) and alone.severity == "critical"


def test_a_kl_between_two_programs_that_grows_or_breaks_is_seen():
    grows = diagnose(log({"mismatch_kl": lambda k, e: 1e-3*math.exp(12*k/N), "reward": noise, "entropy": .5}))
    assert grows.alarms[0].name == "engines_apart" and not {"divergence", "lr_too_high"} & set(grows.names())
    broken = diagnose(log({"mismatch_kl": lambda k, e: math.nan if k > 10 else 1e-3, "reward": noise, "entropy": .5}))
    assert "not_a_number" in broken.names()


def test_the_kl_of_the_first_steps_is_said_to_be_from_what_was_logged_there():
    "The gap between two programs is logged from step 20 on only."
    def late(k, e): return math.nan if k < 20 else .01
    row = {"actor/ppo_kl": .05, "actor/pg_clipfrac": .2, "actor/entropy": 2.1, "reward": noise}
    said = [f.says for f in diagnose(log(row | {"sampling/sampling_logp_difference/mean": late})).findings]
    assert any("KL 0.05" in x for x in said) and not any("from the mean log-ratio" in x for x in said)


def test_a_clip_fraction_that_was_doubled_is_said_to_be():
    said = diagnose(log({"actor/pg_clipfrac": .311, "actor/ppo_kl": .04, "actor/entropy": 2.1, "reward": noise}))
    assert "clip fraction 0.622, twice the logged 0.311" in said.alarms[0].says


def test_a_clip_fraction_beyond_any_healthy_run_is_an_alarm_though_the_reward_rises():
    found = diagnose(log({"actor/pg_clipfrac": .311, "actor/ppo_kl": .04, "actor/entropy": 2.1, "reward": rises}))
    assert found.alarms and found.alarms[0].severity == "warning"


def test_numbers_that_no_known_cause_explains_are_said_to_be_so():
    row = {"clip_fraction": .5, "approx_kl": 3., "mean_ratio": 1.8, "entropy": 2., "reward": noise}
    first = diagnose(log(row, 9)).findings[0]
    assert first.called.startswith("wrong ratio, which no known cause fits") and "does not fit" in first.says


def test_what_the_settings_say_of_a_temperature_stands_in_the_finding():
    row = {"mean_clip_fraction": .556, "mean_kl_divergence": .046, "entropy": 2.816}
    first = diagnose(log(row, 9, rollout_temperature=1.3, ppo_steps=1)).alarms[0]
    assert first.name == "two_temperatures" and first.severity == "critical"
    assert "settings name a sampling temperature of 1.3" in first.says and "Before the first update" in first.says


def nearly_uniform(gap=1.3, steps=10, grows=True):
    "First steps of an untrained network whose sampler is hotter than its loss."
    rng = np.random.default_rng(1)
    scores = np.where(np.arange(45) < rng.integers(10, 45, (200, 1)), rng.standard_normal((200, 45)), -np.inf)
    for k in range(steps):
        old, new = pair = two_temperatures(normalised(scores*(.1 + .04*k*grows)/gap), gap)
        x, there = numbers_of(pair), np.isfinite(old)
        yield dict(step=k, plies=2048, kl_exact=x.kl, clip_region=x.clip, mean_ratio=x.mean_ratio, ess=x.ess,
                   entropy=x.entropy, entropy_gap=x.entropy_gap, ratio_error=np.abs(new[there] - old[there]).max())


@pytest.mark.parametrize("gap", (1.15, 1.3, 1.6, .7))
def test_two_temperatures_that_the_settings_name_are_named_though_an_untrained_network_hardly_shows_them(gap):
    config = {"sampler.temperature": gap, "ablate.loss_temperature": 1.}
    found = diagnose(as_history(list(nearly_uniform(gap)), config, "log")).alarms
    assert found[0].name == "two_temperatures" and found[0].certainty > .6, found[0]
    assert f"settings name both, {gap:g} and 1" in found[0].says and "nearly uniform" in found[0].says
    same = config | {"ablate.loss_temperature": gap}                    # no gap: then it is something else
    assert diagnose(as_history(list(nearly_uniform(gap)), same, "log")).findings[0].name != "two_temperatures"


def test_rounding_that_grows_along_a_run_is_doubted():
    sure, doubted = (diagnose(as_history(list(nearly_uniform(grows=x)), {}, "log")).findings[0] for x in (False, True))
    assert sure.name == doubted.name == "rounding" and doubted.certainty < .6*sure.certainty
    assert "two temperatures" in doubted.says and "two temperatures" not in sure.says


def steps_of(kl, regret, n=14):
    return [dict(step=k, updates=5, lr=.1, kl_step=kl(k), ratio_error=0., entropy=2.5, expected_regret=regret(k))
            for k in range(n)]


def zigzag(k): return .1 + .01*(k % 2)
def falling(k): return .1 - .004*k


@pytest.mark.parametrize("kl, regret, says", [
    (lambda k: 2. if k == 3 else .01, falling, "Step 3 moves the policy by a KL of 2.00 nats"),
    (lambda k: .25, zigzag, ""),                # usual at first where a step makes fifty updates
    (lambda k: .5, zigzag, "A typical step moves"),
    (lambda k: 1.5*(k < 8), zigzag, "A typical step moves"),
    (lambda k: .25, falling, ""), (lambda k: .05, zigzag, ""), (lambda k: .5 if k == 3 else .01, falling, "")])
def test_a_step_that_is_too_large_is_an_alarm(kl, regret, says):
    found = [f.says for f in diagnose(as_history(steps_of(kl, regret), {}, "log")).alarms if f.name == "lr_too_high"]
    assert bool(found) == bool(says) and (not says or found[0].startswith(says)), found


def test_a_leap_in_the_middle_of_a_collapse_is_no_cause_of_it():
    rows = [r | {"entropy": 2.5*math.exp(-r["step"]/12), "expected_regret": .1 + .001*r["step"]}
            for r in steps_of(lambda k: 2. if k == 60 else .01, falling, 80)]
    names = [f.name for f in diagnose(as_history(rows, {}, "log")).alarms]
    assert names.index("entropy_collapse") < names.index("lr_too_high"), names


def test_a_policy_that_went_far_at_once_and_moves_no_more_is_an_alarm():
    rows = [{"approx_kl": 1.5*(r["step"] < 8), **r} for r in steps_of(lambda k: 0., falling, 40)]
    for r in rows: del r["kl_step"]
    assert "A step at the beginning" in [f for f in diagnose(as_history(rows, {}, "log")).alarms][0].says


def test_a_sampler_that_is_refreshed_now_and_then_is_stale():
    rows = [r | dict(ratio_error=.05*(r["step"] % 3)) for r in steps_of(lambda k: .01, falling)]
    found = diagnose(as_history(rows, {}, "log")).alarms
    assert found[0].name == "stale_policy" and "refreshed every 3 steps" in found[0].says


@pytest.mark.parametrize("name", ("imitator", "scratch", "tiny"))
def test_no_stored_run_is_warned_of_at_any_length(name):
    "What the guards of these runs would have said as they went on."
    rows = read_metrics(data(f"{name}_metrics.jsonl"))
    began = next(k for k, row in enumerate(rows) if row.get("updates", 1))
    assert max(row["kl_step"] for row in rows) < .3         # half of what is called a leap
    for n in (*range(began + 1, began + 40), *range(began + 40, len(rows), 20)):
        assert not (found := alarms(rows[:n], {})), (n, found)


def test_others_columns_may_have_one_large_value():
    rows = [{"approx_kl": 2. if r["step"] == 3 else .01, **r} for r in steps_of(lambda k: 0., falling)]
    for r in rows: del r["kl_step"]
    assert "lr_too_high" not in diagnose(as_history(rows, {}, "log")).names()


def test_a_run_that_has_hardly_begun_to_learn_says_so():
    rows = [r | dict(updates=0, lr=0.) if r["step"] < 12 else r for r in steps_of(lambda k: .7*(k > 11), falling)]
    found = diagnose(as_history(rows, {}, "log"))
    assert found.alarms[0].says == "Step 12 moves the policy by a KL of 0.70 nats."
    few = [f for f in found.findings if f.name == "few_steps"][0]
    assert few.severity == "note" and few.says == "Only 2 steps of this log learned: steps 12 to 13."
    assert "few_steps" not in diagnose(as_history(rows[:10] + steps_of(lambda k: 0., falling), {}, "log")).names()


def test_a_reward_that_falls_in_few_steps_is_not_called_flat():
    rows = steps_of(lambda k: .01, lambda k: .1 + .002*k)
    found = [f for f in diagnose(as_history(rows, {}, "log")).findings if "reward" in f.name]
    assert [(f.name, f.severity) for f in found] == [("reward_falls", "note")]


ENTROPY = {"entropy": lambda k, e: .5 + .01*e}
FAULTS = dict(
    reward_lost={"reward": lambda k, e: (.3 + .003*k if k < 150 else 0.) + .03*e},
    constant_reward={"reward": 0., "reward_std": 0., "frac_reward_zero_std": 1.},
    nothing_moves={"reward": noise, "learning_rate": 0., "kl": 0.},
    far_reference={"reward": noise, "kl": lambda k, e: 3. + .1*e},
    entropy_rises={"reward": noise, "entropy": lambda k, e: .2 + 2.2*k/N},
    entropy_collapse={"reward": noise, "entropy": lambda k, e: .15*math.exp(-k/30)},
    cut_off={"reward": lambda k, e: .02 + .005*e, "completions/clipped_ratio": .97},
    samples_shrink={"reward": noise, "response_length/mean": lambda k, e: 300*.98**k},
    held_out_falls={"critic/score/mean": rises, "val-core/gsm8k/reward/mean@1": lambda k, e: .5 - .4*k/N + .01*e},
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plain_fault_is_named_first_and_with_what_to_change(fault):
    found = diagnose(log((ENTROPY if fault != "samples_shrink" else {}) | FAULTS[fault]))
    assert found.alarms and found.alarms[0].name == fault, as_markdown(found)
    assert found.alarms[0].change and found.alarms[0].refute


def test_a_gradient_of_zero_is_named():
    found = diagnose(log({"reward": noise, "grad_norm": 0., "loss": 0.}))
    assert found.alarms[0].name == "nothing_moves" and "No gradient reaches the weights" in found.alarms[0].cause


def test_a_constant_reward_is_not_told_to_learn_faster():
    found = diagnose(log(FAULTS["constant_reward"]))
    assert "learning rate" not in " ".join(f.change for f in found.findings)


@pytest.mark.parametrize("steps", (20, 100, 200, 300))
@pytest.mark.parametrize("shape", (rises, noise, lambda k, e: .3 - .3*k/N + .05*e))
def test_every_report_says_something_of_the_reward(steps, shape):
    said = {"reward_rises", "reward_unclear", "flat_reward", "reward_falls", "reward_lost", "constant_reward"}
    for seed in range(5):
        names = diagnose(log({"reward": shape}, steps, seed)).names()
        assert len(said & set(names)) == 1, (seed, names)


@pytest.mark.parametrize("steps", (3, 4))
def test_a_few_steps_have_no_trend(steps):
    for seed in range(5):
        found = diagnose(log({"reward": noise}, steps, seed))
        assert not {"flat_reward", "reward_falls"} & set(found.names()) and "inf]" not in as_markdown(found)


def filling(k, learns):
    return {"step": k, "lr": learns*1e-3, "updates": learns*49, "seconds": 1 + 4*learns, "grad_norm": 1.,
            "approx_kl": learns*(.1 + .0015*k), "ratio_error": 0., "entropy": 2.5 - .5*learns}


def test_a_run_that_fills_its_memory_first_is_judged_by_what_it_learned_from():
    rng = np.random.default_rng(0)
    rows = [filling(k, k >= 100) | {"expected_regret": .1 - max(0, k - 100)*5e-4 + .005*rng.standard_normal()}
            for k in range(200)]
    for n in (5, 50, 100):
        names = set(diagnose(as_history(rows[:n], {}, "log")).names())
        assert "only_collected" in names <= {"only_collected", "ratio_is_one"}
    assert alarms([row | {"updates": 49} for row in rows], {})          # as a run that learned from the first step on
    whole = diagnose(as_history(rows, {}, "log"))
    assert not whole.alarms and "reward_rises" in whole.names(), as_markdown(whole)
    assert not alarms(rows, {})                             # what the guards of a run would say
    late = [f for f in whole.findings if f.name == "reward_rises"][0]
    assert late.steps[0] == 100


def test_a_slow_gain_under_a_noise_that_lasts_is_not_called_lost():
    def lasting(seed):
        rng, x = np.random.default_rng(seed), 0.
        for k in range(N): yield .3 + .05*k/N + (x := .7*x + .05*rng.standard_normal())
    for seed in range(30):
        values = list(lasting(seed))
        assert "reward_lost" not in diagnose(log({"reward": lambda k, e, v=values: v[k]})).names(), seed


def test_a_reward_without_a_trend_is_hardly_ever_lost():
    assert not sum("reward_lost" in diagnose(log({"reward": noise}, n, seed)).names()
                   for n in (60, 300) for seed in range(40))

def test_ever_more_samples_that_are_cut_off_are_an_alarm_though_the_reward_rises():
    rows = [dict(step=i, cut_off=.005 + .4*(i/100)**2, **{"train/avg_reward": .2 + .005*i}) for i in range(100)]
    found, = diagnose(from_rows(rows)).alarms
    assert found.name == "cut_off" and "in the first 0.6%" in found.says
    few = [r | dict(cut_off=r["cut_off"]/4) for r in rows]
    assert not diagnose(from_rows(few)).alarms

def test_a_policy_that_leaves_its_start_for_nothing_diverges():
    def run_of(gain): return [{"step": i, "kl_reference": .02 + 5*(i/100)**3, "entropy": 2.,
                               "train/avg_reward": .2 + .006*min(i, 50) + gain*max(0, i - 50)} for i in range(100)]
    assert [f.name for f in diagnose(from_rows(run_of(0.))).alarms] == ["divergence"]
    assert not diagnose(from_rows(run_of(.006))).alarms


# What a reader of other people's logs found


SB3 = {"rollout/ep_rew_mean": lambda k, e: 20 + 3*e, "train/clip_fraction": lambda k, e: .45 + .02*e,
       "train/approx_kl": lambda k, e: .08 + .008*e, "train/entropy_loss": -1.6}


def test_several_updates_may_be_too_large_and_nothing_else_wrong():
    "A mean over updates cannot tell a wrong ratio from a rate that is too high: both are said, and what decides."
    found = diagnose(log(SB3)).alarms[0]
    assert found.severity == "warning" and "too large updates" in found.title
    assert "changes nothing" not in found.change and "first minibatch" in found.change and "to a third" in found.change
    sure = diagnose(log(SB3, **{"n_epochs": 1, "num_minibatches": 1})).alarms[0]
    assert sure.severity == "critical" and "too large" not in sure.title and "changes nothing" in sure.change


def test_without_a_kl_no_cause_is_made_up():
    names = {"clip_fraction": lambda k, e: .44 + .01*e, "entropy": 1.5, "reward": noise}
    found = diagnose(log(names, num_iterations=1)).alarms[0]
    assert found.title.startswith("wrong ratio") and "multiple of the log-probability" in found.change
    binding = diagnose(log({"clip_ratio": lambda k, e: .22 + .01*e, "entropy": .4, "reward": rises}))
    assert not binding.alarms, as_markdown(binding)


def test_an_entropy_under_the_name_of_a_loss_has_the_sign_of_an_entropy():
    fall = [.9*math.exp(-k/25) + .005 for k in range(N)]
    told = [diagnose(log({"actor/entropy_loss": lambda k, e, s=s: s*fall[k], "reward": noise})) for s in (1, -1)]
    for found in told:
        assert found.alarms[0].name == "entropy_collapse" and "from 0.62" in found.alarms[0].says
        assert "entropy_rises" not in found.names()


def test_few_rows_that_rise_are_not_flat():
    for values in ((.2, .4, .38, .6, .7), (.21, .33, .3, .45, .61)):
        found = diagnose(as_history([dict(step=50*k + 50, reward=x) for k, x in enumerate(values)], {}, "few"))
        assert not found.alarms and "flat_reward" not in found.names()
    level = diagnose(as_history([dict(step=50*k + 50, reward=.3 + .01*(-1)**k) for k in range(6)], {}, "few"))
    assert "flat_reward" in level.names()


def test_no_alarm_is_not_said_where_no_learning_is_shown():
    assert diagnose(log(dict(reward=noise), steps=60)).summary == "No alarm, and no learning is shown."
    assert diagnose(log(dict(reward=rises))).summary == "No alarm."


def test_a_spread_of_nothing_is_named_before_the_learning_rate():
    names = dict(reward=lambda k, e: .3 + .001*e, reward_std=0., kl=lambda k, e: 1e-6, grad_norm=1e-4)
    found = diagnose(log(names))
    assert found.alarms[0].name == "no_spread" and found.alarms[0].severity == "critical"
    assert diagnose(log(names | dict(reward_std=lambda k, e: .2 + .01*e))).alarms[0].name == "lr_too_low"


def test_a_negative_kl_is_no_small_step():
    names = {"objective/kl": lambda k, e: -8*k/N + .01*e, "reward": noise, "entropy": 1.}
    found = diagnose(log(names))
    assert "negative_kl" in [f.name for f in found.alarms] and "lr_too_low" not in found.names()
    few = diagnose(log(names | {"objective/kl": lambda k, e: .0005 + .001*e, "reward": rises}))
    assert not few.alarms                                     # an unbiased estimate is below 0 now and then


def test_a_ratio_of_whole_sequences_is_no_gap_between_two_programs():
    names = VLLM | {"sampling/sampling_logp_difference/mean": .012, "sampling/importance_sampling_ratio/mean": .9}
    found = diagnose(log(names))
    assert not found.alarms and "usual_gap" in found.names()


def test_certainty_that_was_earned_is_no_fault():
    solved = {"reward": lambda k, e: min(1., max(0., .98 - .78*math.exp(-k/20) + .005*e)),
              "frac_reward_zero_std": lambda k, e: .2 + .75*(1 - math.exp(-k/20)), "entropy": lambda k, e: .5 - .002*k}
    assert not diagnose(log(solved)).alarms
    level = {"reward": lambda k, e: .35 + .43*(1 - math.exp(-k/30)) + .02*e,
             "kl": lambda k, e: .05 - .05*math.exp(-k/50), "entropy": lambda k, e: .06 + .24*math.exp(-k/40)}
    found = diagnose(log(level))
    assert "entropy_collapse" not in [f.name for f in found.alarms if f.severity == "critical"], as_markdown(found)


def test_a_loss_that_is_mostly_a_penalty_diverges_nowhere_while_the_reward_rises():
    names = dict(loss=lambda k, e: 1e-5*1.05**k, reward=rises)
    assert not diagnose(log(names)).alarms
    assert diagnose(log(names | dict(reward=noise))).alarms[0].name == "divergence"


def test_longer_samples_take_longer():
    grows = {"completions/mean_length": lambda k, e: 300 + 6*k, "step_time": lambda k, e: (300 + 6*k)/50 + .1*abs(e),
             "reward": rises}
    assert not diagnose(log(grows)).alarms
    assert diagnose(log(grows | {"completions/mean_length": 300.})).alarms[0].name == "throughput_falls"


def test_a_reward_that_never_was_a_number_is_told():
    found = diagnose(log(dict(reward=math.nan, entropy=lambda k, e: 1 - .001*k, grad_norm=1.)))
    assert found.alarms[0].name == "not_a_number" and "train/avg_reward" in found.alarms[0].says


def test_large_advantages_that_do_not_grow_and_teach_are_no_explosion():
    names = {"advantages/std": lambda k, e: 18 + .2*e, "reward": rises}
    assert not diagnose(log(names)).alarms
    assert diagnose(log(names | {"advantages/std": lambda k, e: 2*1.02**k})).alarms[0].name == "advantage_explodes"


def test_a_clip_that_binds_is_no_ratio_of_one():
    names = {"actor/ppo_kl": lambda k, e: 5e-5, "actor/pg_clipfrac": .002, "reward": rises}
    assert "ratio_is_one" not in diagnose(log(names)).names()


def test_a_known_last_part_of_a_name_is_what_it_says():
    rows = [{"step": k, "grpo/reward": .1 + .01*(k % 3), "grpo/entropy": 1 - .03*k} for k in range(30)]
    with pytest.raises(HistoryError, match="entropy=grpo/entropy") as told: as_history(rows, {}, "prefix")
    assert "grad_entropy" not in str(told.value) and "reward=grpo/reward" in str(told.value)
    nested = rows_in([{"step": k, "metrics": {"train": {"reward": .1*k, "entropy": 1.}}} for k in range(9)])
    with pytest.raises(HistoryError, match="reward=metrics/train/reward"): as_history(nested)
