# Sourced by the other scripts: changes to the repository's root directory and selects the Python command.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
unset CDPATH
cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

# PYTHON=python runs without uv, in the environment of that python.
if [[ -n "${PYTHON:-}" ]]; then
    python=("$PYTHON")
elif command -v uv >/dev/null; then
    python=(uv run python)
else
    echo "error: uv is not installed; install it, or use a Python that has the dependencies: PYTHON=python $0" >&2
    exit 2
fi

# run COMMAND…: prints the command and replaces the shell with it, so that signals and exit codes pass unchanged.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    exec "$@"
}
