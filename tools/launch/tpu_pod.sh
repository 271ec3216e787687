#!/bin/sh
# One process on every host of a TPU pod slice; JAX finds the others by itself.
#   TPU=NAME ZONE=us-west4-a sh tools/launch/tpu_pod.sh CONFIG [--field value ...]
# Every host has this repository in ~/mis-jax with `make setup` and `pip install -e '.[tpu]'` done.
# CONFIG's output must be a folder that all hosts share, such as a Filestore mount.
# Ended by a lost host or a preemption, the same command goes on.
set -eu
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "cd ~/mis-jax && .venv/bin/mis-jax train $*"
