#!/usr/bin/env bash
# A real model on real problems, nothing else needed: SmolLM2-135M-Instruct is fetched and converted, ten of its thirty
# layers are distilled from it on GSM8K, by the four objectives and a mix. The same command goes on where it was stopped.
#   launch/real.sh [--device cpu|gpu] [--train NAME_OR_FILE] [--test NAME_OR_FILE]
# Problems are openai/gsm8k from the hub; without a network name your copy: --train openai/gsm8k=FOLDER, or any file that
# `kdjax data check` takes. Everything is written to runs/real, the model to ~/.cache/kdjax (XDG_CACHE_HOME).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
usage="usage: launch/real.sh [--device cpu|gpu] [--train NAME_OR_FILE] [--test NAME_OR_FILE]"

device=cpu train=openai/gsm8k test=openai/gsm8k
while (($# > 0)); do
  case "$1" in
    -h | --help) echo "$usage"; exit ;;
    --device | --train | --test) (($# > 1)) || mistake "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
    *) mistake "unknown option $1; $usage" ;;
  esac
done
case "$device" in
  cpu) config=configs/real/smollm2.py study=runs/real/smollm2 extras=real problems=48; export JAX_PLATFORMS=cpu ;;
  gpu) config=configs/real/smollm2_gpu.py study=runs/real/smollm2_gpu extras=real,cuda problems=512 ;;
  *) mistake "--device is cpu or gpu, got $device" ;;
esac
install "$extras"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/cache/xla}"
mkdir -p runs/real

install_torch || true  # a model that was made before needs none
model="$(.venv/bin/python launch/smollm2.py)"
ln -sfn "$model" runs/real/teacher
[ -e runs/real/student ] || .venv/bin/kdjax init-student runs/real/teacher runs/real/student --layers 10

.venv/bin/python - "$train" "$test" "$problems" <<'PY'  # the problems as files, of the test the first ones
import json, sys
from pathlib import Path
from kdjax.data.sources.load import load
from kdjax.errors import KdjaxError

try:
    for use, text, most in (("train", sys.argv[1], None), ("test", sys.argv[2], int(sys.argv[3]))):
        found = load(text, (), use)
        rows = [found.problem(i) for i in range(min(found.size, most or found.size))]
        lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
        Path(f"runs/real/{use}.jsonl").write_text("\n".join(lines) + "\n")
except KdjaxError as error:
    print(f"kdjax: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
PY
.venv/bin/kdjax study "$config"

.venv/bin/python - "$study" <<'PY'  # E log p(teacher) of the student's own words is -(entropy + KL(s||t)), exactly
import json, sys

print("\n| model | log-likelihood of its own words by the teacher, nats a token | its entropy |\n| --- | --- | --- |")
for line in json.load(open(f"{sys.argv[1]}/table.json")):
    if line["seed"] == "all" and line["reverse_kl"] is not None:
        print(f"| {line['cell']} | {-line['entropy'] - line['reverse_kl']:.3f} | {line['entropy']:.3f} |")
PY
