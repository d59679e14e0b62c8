"""What is done to the commands, and whether they hold: the table of benchmarks/README.md, section 7.

    python benchmarks/faults.py                     all parts at their full numbers: hours
    python benchmarks/faults.py kills flips         some of them
    python benchmarks/faults.py --share 0.01        each with a hundredth of its attacks

Every part makes its attacks in forked children or on copies, below a temporary folder, and compares with a run that
nobody disturbed. The results go to benchmarks/faults.json, and the table is printed. Exit status 1 if anything did
not hold.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "benchmarks")]
from attacks import PARTS, Tally  # noqa: E402
from attacks.common import LIMITS  # noqa: E402

RESULTS = TOP / "benchmarks/faults.json"


def attack(name, share):
    "One part: its row of the table."
    part, folder, tally, begun = PARTS[name], tempfile.mkdtemp(prefix="faults-"), Tally(), time.monotonic()
    n, LIMITS["slowest"] = max(1, round(part.n * share)), 0.
    import grpo_chess.arena  # noqa: F401
    import grpo_chess.pretrain  # noqa: F401
    import grpo_chess.train  # noqa: F401  # once, and not in each of some thousand children
    print(f"{name}: {part.what}, {n} asked", flush=True)
    part.make(tally, Path(folder), n)
    minutes = (time.monotonic() - begun) / 60
    return dict(what=part.what, must=part.must, made=tally.made, failed=len(tally.failed), said=tally.said,
                minutes=round(minutes, 1))


def table(rows):
    "Markdown of the results."
    lines = ["| part | tried | attacks | not held | must hold | what was seen |", "|---|---|---|---|---|---|"]
    for name, r in rows.items():
        said = "; ".join(f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in r["said"].items())
        lines.append(f"| `{name}` | {r['what']} | {r['made']:,} | {r['failed']} | {r['must']} | {said} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1., help="of the full number of attacks")
    parser.add_argument("--keep", action="store_true", help="write the results to benchmarks/faults.json")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    rows = {}
    for name in args.parts or PARTS:
        rows[name] = attack(name, args.share)
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
        if args.keep:
            kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            kept = {k: (kept | {name: rows[name]})[k] for k in PARTS if k in kept or k == name}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(rows))
    return any(r["failed"] for r in rows.values())


if __name__ == "__main__":
    sys.exit(main())
