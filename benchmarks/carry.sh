#!/usr/bin/env bash
# Packs what the benchmarks need, and a GPU machine without a network may lack, into one archive:
#   benchmarks/carry.sh [ARCHIVE]          default .carry/packages.tar.gz
# site/ holds the peers and bitsandbytes; fallback/ holds the test tools, used only where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
archive=${1:-.carry/packages.tar.gz}
wheels=.work/wheels
python=${PYTHON:-python3}

site=(
  bitsandbytes==0.50.2 liger-kernel==0.8.5
  unsloth==2026.10.9 unsloth_zoo==2026.10.9 cut-cross-entropy==25.1.1 tyro==1.0.17 typeguard==4.6.0
  docstring-parser==0.18.0 msgspec==0.22.0
  # unsloth 2026.10.9 wants trl <= 1.15.0 and datasets < 5
  trl==1.15.0 datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19
)
fallback=(
  pytest==9.2.0 pluggy==1.7.0 iniconfig==2.3.1 pytest-xdist==3.8.0 execnet==2.1.2
  hypothesis==6.170.15 sortedcontainers==2.4.0
)

fetch() { # fetch FOLDER REQUIREMENT...
  local folder=$1
  shift
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels/$folder" \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 "$@"
}

unpack() { # unpack FOLDER TARGET: the CUDA 13 library of bitsandbytes is the only one that torch +cu130 loads
  mkdir -p "$2"
  "$python" - "$wheels/$1" "$2" <<'PYTHON'
import pathlib, re, sys, zipfile
dropped = re.compile(r"^(studio|unsloth_cli|unsloth_zoo/mlx/tests)/|libbitsandbytes_(?!cuda130|cpu)|\.(exe|html|js|png)$")
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sys.argv[2], [name for name in archive.namelist() if not dropped.search(name)])
PYTHON
}

rm -rf "$wheels"
fetch site "${site[@]}"
fetch fallback "${fallback[@]}"
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
unpack site "$staging/site"
unpack fallback "$staging/fallback"
mkdir -p "$(dirname "$archive")"
tar -C "$staging" -czf "$archive" site fallback
size=$(stat -c %s "$archive")
echo "$archive: $((size / 1000000)) MB"
((size < 60000000)) || { echo "the archive must stay under 60 MB" >&2; exit 1; }
