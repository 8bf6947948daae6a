"""How the training process is started: alone, or several of them through accelerate, on one machine or more.

On more machines every one sees the first one's HOMESTILL_HOME at the same path, and has HOMESTILL_LAUNCH set
to accelerate's words: `--num_machines 2 --num_processes 16 --main_process_ip 10.0.0.1 --main_process_port
29500 --machine_rank 0`, the rank counted up. The first runs the task; each of the others joins it with
`python -m trainer.training.launch RUN/train`, at any time before the training begins.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainer import child, process

LAUNCH = "HOMESTILL_LAUNCH"
"""Further words for `accelerate launch`: machines, their addresses, a configuration file."""

MODULE = "trainer.training.loop"

SUMMARY = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic/", re.MULTILINE)
"""How torchrun begins to say which of its processes failed."""


def processes(wanted: int | Literal["auto"], environment: Mapping[str, str]) -> int:
    """Training processes on this machine; `auto` counts the GPUs that the environment lets us see."""
    if wanted != "auto":
        return wanted
    code = "import torch; print(torch.cuda.device_count())"
    counted = process.run([sys.executable, "-c", code], timeout=600, environment=environment)
    return max(1, int(counted.last_line)) if counted.code == 0 else 1


def environment(parent: Mapping[str, str], count: int | Literal["auto"]) -> dict[str, str]:
    """What the training process gets: one GPU for one process, every visible one for several."""
    given = child.environment(parent)
    if count == 1 and not parent.get(LAUNCH):
        return given
    shown = parent.get("CUDA_VISIBLE_DEVICES")
    del given["CUDA_VISIBLE_DEVICES"]
    return given if shown is None else given | {"CUDA_VISIBLE_DEVICES": shown}


def words(spec: Path, count: int, parent: Mapping[str, str]) -> list[str]:
    """The argument list that trains what `spec` says.

    Args:
        count: processes on this machine; more than one, or HOMESTILL_LAUNCH, goes through accelerate.
    """
    further = shlex.split(parent.get(LAUNCH, ""))
    if count == 1 and not further:
        return process.module(MODULE, spec)
    alone = ["--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    options = ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", *(further or alone)]
    return process.module("accelerate.commands.launch", *options, "-m", MODULE, spec)


def reason(output: str) -> str:
    """The line of a failed training's output that says why: the last one before torchrun sums up."""
    return process.Done([], 1, SUMMARY.split(output, maxsplit=1)[0]).last_line


def join(stage: Path, parent: Mapping[str, str], every: float = 5.0) -> int:
    """On a further machine: wait until the first one's training begins, and train along to its end.

    Args:
        stage: the run's train folder, which the machines share.
        parent: with HOMESTILL_LAUNCH.
        every: seconds between two looks.

    Returns:
        The exit code of what was started; 0 where the training was over already.
    """
    work = stage / "work"
    while not (work / "spec.json").exists():
        if (stage / "summary.json").exists():
            return 0
        time.sleep(every)
    return child.run(
        words(work / "spec.json", 1, parent),
        folder=work,
        log=stage / f"train.{socket.gethostname()}.log",
        environment=environment(parent, "auto"),
    )


def main() -> None:
    if not os.environ.get(LAUNCH):
        sys.exit(
            f"{LAUNCH} is not set; give it the words for accelerate that the first machine has, --machine_rank apart"
        )
    sys.exit(join(Path(sys.argv[1]).resolve(), os.environ))


if __name__ == "__main__":
    main()
