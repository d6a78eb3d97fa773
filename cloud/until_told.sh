#!/usr/bin/env bash
# Runs a command on an AWS spot instance, and stops it in time: bash cloud/until_told.sh dvc repro
#
# AWS tells two minutes ahead that it takes an instance back, at an address that somebody must ask, and sends no signal.
# Asked every five seconds here; the command then gets Ctrl-C, on which training saves. This script does not end before
# the instance does, lest SkyPilot take the run for failed instead of interrupted.
metadata=${EC2_METADATA:-http://169.254.169.254}/latest
set -m # a process group for the command, as in a terminal

told() {
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") &&
        curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"
}

"$@" &
command=$!
while kill -0 $command 2>/dev/null; do
    if told; then
        echo 'encore: AWS takes this instance back; stopping' >&2
        kill -INT -- -$command
        wait $command
        exec sleep infinity
    fi
    sleep "${EC2_METADATA_SECONDS:-5}"
done
wait $command
