"""Claims behind plans, one command each, measured on the bundled model.

    python -m benchmarks.compression_checks guard         the guard of super experts, on and off
    python -m benchmarks.compression_checks stun          experts first, then Wanda, against Wanda alone
    python -m benchmarks.compression_checks copies        copied experts are found, and merging them is free
    python -m benchmarks.compression_checks allocation    how many experts each layer loses, or which: what counts
    python -m benchmarks.compression_checks layer-error   set search's predicted layer error against the measured one

Plans are made from the first half of each domain's documents and measured on the second. The model is small, and its
experts specialise by domain more than those of a large model.
"""

from __future__ import annotations

import argparse
import importlib
import time

CHECKS = {
    "guard": "the guard of super experts, on and off, also on a model into which they were planted",
    "stun": "experts first, then Wanda, against Wanda alone with as many weights left",
    "copies": "copied experts are found, and merging them is free where the router stays",
    "allocation": "how many experts each layer loses, or which: what the default plan's gain comes from",
    "layer-error": "the layer error that set search predicts against the one that masking has",
}


def main() -> None:
    """Run one check, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="check", required=True)
    for name, text in CHECKS.items():
        commands.add_parser(name, help=text, description=text)
    chosen = parser.parse_args().check
    began = time.monotonic()
    importlib.import_module(f"benchmarks.checks.{chosen.replace('-', '_')}").check()
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
