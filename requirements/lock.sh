#!/usr/bin/env bash
# Writes the locks: exact versions with hashes, for every Python from 3.11 on and every platform.
# The locks name no registry, so they serve behind any mirror. Extra arguments go to uv (for example --upgrade).
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}
lock() {
    local into=$1
    shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
        --no-emit-find-links --no-annotate "$@" --output-file "$into"
}
lock requirements/runtime.txt pyproject.toml requirements/build.in --extra quickstart --extra postgres "$@"
lock requirements/dev.txt pyproject.toml requirements/build.in --extra quickstart --extra postgres --group dev \
    --constraint requirements/runtime.txt "$@"
