"""Records the names and defaults of TRL's `GRPOConfig`: what tests/fastgrpo/test_trl_settings.py walks over.

make install-bench
.venv-bench/bin/python bench/record_trl_settings.py
"""

import fastgrpo.profile.sides.trl_on_cpu  # noqa: F401  isort: skip

import argparse
import json
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

import transformers
import trl

OUT = Path(__file__).parents[1] / "tests" / "fastgrpo" / "recordings" / "trl_grpo_config.json"


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(trl.GRPOConfig)
    }
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in defaults.items()}
    found = {"trl": trl.__version__, "transformers": transformers.__version__, "defaults": plain}
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(plain)} settings of TRL {trl.__version__}: {out}")


if __name__ == "__main__":
    main()
