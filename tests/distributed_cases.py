"""What each process of a launch runs: several training runs, one after another, in the processes of one launch.

    accelerate launch --config_file fsdp.yaml distributed_cases.py CASES.json

CASES.json is a list of settings of ``TrainConfig``; a case that fails ends the launch. What accelerate's file says of
FSDP holds for cases with ``from_file``; the others are as under torchrun, which accelerate starts the processes with.
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
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""


def config_of(settings: dict[str, Any]) -> Any:
    """The settings of a run from plain JSON."""
    from tailcache.trainers.config import StudentConfig, TrainConfig

    student = {**settings["student"]}
    if "lora_targets" in student:
        student["lora_targets"] = tuple(student["lora_targets"])
    paths = {name: Path(settings[name]) for name in ("cache", "out")}
    several: dict[str, Any] = {
        name: tuple(settings[name]) for name in ("teachers", "teacher_weights") if name in settings
    }
    return TrainConfig(**{**settings, **paths, **several, "student": StudentConfig(**student)})


def kill(folder: Path) -> None:
    """SIGKILL to every process of a launch; the launcher ends by itself when those it has started have."""
    for path in folder.glob("pid-*"):
        os.kill(int(path.read_text()), signal.SIGKILL)


def launch(cases: list[dict[str, Any]], folder: Path) -> subprocess.Popen[str]:
    """Start the cases; output goes to FOLDER/log, the processes' ids to FOLDER/pid-RANK."""
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "fsdp.yaml").write_text(ACCELERATE)
    command = ["accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml")]
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
    file = {
        name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))
    }
    for settings in json.loads(cases.read_text()):
        print("case", settings["out"], flush=True)
        from_file = settings.pop("from_file", False)
        os.environ.update(file if from_file else {})
        train(config_of(settings))
        for name in file:
            os.environ.pop(name, None)


if __name__ == "__main__":
    main()
