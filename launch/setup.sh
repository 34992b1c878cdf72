#!/usr/bin/env bash
# Makes .venv ready for this repository and sets `python` to its interpreter. Sourced by the other scripts; runs alone too.
#
# A torch that is already there (a GPU container) is kept: the environment then sees the packages around it and only the
# missing ones are installed. Otherwise everything is installed at the versions of constraints.txt.
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv. Nothing outside the repository is changed.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repo/.venv"
python="$venv/bin/python"

say() { printf '\n== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Prints the first Python that is new enough; for one inside .venv (it may be activated) the one that .venv was made with.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" - "$venv" 2>/dev/null <<'PY'; then
import sys
if sys.version_info < (3, 10):
    sys.exit(1)
print(sys._base_executable if sys.prefix == sys.argv[1] else sys.executable)
PY
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python of at least 3.10"
    done
    fail "no Python 3.10 or newer found (python3 is $(python3 --version 2>&1 || true)); install one or set PYTHON=/path/to/python3"
}

# Prints a line that changes whenever the environment has to be made anew. It does not follow the Python that comes first on
# the PATH: that changes with every environment a user activates.
describe_environment() {
    "$1" - "$repo" <<'PY'
import hashlib, sys
repo = sys.argv[1]
files = [f"{repo}/{name}" for name in ("pyproject.toml", "constraints.txt", "launch/setup.sh")]
print(repo, hashlib.sha256(b"".join(open(file, "rb").read() for file in files)).hexdigest())
PY
}

# Prints the constraints of a torch that pyproject.toml allows together with its numpy, or nothing. What was compiled
# against these two stays usable with them.
installed_torch() {
    "$1" - 2>/dev/null <<'PY' || true
import importlib.metadata as metadata
import torch
if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7):
    print(f"torch=={metadata.version('torch')}\nnumpy=={metadata.version('numpy')}")
PY
}

install() {
    # A container may constrain pip to its own versions of everything, and a user may have asked for --user.
    env -u PIP_CONSTRAINT -u PIP_TARGET PIP_USER=0 \
        "$python" -m pip install -qq --disable-pip-version-check --no-input --no-warn-script-location "$@"
}

# Prints what makes a new environment see the packages of a virtual environment: for that one, "system" would mean the
# Python below it. Nothing for any other Python.
see_packages_of() {
    "$1" - <<'PY'
import site, sys
if sys.prefix != sys.base_prefix:
    for folder in site.getsitepackages():
        print(f"import site; site.addsitedir({folder!r})")
PY
}

make_environment() {
    local base="$1" kept outer constraints="$repo/constraints.txt" options=()
    kept="$(installed_torch "$base")"
    if [ -n "$kept" ]; then
        say "Setting up .venv around the installed $(head -n 1 <<<"$kept")"
        outer="$(see_packages_of "$base")"
        [ -n "$outer" ] || options=(--system-site-packages)
    else
        say "Setting up .venv with $("$base" --version): downloads torch and about fifty smaller packages, a minute or two"
    fi
    "$base" -m venv --clear ${options[@]+"${options[@]}"} "$venv" || fail \
        "$base cannot make virtual environments; install its venv package (on Debian and Ubuntu: python3-venv) or set PYTHON"
    if [ -n "$kept" ]; then
        constraints="$venv/constraints.txt"
        { grep -v -E '^(torch|numpy|triton)==' "$repo/constraints.txt"; printf '%s\n' "$kept"; } >"$constraints"
        printf '%s\n' "$outer" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_environment.pth"
    else
        # First and alone: asked for by its exact version, a build for this machine comes before larger ones.
        install "$(grep '^torch==' "$constraints")"
    fi
    install -c "$constraints" -e "${repo}[dev]"
}

ensure_environment() {
    local base wanted stamp="$venv/complete.txt"
    base="$(find_python)"
    wanted="$(describe_environment "$base")"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null; then return; fi
    SECONDS=0
    rm -f "$stamp"
    make_environment "$base"
    printf '%s\n' "$wanted" >"$stamp" # last: an interrupted set-up starts again
    say "Environment ready after ${SECONDS} s"
}

# Two scripts started at once set up one after the other. In a subshell, so that nothing started later holds the lock.
mkdir -p "$repo/build"
(
    if command -v flock >/dev/null; then flock 9; fi
    ensure_environment
) 9>"$repo/build/setup.lock"
