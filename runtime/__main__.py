"""One rank of a run: started by `lga-run`, or by torchrun with `-m runtime PLAN MODEL`."""

import os
from pathlib import Path
from typing import Any

import click

from planner.console import HELP, check_can_write
from runtime.ending import last_words
from runtime.inputs import check_machine, load_inputs
from runtime.main import run_rank
from runtime.options import RunOptions, run_arguments, run_options


@click.command(name="python -m runtime", context_settings=HELP)
@run_arguments
@run_options
def main(plan_path: Path, model_path: str, **options: Any) -> None:
    """Run one rank of PLAN on MODEL. The launcher sets RANK, WORLD_SIZE and MASTER_ADDR."""
    chosen = RunOptions(**options)
    with last_words():
        plan, model_file = load_inputs(plan_path, model_path)
        check_machine(plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        outputs = {"--save": chosen.save_path, "--timeline": chosen.timeline_path}
        for option, path in outputs.items():
            if path is not None and os.environ.get("RANK", "0") == "0":  # which writes it
                check_can_write(path, option, [plan_path, model_file.path])
        run_rank(chosen.adjust(plan), model_file, chosen)


if __name__ == "__main__":
    main()
