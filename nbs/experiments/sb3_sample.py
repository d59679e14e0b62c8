"""Logs of a third trainer: makes `nbs/data/sb3_usual.csv`, `sb3_high.csv`, `sb3_third.csv` and `sb3_seeds.csv`.

    pip install stable-baselines3          # 2.9 made the stored files; nothing else is downloaded
    python nbs/experiments/sb3_sample.py   # two CPU cores, about two minutes

PPO of Stable-Baselines3 balances a pole on a cart: with the usual learning rate, with a hundred times that, and with
a third of the latter, as the doctor asks for. Nothing else differs. The first three files are the `progress.csv` of
seed 0, as the trainer wrote it; the last one has the mean reward at the end of four seeds each."""

import csv
import multiprocessing
import shutil
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "data"
RATES = dict(usual=3e-4, high=3e-2, third=1e-2)


def train(name, seed):
    "80 iterations of 1,024 steps each, ten epochs over each of them; the mean reward at the end."
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    env, sizes = make_vec_env("CartPole-v1", 8, seed=seed), dict(n_steps=128, batch_size=256, n_epochs=10)
    run = PPO("MlpPolicy", env, learning_rate=RATES[name], seed=seed, device="cpu", **sizes)
    with tempfile.TemporaryDirectory() as folder:
        run.set_logger(configure(folder, ["csv"]))
        run.learn(80_000, log_interval=1)
        run.logger.close()
        log = Path(folder) / "progress.csv"
        if seed == 0:
            shutil.copy(log, OUT / f"sb3_{name}.csv")
        return list(csv.DictReader(log.open()))[-1]["rollout/ep_rew_mean"]


if __name__ == "__main__":
    asked = [(name, seed) for name in RATES for seed in range(4)]
    with multiprocessing.Pool(2) as pool, (OUT / "sb3_seeds.csv").open("w", newline="") as f:
        ends = pool.starmap(train, asked, 1)
        csv.writer(f).writerows([("run", "seed", "reward"), *((*a, end) for a, end in zip(asked, ends))])
