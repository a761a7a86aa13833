#!/usr/bin/env bash
# Everything that needs a GPU, in stages, without a network and without installing anything:
#   OUT=results CARRY=.carry/packages.tar.gz benchmarks/gpu_all.sh [tests] [kernels] [train] [script]      default: the first three
# CARRY (optional): an archive made by benchmarks/carry.sh. Results and logs go to OUT, which must exist.
# Limits in seconds: TESTS_LIMIT, KERNELS_LIMIT, TRAIN_LIMIT, SCRIPT_LIMIT. More arguments: TESTS, KERNELS_ARGS, TRAIN_ARGS,
# TRAIN_ARMS. SCRIPT: a shell script of one's own, run with what the others run with.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to an existing folder for results}"
OUT=$(cd "$OUT" && pwd)
python=${PYTHON:-python3}
stages=${*:-tests kernels train}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The checkout's folders kernels/, quant/ ... must not be importable by these names: a tree of links is, and -P keeps the
# working directory out.
mkdir -p "$work/tree/weft"
ln -s "$PWD"/weft/* "$work/tree/weft/"
for folder in rewrite passes kernels quant; do ln -s "$PWD/$folder" "$work/tree/weft/$folder"; done
ln -s "$PWD/benchmarks" "$work/tree/benchmarks"
path=$work/tree
if [ -n "${CARRY:-}" ]; then
  mkdir "$work/carried" && tar -xzf "$CARRY" -C "$work/carried" || exit 1
  path=$path:$work/carried/site
  PYTHONPATH=$path $python -P -c 'import pytest, hypothesis, xdist' 2>/dev/null || path=$path:$work/carried/fallback
fi
export PYTHONPATH=$path PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export UNSLOTH_DISABLE_STATISTICS=1 UNSLOTH_COMPILE_LOCATION=$work/unsloth_compiled

$python - <<'PYTHON' 2>&1 | tee "$OUT/setup.log"
import importlib.metadata, importlib.util, torch
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
for name in "torch triton transformers peft bitsandbytes unsloth liger_kernel trl datasets pytest hypothesis".split():
    found = importlib.util.find_spec(name)
    print(f"{name:14}", f"{importlib.metadata.version(name):14} {found.origin}" if found else "MISSING")
import weft
print(f"{'weft':14} {weft.__file__}")
PYTHON

failed=""
stage() { # stage NAME LIMIT COMMAND...
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: exit status $status after $((SECONDS - started)) s"
  [ "$status" = 0 ] || failed="$failed $name"
}

for name in $stages; do
  case $name in
    tests) stage tests "${TESTS_LIMIT:-240}" $python -m pytest -q -p no:cacheprovider ${TESTS:--m gpu} ;;
    kernels) stage kernels "${KERNELS_LIMIT:-300}" $python -m benchmarks.kernels --out "$OUT/kernels.json" ${KERNELS_ARGS:-} ;;
    train) stage train "${TRAIN_LIMIT:-500}" $python -m benchmarks.train_step --out "$OUT/train.json" \
      --interleave ${TRAIN_ARMS:-hf regional weft unsloth liger} ${TRAIN_ARGS:-} ;;
    script) stage script "${SCRIPT_LIMIT:-500}" bash "${SCRIPT:?}" ;;
    *) echo "unknown stage $name" >&2; failed="$failed $name" ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
