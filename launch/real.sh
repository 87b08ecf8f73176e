#!/usr/bin/env bash
# A real model on real problems, nothing else needed: SmolLM2-135M-Instruct is fetched and converted, ten of its thirty
# layers are distilled from it on GSM8K, by the four objectives and a mix. The same command goes on where it was stopped.
#   launch/real.sh [--device cpu|gpu] [--train NAME_OR_FILE] [--test NAME_OR_FILE]
# Problems are openai/gsm8k from the hub; without a network name your copy: --train openai/gsm8k=FOLDER, or a file with
# columns prompt and answer. Everything is written to runs/real, the model to ~/.cache/kdjax (XDG_CACHE_HOME).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
usage="usage: launch/real.sh [--device cpu|gpu] [--train NAME_OR_FILE] [--test NAME_OR_FILE]"

device=cpu train=openai/gsm8k test=openai/gsm8k
while (($# > 0)); do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --device | --train | --test) [ -n "${2-}" ] || mistake "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
case "$device" in
  cpu) config=configs/real/smollm2.py study=runs/real/smollm2 extras=real problems=48; export JAX_PLATFORMS=cpu ;;
  gpu) command -v nvidia-smi >/dev/null || mistake "--device gpu: no NVIDIA driver is here (nvidia-smi is not found)"
    config=configs/real/smollm2_gpu.py study=runs/real/smollm2_gpu extras=real,cuda problems=512 ;;
  *) mistake "--device is cpu or gpu, got $device" ;;
esac
install "$extras"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/cache/xla}"
mkdir -p runs/real

.venv/bin/python - "$train" "$test" "$problems" <<'PY'  # the problems as files, of the test the first ones
import json, sys
from pathlib import Path
from kdjax.data.sources.load import load
from kdjax.errors import KdjaxError

train, test, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    written = {}
    for name, text, use in (("train", train, "train"), (f"test_{most}", test, "test")):
        found = load(text, (), use)
        rows = [found.problem(i) for i in range(found.size if use == "train" else min(found.size, most))]
        lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
        written[f"runs/real/{name}.jsonl"] = "\n".join(lines) + "\n"
    for path, text in written.items():  # once both are good
        Path(f"{path}.partial").write_text(text)
        Path(f"{path}.partial").replace(path)
except (KdjaxError, OSError) as error:
    print(f"kdjax: {error}", file=sys.stderr)
    sys.exit(getattr(error, "exit_code", 74))
PY

install_torch || true  # a model that was made before needs none
model="$(.venv/bin/python launch/smollm2.py)"
ln -sfn "$model" runs/real/teacher
[ -e runs/real/student ] || .venv/bin/kdjax init-student runs/real/teacher runs/real/student --layers 10
.venv/bin/kdjax study "$config"

.venv/bin/python - "$study" <<'PY'  # E log p(teacher) of the student's own words is -(entropy + KL(s||t)), exactly
import json, sys

print("\n| model | log-likelihood of its own words by the teacher, nats a token | its entropy |\n| --- | --- | --- |")
for line in json.load(open(f"{sys.argv[1]}/table.json")):
    if line["seed"] == "all" and line["reverse_kl"] is not None:
        print(f"| {line['cell']} | {-line['entropy'] - line['reverse_kl']:.3f} | {line['entropy']:.3f} |")
PY
