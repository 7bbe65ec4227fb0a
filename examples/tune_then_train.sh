#!/usr/bin/env bash
# Find the fastest settings for this machine, then train with them:
#   examples/tune_then_train.sh recipes/quickstart.yaml
set -euo pipefail
recipe=${1:?usage: $0 RECIPE [section.key=value ...]}
shift
tuned=$(basename "${recipe%.yaml}").tuned.yaml

hf-fasttrain tune "$recipe" "$@" --budget 3m
hf-fasttrain "$tuned" # includes the overrides above
