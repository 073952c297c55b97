#!/bin/sh
# Print the path of a Python 3.11, or say how to get one and exit 1.
# $PYTHON, where set, is the only candidate.
set -u
for candidate in ${PYTHON:-python3.11 python3 python}; do
    found=$("$candidate" -c '
import os, sys
if sys.version_info[:2] == (3, 11):
    # Never the one in a virtual environment: .venv itself may be first on the PATH, and half gone.
    print(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable))' 2>/dev/null) || continue
    if [ -n "$found" ]; then
        echo "$found"
        exit 0
    fi
done
if [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is no Python 3.11 (it says: $("$PYTHON" --version 2>&1 | head -n 1))." >&2
else
    echo "No Python 3.11 found: looked for python3.11, python3 and python on the PATH." >&2
fi
echo "Install Python 3.11, or name it: make run PYTHON=/path/to/python3.11" >&2
exit 1
