"""The control of `learning`: supervised training from the same weak start, on as many positions as those runs
valued, each once, by the same depth. Writes data/supervised.csv.

python -m grpo_chess.pretrain label --positions 350000 --depth 1 --seed 1 --out labels     # a seed that the weak
start has not seen
python nbs/experiments/supervised.py labels DIR                                        # weights of the three seeds
stay in DIR, for matches
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from run import HERE, TOP, loses, number, read, write
from grpo_chess.measures import read_labels

BATCH = 256


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(". ")[0])
    parser.add_argument("labels")
    parser.add_argument("out", help="folder for the weights")
    labels, out = vars(parser.parse_args()).values()
    Path(out).mkdir(parents=True, exist_ok=True)
    budget = np.mean(
        [
            int(r["judged"])
            for r in read(HERE / "data/learning_curve.csv")
            if r["arm"] == "weak start" and r["step"] == "600"
        ]
    )
    held, start, rows = read_labels(HERE.parent / "data/heldout.jsonl"), HERE.parent / "data/start.safetensors", []
    for seed in range(3):
        weights = Path(out) / f"supervised {seed}.safetensors"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpo_chess.pretrain",
                "train",
                f"--init={start}",
                f"--labels={labels}",
                f"--steps={round(budget / BATCH)}",
                f"--batch={BATCH}",
                "--mirror=True",
                f"--seed={seed}",
                f"--out={weights}",
            ],
            cwd=TOP,
            check=True,
        )
        with safe_open(weights, "pt") as f:
            minutes = json.loads(f.metadata()["measured"])["minutes"]
        rows.append(
            dict(
                seed=seed,
                positions=round(budget / BATCH) * BATCH,
                minutes=number(minutes),
                **{
                    f"{how}_{when}": number(r.mean)
                    for when, file in (("before", start), ("after", weights))
                    for how, r in loses(file, held).items()
                },
            )
        )
        print(rows[-1], flush=True)
    write(HERE / "data/supervised.csv", rows)


if __name__ == "__main__":
    main()
