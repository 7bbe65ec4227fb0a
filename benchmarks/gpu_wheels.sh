#!/bin/sh
# Download the wheels that a machine with PyTorch, torchvision, timm, transformers and accelerate may lack for
# benchmarks/gpu_check.py, for Python 3.12 on Linux (x86-64):
#
#     sh benchmarks/gpu_wheels.sh FOLDER
#
# On that machine, without a network: python benchmarks/gpu_check.py --wheels FOLDER --out DIR
set -eu
folder=${1:?usage: sh benchmarks/gpu_wheels.sh FOLDER}
root=$(cd "$(dirname "$0")/.." && pwd)
limit=60000000 # bytes, with the checkout

fetch() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
        --constraint "$root/constraints.txt" --dest "$folder" "$@"
}

rm -f "$folder"/*.whl # two versions of a package can't be installed together
fetch pydantic datasets evaluate simplejpeg ruamel.yaml plotly pytest pytest-timeout
# Their requirements, within the bounds of the datasets and plotly versions in constraints.txt.
# datasets and evaluate require requests, which huggingface_hub no longer brings along.
fetch requests charset-normalizer urllib3 idna certifi
fetch annotated-types typing-inspection 'typing-extensions>=4.16' 'dill>=0.4.1,<0.4.2' 'multiprocess>=0.70.19,<0.70.20' \
    'fsspec<=2026.9.0' narwhals iniconfig pluggy
# pydantic requires an exact version of pydantic-core.
core=$(
    python3 - "$folder"/pydantic-*.whl <<'END'
import re, sys, zipfile

wheel = zipfile.ZipFile(sys.argv[1])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
print(re.search(r"^Requires-Dist: (pydantic-core==[^ ;\n]+)", metadata, re.M)[1])
END
)
fetch "$core"

ls "$folder"
wheels=$(cat "$folder"/*.whl | wc -c)
checkout=$(cd "$root" && git ls-files -z | xargs -0 cat | wc -c)
echo "wheels $wheels bytes, checkout $checkout bytes, total $((wheels + checkout)) of $limit"
test $((wheels + checkout)) -le $limit
