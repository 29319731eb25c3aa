"""How a rank's process ends when its work fails: last words, and the exit code.

Knows the kinds of error. Does not know what the rank was doing.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from planner.errors import LgaError, UsageError
from planner.model_file import raised_at
from runtime.failure import LAUNCHED_BY_LGA_RUN, FailureReport, end_process

__all__ = ["last_words"]


@contextmanager
def last_words() -> Iterator[None]:
    """Turn whatever ends the block early into words on standard error and an exit code."""
    try:
        yield
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
