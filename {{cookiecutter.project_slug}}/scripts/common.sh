# Sourced by the other scripts: changes to the repository's root directory and selects the Python command.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
unset CDPATH
cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

# check_python PYTHON: exits with an error if that Python is too old or lacks a dependency. It imports none of them.
check_python() {
    if ! command -v "$1" >/dev/null; then
        echo "error: PYTHON=$1 does not exist; use a Python that has the dependencies, or unset PYTHON to use uv." >&2
        exit 2
    fi
    "$1" -c '
import sys
problem = ""
if sys.version_info < (3, 11):
    problem = "is Python %d.%d; use Python 3.11 or newer." % sys.version_info[:2]
else:
    from importlib.util import find_spec
    packages = "matplotlib numpy pandas rich sklearn torch torchcodec torchvision tyro"
    missing = [package for package in packages.split() if find_spec(package) is None]
    if missing:
        problem = "has no %s; install the dependencies: %s -m pip install -e ." % (", ".join(missing), sys.argv[1])
if problem:
    sys.stderr.write("error: PYTHON=%s %s\n" % (sys.argv[1], problem))
    sys.exit(2)
' "$1" || exit
}

# PYTHON=python runs without uv, in the environment of that python.
if [[ -n "${PYTHON:-}" ]]; then
    check_python "$PYTHON"
    python=("$PYTHON")
elif command -v uv >/dev/null; then
    python=(uv run python)
else
    echo "error: uv is not installed; install it, or use a Python that has the dependencies: PYTHON=python $0" >&2
    exit 2
fi

# set_logdir DIRECTORY: sets $logdir, with ~ expanded as train.py does; exits with an error if it is set already.
logdir=
set_logdir() {
    if [[ -n $logdir ]]; then
        echo "error: --logdir is given twice; give it once." >&2
        exit 2
    fi
    logdir=$1
    # shellcheck disable=SC2088  # the tilde is compared here, not expanded; the shell leaves it in --logdir=~/x
    case $logdir in "~/"*) logdir=$HOME/${logdir#"~/"} ;; esac
}

# run COMMAND…: prints the command and replaces the shell with it, so that signals and exit codes pass unchanged.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    exec "$@"
}
