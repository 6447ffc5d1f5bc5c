"""What slurm/node.sh starts on each node: torchrun, which tells how a rank was killed in one line instead of two pages."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from llama.run_folder import LastWords, RunFolder


def main() -> None:
    """Run torchrun with the arguments of this command; its exit code is that of the first rank to fail."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    config, program, arguments = config_from_args(parse_args(sys.argv[1:]))
    try:
        elastic_launch(config, program)(*arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode < 0:
            killed(rank, signal.Signals(-first.exitcode).name)
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))


def killed(rank: int, name: str) -> None:
    """Say and write down that a rank of this node was killed, which it could not do itself."""
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    hint = " (the node ran out of memory?)" if name == "SIGKILL" else ""
    text = f"rank {rank} on {node} was killed by {name}{hint}"
    print(f"herd: {text}", file=sys.stderr, flush=True)
    if "HERD_RUN" in os.environ:
        run, attempt = RunFolder(Path(os.environ["HERD_RUN"])), int(os.environ["HERD_ATTEMPT"])
        run.leave_word(attempt, LastWords("killed", text, rank, node))


if __name__ == "__main__":
    main()
