# Sourced by the scripts beside it: goes to the repository's root, and finds the Python to run with.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
unset CDPATH
cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

# PYTHON=python runs without uv, in whatever environment that python belongs to.
if [[ -n "${PYTHON:-}" ]]; then
    python=("$PYTHON")
elif command -v uv >/dev/null; then
    python=(uv run python)
else
    echo "error: uv is not installed; install it, or name a Python that has the dependencies: PYTHON=python $0" >&2
    exit 2
fi

# run COMMAND…: shows the command and becomes it, so that Ctrl-C and exit codes reach it unchanged.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    exec "$@"
}
