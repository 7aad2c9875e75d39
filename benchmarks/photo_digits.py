"""Does E-SimCLR beat SimCLR and the random backbone on photo-digits? The demo over several seeds, as a record.

    python benchmarks/photo_digits.py [--seeds 0 1 2] [--out runs/photo-digits-seeds]

Runs that are finished in --out are reused; the times in the record are those of their training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import machine_facts, spread, write_record

from fast_essl.config_io import find_config
from fast_essl.demo import METHODS, DemoOptions, run_demo


def main() -> None:
    """Run the demo for each seed and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/photo-digits-seeds"))
    arguments = parser.parse_args()
    facts = machine_facts()
    demos = [run_demo(DemoOptions(seed=seed, out=arguments.out / str(seed))) for seed in arguments.seeds]

    by_method = {name: [demo["results"][name] for demo in demos] for name in ("random", *METHODS)}
    results = {
        name: {key: spread([run[key] for run in runs]) for key in runs[0]} for name, runs in by_method.items()
    }
    margins = {
        other: spread(
            [
                100 * (ours["knn_top1"] - theirs["knn_top1"])
                for ours, theirs in zip(by_method["e_simclr"], by_method[other], strict=True)
            ]
        )
        for other in ("random", "simclr")
    }
    recipes = {name: find_config(Path(f"{name}_photo_digits")).read_text("utf-8") for name in METHODS}
    path = write_record(
        "photo-digits",
        {
            "seeds": arguments.seeds,
            "by_method": results,
            "knn_points_of_e_simclr_over": margins,
            "demo_elapsed_s": spread([demo["elapsed_s"] for demo in demos]),
            "recipes": recipes,
        },
        facts=facts,
    )
    for other, margin in margins.items():
        print(
            f"E-SimCLR over {other}: {margin['mean']:+.1f} ± {margin['stdev']:.1f} points of kNN, n = {margin['n']}"
        )
    print(path)


if __name__ == "__main__":
    main()
