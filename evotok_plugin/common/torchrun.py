"""Run torchrun and exit as its processes do: with their exit code, or 143 after SIGTERM and 130 after Ctrl-C.

torchrun itself would end with a traceback, and would end on SIGHUP also under `nohup`.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    for variable in ("PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):  # of newer and of older versions
        os.environ.setdefault(variable, "SIGTERM,SIGINT,SIGQUIT")
try:
    main()
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
except ChildFailedError as failed:
    _, failure = failed.get_first_failure()
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
