"""What each process of a launch runs: several training runs, one after another, in the processes of one launch.

    python -m torch.distributed.run --standalone --nproc-per-node 2 distributed_cases.py CASES.json

CASES.json is a list of settings of ``TrainConfig``; a case that fails ends the launch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def config_of(settings: dict[str, Any]) -> Any:
    """The settings of a run from plain JSON."""
    from tailcache.trainers.config import StudentConfig, TrainConfig

    student = {**settings["student"]}
    if "lora_targets" in student:
        student["lora_targets"] = tuple(student["lora_targets"])
    paths = {name: Path(settings[name]) for name in ("cache", "out")}
    return TrainConfig(**{**settings, **paths, "student": StudentConfig(**student)})


def kill(folder: Path) -> None:
    """SIGKILL to every process of a launch; torchrun ends by itself when those it has started have."""
    for path in folder.glob("pid-*"):
        os.kill(int(path.read_text()), signal.SIGKILL)


def launch(cases: list[dict[str, Any]], folder: Path, *, num_processes: int = 2) -> subprocess.Popen[str]:
    """Start the cases; output goes to FOLDER/log, the processes' ids to FOLDER/pid-RANK."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, str(TESTS / "distributed_cases.py"), str(folder / "cases.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=log,
            text=True,
        )


def main() -> None:
    """Run all cases; the process group is shared by them and ends with them."""
    from tailcache.trainers.run import train

    cases = Path(sys.argv[1])
    (cases.parent / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    for settings in json.loads(cases.read_text()):
        print("case", settings["out"], flush=True)
        train(config_of(settings))


if __name__ == "__main__":
    main()
