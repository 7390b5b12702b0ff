#!/usr/bin/env bash
# usage: requirements/venv.sh FOLDER runtime|dev
# Makes FOLDER a virtual environment with Tidemill (editable) and what requirements/<second>.txt locks.
# Needs Python and one way to get uv: uv itself, the venv module with ensurepip, or pip. Works from any of them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 lock=$2
wanted="3.11"
here=$venv/.uv # a folder that holds nothing but uv
export PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*" >&2; }

fits() { # whether that Python is new enough
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# the Python to use: the first that is new enough; else any Python will do to fetch uv, which fetches one
python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 /usr/bin/python3; do
    if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then
        python=$(command -v "$candidate")
        break
    fi
done
starter=${python:-$(command -v python3 || true)}

find_uv() {
    local found
    for found in "$here/bin/uv" "$venv/bin/uv" "$(command -v uv || true)"; do
        if [ -n "$found" ] && "$found" --version >/dev/null 2>&1; then
            printf '%s' "$found"
            return 0
        fi
    done
    return 1
}

locked_uv() { # the lock's own lines about uv, hashes included
    sed -n '/^uv==/,/[^\\]$/p' "requirements/$lock.txt"
}

fetch_uv() {
    [ -n "$starter" ] || return 1
    local wish
    wish=$(mktemp)
    locked_uv >"$wish"
    # pip of the system, into a folder: touches nothing of the system
    if "$starter" -m pip --version >/dev/null 2>&1 &&
        "$starter" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
            --target "$here" --upgrade -r "$wish" >&2; then
        rm -f "$wish"
        return 0
    fi
    # no pip: an environment for uv alone. It fails where Debian and Ubuntu leave ensurepip out.
    rm -rf "$here"
    if "$starter" -c 'import ensurepip, venv' >/dev/null 2>&1 && "$starter" -m venv "$here" >&2 &&
        "$here/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
            -r "$wish" >&2; then
        rm -f "$wish"
        return 0
    fi
    rm -rf "$here" "$wish"
    return 1
}

if ! uv=$(find_uv); then
    mkdir -p "$venv"
    if ! fetch_uv; then
        # Debian and Ubuntu split these out of Python; in a container as root there is nobody to ask
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
            say "python3-venv is missing; installing it with apt-get"
            (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv) >&2 || true
            starter=${starter:-$(command -v python3 || true)}
        fi
        if ! fetch_uv; then
            say "Tidemill needs Python $wanted or newer and a way to install packages, and found neither pip, nor uv,"
            say "nor a complete venv module. On Debian and Ubuntu:"
            say "    sudo apt-get install -y python3 python3-venv"
            say "then run the same make command again."
            exit 1
        fi
        [ -n "$python" ] || { fits "$starter" && python=$starter; } || true
    fi
    uv=$(find_uv)
fi

if ! [ -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
    "$uv" venv --quiet --allow-existing --python "${python:-$wanted}" "$venv"
fi
export VIRTUAL_ENV=$PWD/$venv UV_LINK_MODE=${UV_LINK_MODE:-copy}
case $venv in /*) VIRTUAL_ENV=$venv ;; esac
"$uv" pip install --quiet --require-hashes -r "requirements/$lock.txt"
"$uv" pip install --quiet --no-deps --no-build-isolation --editable .
