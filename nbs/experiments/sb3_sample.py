"""Logs of a third trainer: makes `nbs/data/sb3_usual.csv`, `sb3_high.csv` and `sb3_third.csv`.

    pip install stable-baselines3          # 2.9 made the stored files; nothing else is downloaded
    python nbs/experiments/sb3_sample.py   # one CPU core, about a minute

PPO of Stable-Baselines3 balances a pole on a cart: with the usual learning rate, with a hundred times that, and with
a third of the latter, as the doctor asks for. Nothing else differs. The files are the `progress.csv` of each run, as
the trainer wrote it."""

import shutil
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "data"


def train(name, rate):
    "80 iterations of 1,024 steps each, ten epochs over each of them."
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    env = make_vec_env("CartPole-v1", 8, seed=0)
    run = PPO("MlpPolicy", env, learning_rate=rate, n_steps=128, batch_size=256, n_epochs=10, seed=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        run.set_logger(configure(folder, ["csv"]))
        run.learn(80_000, log_interval=1)
        run.logger.close()
        shutil.copy(Path(folder) / "progress.csv", OUT / f"sb3_{name}.csv")


if __name__ == "__main__":
    for name, rate in dict(usual=3e-4, high=3e-2, third=1e-2).items():
        train(name, rate)
