"""One rank of a run: started by `lga-run`, or by torchrun with `-m runtime PLAN MODEL`."""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import click

from planner.console import HELP, check_can_write
from planner.errors import LgaError, UsageError
from planner.model_file import raised_at
from runtime.failure import LAUNCHED_BY_LGA_RUN, FailureReport, end_process
from runtime.inputs import check_machine, load_inputs
from runtime.main import run_rank
from runtime.options import RunOptions, run_arguments, run_options


@click.command(name="python -m runtime", context_settings=HELP)
@run_arguments
@run_options
def main(plan_path: Path, model_path: str, **options: Any) -> None:
    """Run one rank of PLAN on MODEL. The launcher sets RANK, WORLD_SIZE and MASTER_ADDR."""
    chosen = RunOptions(**options)
    try:
        plan, model_file = load_inputs(plan_path, model_path)
        check_machine(plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        outputs = {"--save": chosen.save_path, "--timeline": chosen.timeline_path}
        for option, path in outputs.items():
            if path is not None and os.environ.get("RANK", "0") == "0":  # which writes it
                check_can_write(path, option, [plan_path, model_file.path])
        run_rank(chosen.adjust(plan), model_file, chosen)
    except UsageError as error:
        # The ranks of a host find the same: one says so, the others speak only if it does not.
        # lga-run itself says once what all have found.
        if LAUNCHED_BY_LGA_RUN not in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(2.0)
        end_process(FailureReport.of(error))
    except (LgaError, SystemExit) as error:
        end_process(FailureReport.of(error))
    except KeyboardInterrupt:
        sys.stderr.flush()
        os._exit(130)
    except BaseException as error:
        if not raised_at(error):  # not in the user's code: a defect, which the frames locate
            traceback.print_exception(error)
        end_process(FailureReport.of(error))


if __name__ == "__main__":
    main()
