#!/usr/bin/env bash
# Remakes constraints.txt: the versions of all packages that zipeval needs, for every Python that it supports. Needs uv.
#
#   scripts/constraints.sh
#
# For when a bound in pyproject.toml has changed, or for newer packages. Run the tests before you commit what it writes.
set -euo pipefail
cd "$(dirname "$0")/.."

# The ray extra is left out: it wants cloudpickle 2 and so an older joblib, which everybody else would get with it.
extras=(--extra test --extra lint --extra release --extra browser)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Every number comes out of torch, so it is the release that all tests ran with, and not the newest. Raise both by hand and together:
# a torchvision is built against one torch. From 0.49, bitsandbytes cannot multiply 4-bit matrices on CPUs with AVX512-BF16 whose width is
# not a multiple of 64, as those of the embedded model.
cat >"$work/tested.txt" <<'PINS'
torch==2.14.1
torchvision==0.29.1
bitsandbytes<0.49
PINS

{
    echo "# The version of every package that zipeval is tested with, on Python 3.10 to 3.13. Remade by scripts/constraints.sh."
    uv pip compile --quiet --universal --python-version 3.10 "${extras[@]}" --constraints "$work/tested.txt" \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml
} >"$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
